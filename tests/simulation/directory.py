# SPDX-License-Identifier: Apache-2.0
"""A simulated directory: late, stale, empty, away; and the thread of each process that asks it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from green_zmq.errors import DirectoryError, TransportClosed
from green_zmq.routing import Entry, Node, Topic
from tests.simulation.clock import Clock

if TYPE_CHECKING:
    from tests.simulation.process import Process


class _Record(NamedTuple):
    node: Node
    listeners: frozenset[tuple[Topic, str]]
    expires: float


class Store:
    """What all processes share.

    :ivar away: it does not answer.
    :ivar late: the most seconds that it takes.
    :ivar behind: what it says of topics is so many seconds old.
    :ivar troubled: when it was last anything of that, or lost a record that it should have.
    """

    def __init__(self, clock: Clock, expire: float, runs: Callable[[bytes], bool]) -> None:
        self.clock = clock
        self.away = False
        self.late = 0.01
        self.behind = 0.0
        self.troubled = 0.0
        self.healed = 0.0
        self.handles: list[Handle] = []
        # Instances that it was without for a while although they ran.
        self.missed: set[bytes] = set()
        # Every state that it has been in of late, with when that began.
        self.history: deque[tuple[float, dict[bytes, _Record]]] = deque([(0.0, {})])
        self._expire = expire
        self._runs = runs

    def records(self, behind: float = 0.0) -> dict[bytes, _Record]:
        now = self.clock.now
        state = next((state for since, state in reversed(self.history) if since <= now - behind), {})
        self.missed.update(i for i, record in state.items() if record.expires <= now)
        # A process of this machine that does not run is known not to.
        return {i: r for i, r in state.items() if r.expires > now - behind and (behind or self._runs(i))}

    def write(self, records: dict[bytes, _Record]) -> None:
        now = self.clock.now
        before = self.history[-1][1]
        self.history.append((now, records))
        while self.history[1][0] < now - 60:
            self.history.popleft()
        topics: dict[Topic, None] = {}
        for record in [*before.values(), *records.values()]:
            if before.get(record.node.instance, ((), ()))[1] != records.get(record.node.instance, ((), ()))[1]:
                topics.update(dict.fromkeys(topic for topic, _ in sorted(record.listeners)))
        for handle in self.handles:
            for topic in topics:
                self.clock.after(self.clock.random.random() * 0.01, handle.changed, topic)

    def announce(self, node: Node, listeners: Collection[tuple[Topic, str]]) -> None:
        record = _Record(node, frozenset(listeners), self.clock.now + self._expire)
        self.write({**self.records(), node.instance: record})

    def withdraw(self, instance: bytes) -> bool:
        records = self.records()
        self.write({i: record for i, record in records.items() if i != instance})
        return instance in records

    def lose_everything(self) -> None:
        """It comes back empty, and knows that it does: nobody is said to be gone before all had time to return."""
        self.missed.update(self.history[-1][1])
        self.write({})
        self.healed = self.clock.now + self._expire

    def lose(self, instance: bytes) -> None:
        self.missed.add(instance)
        self.write({i: record for i, record in self.records().items() if i != instance})


class Handle:
    """One process's access, with the interface of green_zmq.directory.Directory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._news: dict[Topic, None] = {}
        self._all = True
        store.handles.append(self)

    def changed(self, topic: Topic) -> None:
        self._news[topic] = None

    def miss(self) -> None:
        """What was pushed may be lost."""
        self._all = True

    def announce(self, node: Node, listeners: Collection[tuple[Topic, str]]) -> None:
        self._store.announce(node, listeners)

    def withdraw(self, instance: bytes) -> bool:
        return self._store.withdraw(instance)

    def look_up(self, topic: Topic) -> list[Entry]:
        records = self._store.records(self._store.behind)
        return sorted(Entry(server, r.node) for r in records.values() for t, server in r.listeners if t == topic)

    def forget(self, topic: Topic) -> None: ...

    def is_alive(self, node: Node) -> bool:
        return node.instance in self._store.records() or self._store.clock.now < self._store.healed

    def changes(self) -> Collection[Topic] | None:
        news, self._news = self._news, {}
        everything, self._all = self._all, False
        return None if everything else list(news)


class Asker:
    """The thread of a process that asks, with the interface of green_zmq.asker.Asker."""

    def __init__(self, process: Process, store: Store) -> None:
        self.failing = False
        self.opened: Callable[[Any], None] = lambda _: None
        self._process = process
        self._store = store
        self._handle: Handle | None = None
        self._jobs: deque[Callable[[Any], Any]] = deque()
        self._unanswered: deque[Callable[[Any], None]] = deque()
        self._working = False
        self._ended = False
        self._answer_at = 0.0

    def ask(self, job: Callable[[Any], Any], then: Callable[[Any], None]) -> None:
        if self._ended:
            then(DirectoryError("The transport is being closed."))
            return
        self._jobs.append(job)
        self._unanswered.append(then)
        self._go_on()

    def end(self) -> None:
        self._ended = True

    def close(self) -> None:
        self._ended = True
        while self._unanswered:
            self._unanswered.popleft()(DirectoryError("The transport is being closed."))

    def notice(self, *, failing: bool) -> None:
        """What a thread notices that waits for news."""
        if self._handle is not None and self._process.alive:
            self._handle.miss()
            self._post(self._heard, DirectoryError("the directory is away") if failing else None)

    def _go_on(self) -> None:
        if self._jobs and not self._working:
            self._working = True
            self._store.clock.after(self._store.clock.random.random() * self._store.late, self._work)

    def _work(self) -> None:
        self._working = False
        if not self._process.alive or self._process.paused:
            if self._process.alive:
                self._working = True
                self._store.clock.after(0.1, self._work)
            return
        job = self._jobs.popleft()
        answer: Any
        if self._store.away:
            answer = DirectoryError("the directory is away")
        else:
            if self._handle is None:
                self._handle = Handle(self._store)
                self._post(self.opened, self._handle)
            answer = job(self._handle)
        delay = self._store.clock.random.random() * self._store.late
        self._answer_at = max(self._answer_at, self._store.clock.now + delay)  # in the order of the questions
        self._store.clock.at(self._answer_at, self._post, self._answered, answer)
        self._go_on()

    def _post(self, fn: Callable[[Any], None], argument: Any) -> None:
        try:
            self._process.loop.post(fn, argument)
        except TransportClosed:
            self._jobs.clear()

    def _answered(self, answer: Any) -> None:
        if self._unanswered:
            self._heard(answer)
            self._unanswered.popleft()(answer)

    def _heard(self, answer: Any) -> None:
        self.failing = isinstance(answer, DirectoryError)
