# SPDX-License-Identifier: Apache-2.0
"""Keeps a process and the directory informed of each other.

All of it runs in the loop's thread. A send that finds its topic in the table asks nobody: whether anything has changed is
told by :meth:`Directory.changes`, and news is fetched while the send goes on with what was known.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Final

from green_zmq.asker import Asker, Then
from green_zmq.config import Settings
from green_zmq.delivery import Sender
from green_zmq.directory import Directory
from green_zmq.errors import DirectoryError
from green_zmq.routing import Entry, Node, Topic

# While requests wait for a server to appear, the directory is watched this closely.
_WATCH: Final = 0.02
# How old, at a send, the knowledge may be that nothing has changed. Asking costs 3 us.
_FRESH: Final = 0.01
# While many servers come or go, a topic that has so many is read for a part of the time only: for one in so much.
_MANY: Final = 100
_PAUSE: Final = 20
# A directory that fails is asked again after this time.
_RETRY: Final = 1.0


def _ignore(_: object) -> None: ...


def _forget(topic: Topic, directory: Directory) -> None:
    directory.forget(topic)


class Resolver:
    def __init__(
        self,
        asker: Asker,
        sender: Sender,
        settings: Settings,
        now: Callable[[], float],
        gone: Callable[[Node], None],
    ) -> None:
        """:param gone: called with a node that the directory no longer has."""
        self.due = inf
        self.counts: Counter[str] = Counter()
        self._asker = asker
        asker.opened = self._opened
        self._sender = sender
        self._table = sender.table
        self._settings = settings
        self._now = now
        self._gone = gone
        self._directory: Directory | None = None
        self._check_at = 0.0
        self._stale: dict[Topic, None] = {}
        self._asked: dict[Topic, float] = {}
        # When a topic with many servers, which takes a while to be read, may be read again because it has changed.
        self._again_at: dict[Topic, float] = {}
        # When something was last sent there, unless the sender knows of a later time.
        self._used: dict[Topic, float] = {}
        self._forget_at = inf
        self._node: Node | None = None
        self._listeners: set[tuple[Topic, str]] = set()
        self._announce_at = inf
        self._watch_at = inf
        self._reread_at = inf

    # What the directory is told.

    def announce(self, node: Node, listeners: set[tuple[Topic, str]], then: Then) -> None:
        """Register the node with exactly these listeners; ``then`` gets None or the error."""
        self._node, self._listeners = node, set(listeners)
        # Nodes that have come back together are not to stay in step.
        self._announce_at = self._now() + self._settings.update * random.uniform(0.9, 1.0)
        self._set_due()
        wanted = frozenset(listeners)

        def announced(error: DirectoryError | None) -> None:
            if error is not None and self._node is not None:
                self._announce_at = self._now() + _RETRY * random.uniform(0.5, 1.0)
                self._set_due()
            then(error)

        self._asker.ask(lambda directory: directory.announce(node, wanted), announced)

    def withdraw(self, then: Then) -> None:
        """Remove the node, and end the thread; ``then`` gets None or the error."""
        node, self._node = self._node, None
        self._directory = None  # its thread closes it
        self._announce_at = self._watch_at = inf
        self._set_due()
        if node is not None:
            self._asker.ask(lambda directory: directory.withdraw(node.instance), then)
        else:
            then(None)
        self._asker.end()

    # What it is asked.

    def look_up(self, topic: Topic) -> None:
        """Ask for a topic, unless that is under way."""
        if topic not in self._asked:
            self._asked[topic] = self._now()
            self._used.setdefault(topic, self._asked[topic])
            self._stale.pop(topic, None)
            self.counts["topics looked up"] += 1
            if self._forget_at == inf:
                self._forget_at = self._now() + self._settings.idle_timeout
                self._set_due()
            self._asker.ask(lambda directory: directory.look_up(topic), lambda answer: self._looked_up(topic, answer))

    def verify(self, node: Node) -> None:
        """Its connection was lost: does the directory still have it?"""
        self._asker.ask(
            lambda directory: directory.is_alive(node),
            lambda alive: self._gone(node) if alive is False else None,
        )

    def is_fresh(self, topic: tuple[str, str], now: float, *, strictly: bool) -> bool:
        """Before a send, for who may not have anything fetched: whether :meth:`refresh` would find no news of the topic."""
        if strictly or self._check_at <= now:
            self._check(now)
        return topic not in self._stale and not (strictly and topic in self._asked)

    def doubt(self) -> None:
        """Who has asked whether there is news may have been ended before it was taken down."""
        self._stale.update(dict.fromkeys(self._table.topics))

    def refresh(self, topic: Topic, now: float, *, strictly: bool) -> bool:
        """Before a send: have news fetched if there is any. Whether what the table says of this topic is up to date.

        :param strictly: ask whether there is news even if that was asked just now.
        """
        self._used[topic] = now
        if strictly or self._check_at <= now:
            self._check(now)
        if topic in self._stale and (strictly or self._again_at.get(topic, 0.0) <= now):
            self.look_up(topic)
        return topic not in self._asked

    def tick(self, now: float) -> None:
        if self._announce_at <= now and self._node is not None:
            self.announce(self._node, self._listeners, _ignore)
        if self._watch_at <= now:
            self._watch_at = inf
            self.watch(now)
        if self._forget_at <= now:
            self._forget_unused(now)
        self._set_due()

    def watch(self, now: float) -> None:
        """As long as requests wait for a server, look whether one has appeared."""
        if not self._sender.waiting:
            self._watch_at = self._reread_at = inf
        elif self._watch_at < inf:
            return  # it is looked then
        elif self._directory is None or self._asker.failing:
            self._watch_at = now + _RETRY
            self._look_up_awaited(all_of_them=True)
        else:
            self._watch_at = now + _WATCH
            self._check(now)
            # News may have been lost, or an answer been older than the news.
            self._look_up_awaited(all_of_them=self._reread_at <= now)
            if self._reread_at <= now or self._reread_at == inf:
                self._reread_at = now + self._settings.update
        self._set_due()

    def _look_up_awaited(self, *, all_of_them: bool) -> None:
        for topic in self._sender.awaited():
            if all_of_them or topic in self._stale:
                self._stale[topic] = None
                self.look_up(topic)

    # How.

    def _set_due(self) -> None:
        self.due = min(self._announce_at, self._watch_at, self._forget_at)

    def _forget_unused(self, now: float) -> None:
        """Topics that nothing was sent to for as long as an unused connection is kept."""
        keep = {*self._sender.awaited(), *self._asked}
        oldest = now - self._settings.idle_timeout
        for topic, used in self._sender.used().items():
            self._used[topic] = max(used, self._used.get(topic, 0.0))
        for topic in [topic for topic, used in self._used.items() if used <= oldest and topic not in keep]:
            del self._used[topic]
            self._again_at.pop(topic, None)
            self._stale.pop(topic, None)
            self._sender.forget(topic)
            self._asker.ask(partial(_forget, topic), _ignore)
        self._forget_at = now + self._settings.idle_timeout / 2 if self._used else inf

    def _check(self, now: float) -> None:
        self._check_at = now + _FRESH
        if self._directory is not None:
            changed = self._directory.changes()
            news = [*self._table.topics, *self._asked] if changed is None else changed
            self._stale.update(dict.fromkeys(news))

    def _looked_up(self, topic: Topic, answer: list[Entry] | DirectoryError) -> None:
        asked, now = self._asked.pop(topic), self._now()
        if isinstance(answer, DirectoryError):
            self._stale[topic] = None
            self._sender.not_looked_up(topic, str(answer), now)
        else:
            if len(answer) >= _MANY:
                self._again_at[topic] = now + _PAUSE * (now - asked)
            self._table.update(topic, answer)
            self._sender.looked_up(topic, now)

    def _opened(self, directory: Directory) -> None:
        self._directory = directory
        self._check(self._now())
