# SPDX-License-Identifier: Apache-2.0
"""The nine promises of doc/guarantees.rst, asked of a simulated world after every step, and of what is left at the end."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Any, NoReturn

from oslo_messaging.exceptions import MessageDeliveryFailure, MessageUndeliverable, MessagingTimeout

from green_zmq import delivery
from green_zmq.delivery import HOLD
from green_zmq.errors import DirectoryError, ServerGone, TransportClosed, WireError
from green_zmq.routing import Topic
from green_zmq.wire import BUSY, CALL, CAST, FANOUT, GIVEN_BACK, NOT_HERE, Key, decode_answer, decode_request, kind_name, unpack

if TYPE_CHECKING:
    from tests.simulation.process import Process, Service
    from tests.simulation.world import World

_REFUSALS = (BUSY, NOT_HERE, GIVEN_BACK)
# What a caller may wait beyond its time: for its loop's turns, and for a thread's.
_SLACK = 0.1
# The directory is trusted to be known after this time without trouble.
_KNOWN = 3.0


class Broken(AssertionError):
    """A promise was not kept."""


class Message:
    """What a caller gave, and everything that was seen of it."""

    def __init__(self, number: int, kind: int, key: Key, sender: Process, **options: Any) -> None:
        self.number = number
        self.kind = kind
        self.key = key
        self.sender = sender
        self.timeout: float | None = options["timeout"]
        self.monitor: float | None = options["monitor"]
        self.retry: int | None = options["retry"]
        self.required: bool = options["required"]
        self.fails: bool = options["fails"]
        self.began = self.ended = inf
        self.killed = False
        self.outcome: Any = None
        self.error: Exception | None = None
        self.runs: list[tuple[Process, float]] = []
        # When it was first written under each id that it had, and when its sender last heard that it was refused.
        self.sent: dict[int, float] = {}
        self.refused = -inf
        # Casts to the same address that waited for a server when this was given.
        self.behind: list[int] = []
        # Whom a fanout must reach.
        self.members: list[tuple[Service, float]] = []

    def __repr__(self) -> str:
        return f"{kind_name(self.kind)} {self.number} to {self.key} of {self.sender} at {self.began:.3f}"


class Promises:
    def __init__(self, world: World) -> None:
        self._world = world
        self.messages: list[Message] = []
        self._sent: dict[tuple[Process, int], Message] = {}
        self._overtaken: dict[int, Message] = {}
        self._turns = 0

    def broken(self, promise: int, text: str) -> NoReturn:
        raise Broken(f"promise {promise}: {text}")

    # What happens.

    def begins(self, message: Message) -> None:
        world, now = self._world, self._world.clock.now
        message.began = now
        world.clock.note(f"{message} begins")
        self.messages.append(message)
        if message.kind == CAST and not message.required:
            waiting = message.sender.engine._sender.waiting.get(message.key, ())
            message.behind = [json.loads(request.body[0])[1]["work"][0] for request in waiting if request.kind == CAST]
        if message.kind == FANOUT and self._directory_is_known(message.sender):
            message.members = [
                (service, service.registered)
                for process in world.processes
                for service in process.services
                if service.key[:2] == message.key[:2] and service.registered < now - _KNOWN and not process.stopping
            ]
        world.clock.at(self._limit(message) + _SLACK + 3 * message.sender.slow, self._must_have_ended, message)

    def written(self, sender: Process, frames: list[bytes]) -> None:
        """A sender gives this to a connection."""
        try:
            requests = [decode_request(message) for message in unpack(frames)]
        except WireError as error:
            self.broken(2, f"nobody can read what was written: {error}")
        for request in requests:
            if request.body:
                message = self.messages[json.loads(request.body[0])[1]["work"][0]]
                message.sent.setdefault(request.id, self._world.clock.now)
                self._sent[sender, request.id] = message

    def read(self, sender: Process, frames: list[bytes]) -> None:
        """A sender hears this."""
        for answer in map(decode_answer, unpack(frames)):
            if answer.kind in _REFUSALS:
                for id in answer.ids:
                    self._sent[sender, id].refused = self._world.clock.now

    def ends(self, message: Message) -> None:
        now = message.ended = self._world.clock.now
        self._world.clock.note(f"{message} ends: {message.error or message.outcome!r}")
        error = message.error
        if message.sender.stopping or isinstance(error, TransportClosed):
            return
        if not self._directory_is_known(message.sender):  # a fanout that waited for room is for those who are there then
            message.members = []
        if message.kind == CALL:
            self._call_ends(message, now)
        elif error is not None:
            if not isinstance(error, MessageDeliveryFailure | MessageUndeliverable | DirectoryError) or (
                isinstance(error, DirectoryError) and not message.required
            ):
                self.broken(3, f"{message} raised {error!r}")
            self._check_undeliverable(message)
            if message.runs and message.retry is None and "it was sent to" not in str(error):
                self.broken(3, f"{message} was run, and its caller got {error!r}")
        elif message.required and not self._could_exist(message):
            self.broken(7, f"{message} did not fail although nobody is registered")

    def runs(self, number: int, process: Process, key: Key) -> None:
        """A worker begins with it."""
        world = self._world
        message = self.messages[number]
        world.clock.note(f"{message} is run by {process} for {key}")
        before = [other for other, _ in message.runs]
        if message.kind == FANOUT:
            if before.count(process) >= sum(s.key[:2] == key[:2] for s in process.services) and not process.stopping:
                self.broken(2, f"{message} was run twice by {process}")
        elif before:
            self.broken(2, f"{message} was run by {before[0]} and again by {process}")
        message.runs.append((process, world.clock.now))
        if (
            message.kind == CAST
            and not message.required
            and all(service.workers == 1 for service in process.services)
            and self._serves_alone(key)
        ):
            self._check_order(message, process)

    def after_turn(self, process: Process) -> None:
        """What holds at every moment, of the process whose loop has just had its turn."""
        sender, receiver = process.engine._sender, process.engine._receiver
        limits, settings = self._world.settings.limits, self._world.settings
        outbox = sender._outbox
        # What is given back has no caller any more that could be held up.
        more = sender.counts["answers given_back"]
        bodies = {id(request.body): request.size for request in outbox}  # an empty one takes any fanout, in all its copies
        size = sum(bodies.values())
        most = limits.outbox_bytes + more * max(bodies.values(), default=0)
        if len(bodies) > limits.outbox_messages + more or (len(bodies) > 1 and size > most):
            self.broken(9, f"{process} has {len(bodies)} messages of {size} bytes in its outbox")
        for service in process.services:
            listener = service.listener
            if listener is not None and len(listener.batches.waiting) + len(listener.unbegun) > settings.listener_window:
                self.broken(9, f"{process} has taken more than its window")
        if receiver._reply_bytes > delivery.REPLY_CACHE and len(receiver._replies) > 1:
            self.broken(9, f"{process} keeps {receiver._reply_bytes} bytes of replies")
        self._turns += 1
        if self._turns % 8 == 0:
            self._check_sums(process)

    # Promises.

    def _limit(self, message: Message) -> float:
        """When its caller must have been let go on."""
        limits = self._world.settings.limits
        if message.kind == CALL:
            return message.began + (message.timeout or inf)
        if message.retry is not None:
            return message.began + limits.grace * (message.retry + 1)
        return message.began + min(limits.time_to_live, limits.grace * (1 + HOLD) + 0.1)

    def _must_have_ended(self, message: Message) -> None:
        process = message.sender
        if not process.alive or process.stopping or message.killed or message.ended < inf:
            return
        if process.paused or process.frozen or process.slow > _SLACK / 10 or self._world.clock.now < process.held + _SLACK:
            self._world.clock.after(_SLACK * 2, self._must_have_ended, message)
            return
        self.broken(1 if message.kind == CALL else 3, f"{message} has not ended in time")

    def _call_ends(self, message: Message, now: float) -> None:
        error = message.error
        if error is None or type(error) is Remote:
            if len(message.runs) != 1:
                self.broken(1, f"{message} got a reply and was run {len(message.runs)} times")
            if (error is not None) != message.fails or message.outcome not in (None, message.number):
                self.broken(1, f"{message} got the outcome of something else: {error or message.outcome!r}")
        elif isinstance(error, ServerGone):
            self._check_gone(message, error)
        elif isinstance(error, MessagingTimeout):
            self._check_timeout(message, str(error), now)
        elif isinstance(error, MessageDeliveryFailure) and message.retry is not None:
            pass
        elif not isinstance(error, DirectoryError):
            self._check_undeliverable(message)

    def _check_timeout(self, message: Message, text: str, now: float) -> None:
        assert message.timeout is not None
        early = now < message.began + message.timeout - 0.001
        if early and "heartbeat" in text:
            self._check_heartbeat(message, now)
        elif early:
            self.broken(1, f"{message} timed out early: {text}")
        elif message.runs and ("no server is registered" in text or "no connection" in text or "busy" in text):
            self.broken(1, f"{message} was run by {message.runs[0][0]}, and its caller was told: {text}")

    def _check_gone(self, message: Message, error: ServerGone) -> None:
        """Only a process that had it is named, and only one that is gone, as far as anybody can know."""
        named = [p for p in self._world.processes if f"tcp://{p.host}:{p.port})" in str(error)]
        if not named:
            self.broken(1, f"{message} ended with {error!r}, which names nobody")
        gone = [p for p in named if not p.alive or p.stopping or p.instance in self._world.store.missed]
        if not gone:
            self.broken(1, f"{message} ended with {error!r}, and that process runs")
        if message.runs and message.runs[0][0] not in named:
            self.broken(4, f"{message} ended with {error!r}, and was run by {message.runs[0][0]}")

    def _check_heartbeat(self, message: Message, now: float) -> None:
        assert message.monitor is not None
        if not message.runs:
            return
        server, since = message.runs[0]
        if since + message.monitor <= now and self._world.undisturbed(message.sender, server, since, now):
            self.broken(8, f"{message} ended for want of heartbeats, and {server} has it and was never away")

    def _check_undeliverable(self, message: Message) -> None:
        if isinstance(message.error, MessageUndeliverable):
            if not message.required:
                self.broken(7, f"{message} raised {message.error!r}, which nobody asked for")
            if self._must_exist(message):
                self.broken(7, f"{message} raised {message.error!r}, and a server was registered")
        elif message.retry is None and not isinstance(message.error, DirectoryError):
            limits = self._world.settings.limits
            if "outbox" not in str(message.error) and message.ended < message.began + limits.time_to_live - 0.001:
                self.broken(3, f"{message} raised {message.error!r} although it may take longer")

    def _check_order(self, message: Message, process: Process) -> None:
        """Casts to an address that waited for a server are run as they were given."""
        for number in message.behind:
            if any(p is process for p, _ in self.messages[number].runs):
                continue
            message.sender.world.clock.note(f"{message} is run before {number}")
            self._overtaken.setdefault(number, message)
        first = self._overtaken.get(message.number)
        # Order is kept among those that wait, and not towards one that was refused after the other was sent.
        if first is not None and message.refused < min(first.sent.values()):
            self.broken(3, f"{message} was run after {first}, which was given when this waited already")

    def _serves_alone(self, key: Key) -> bool:
        """Order is kept towards one process; several share what comes."""
        return sum(key[:2] in process.topics for process in self._world.processes) == 1

    def _directory_is_known(self, process: Process) -> bool:
        world = self._world
        quiet = world.store.troubled < world.clock.now - _KNOWN - world.settings.expire
        return quiet and not world.store.away and process.held < world.clock.now - _KNOWN and world.network.slow < 0.1

    def _listeners(self, key: Key) -> list[Service]:
        return [
            service
            for process in self._world.processes
            for service in process.services
            if service.key[:2] == key[:2] and key.server in ("", service.key.server)
        ]

    def _could_exist(self, message: Message) -> bool:
        """Whether somebody is, or was of late, registered."""
        if not self._directory_is_known(message.sender):
            return True
        since = message.began - _KNOWN
        store = self._world.store
        topic = Topic(*message.key[:2])
        return any(
            (t, server) == (topic, message.key.server or server)
            for began, state in store.history
            if began >= since or state is store.history[-1][1]
            for record in state.values()
            for t, server in record.listeners
        ) or bool(self._listeners(message.key))

    def _must_exist(self, message: Message) -> bool:
        """Whether somebody was registered all the time, and could be known."""
        return self._directory_is_known(message.sender) and any(
            service.registered < message.began - _KNOWN
            and service.process.alive
            and not service.process.stopping
            and service.process.instance not in self._world.store.missed
            for service in self._listeners(message.key)
        )

    def _check_sums(self, process: Process) -> None:
        """What is in the sender's books."""
        sender = process.engine._sender
        waiting = [request for queue in [*sender.waiting.values(), *sender._held.values()] for request in queue]
        everywhere = Counter(waiting)
        for link in sender._links.values():
            everywhere.update([*link.open.values(), *link.queue, *chain.from_iterable(link.held.values())])
            if list(link.open) != sorted(link.open):
                self.broken(2, f"{process} would write requests out of order")
            for key in link.held:
                if link.up and link.has_room(key, self._world.settings.limits.ahead):
                    self.broken(5, f"{process} holds back fanouts to {key} for nothing")
        if any(n != 1 for n in everywhere.values()):
            self.broken(2, f"{process} has a request in two places")
        if set(everywhere) != set(sender.requests):
            self.broken(1, f"{process} has a request nowhere")
        if sender._outbox_bytes != sum(request.size for request in sender._outbox):
            self.broken(9, f"{process} has lost count of its outbox")

    # The end.

    def at_end(self) -> None:
        """Everything has had the time to end."""
        world = self._world
        for message in self.messages:
            if message.ended == inf and message.sender.alive and not message.sender.stopping and not message.killed:
                self.broken(1, f"{message} has never ended")
            if message.kind == CALL:
                self._check_success(message)
        for process in world.processes:
            self._check_losses(process)
            if process.alive:
                self._check_leftovers(process)

    def _check_success(self, message: Message) -> None:
        """A call that outlasted the last fault must have succeeded, if its server lives."""
        healed = self._world.healed
        error = message.error
        assert message.timeout is not None
        if error is None or message.began + message.timeout < healed + 30 or message.ended < healed + 30:
            return
        if isinstance(error, MessagingTimeout) and message.retry is None and self._is_served(message.key):
            if message.runs and not message.runs[0][0].alive:
                return
            self.broken(6, f"{message} ended with {error!r} long after everything was well again")

    def _is_served(self, key: Key) -> bool:
        """Whether somebody serves it who did so soon after the last fault."""
        return any(service.registered < self._world.healed + 10 for service in self._listeners(key))

    def _check_losses(self, process: Process) -> None:
        """Who got no error, and whose message was not run, finds it among the losses that were logged."""
        if not process.alive or process.stopping:
            return
        missing: defaultdict[Key, list[tuple[Message, Process | None]]] = defaultdict(list)
        for message in self.messages:
            if message.sender is not process or message.error is not None or message.ended == inf or message.killed:
                continue
            if message.kind == CAST and not message.runs:
                missing[message.key].append((message, None))
            elif message.kind == FANOUT:
                ran = Counter(p for p, _ in message.runs)
                missing[message.key] += [
                    (message, s.process)
                    for s, r in message.members
                    if s.registered == r and not ran[s.process] and s.process.instance not in self._world.store.missed
                ]
        for key, messages in missing.items():
            logged = self._world.logged[process, key]
            if len(messages) > logged:
                promise = 5 if messages[0][0].kind == FANOUT else 3
                self.broken(promise, f"{len(messages)} messages to {key} were lost, {logged} were logged: {messages[:5]}")
            if self._world.gentle and self._is_served(key):
                self._check_gentle_losses([message for message, _ in messages], self._world.crowded_out[process, key])

    def _check_gentle_losses(self, lost: list[Message], crowded_out: int) -> None:
        """Every process ends as it should, so there must be a reason, if not that all its servers were busy all its time."""
        unexcused = [message for message in lost if not self._is_excused(message)]
        if len(unexcused) > crowded_out:
            self.broken(4, f"{unexcused} were lost, {crowded_out} to busy servers, although every process ended as it should")

    def _is_excused(self, message: Message) -> bool:
        """Its server stopped, and the connection broke under it, or its sender had stood still and did not know that yet, or
        they passed each other on the way; or it was refused until its time ran out.

        Asked of its last way; a fanout's copies go each for itself.
        """
        world, end = self._world, message.began + self._world.settings.limits.time_to_live
        ways = list(message.sent.values())[-1 if message.kind == CAST else 0 :]
        return any(
            world.disturbed_at(sent - _SLACK, sent + 2)
            or any(abs(sent - when) <= delay for when, delay in world.stopped)
            or sent > end - _SLACK
            for sent in ways
        )

    def _check_leftovers(self, process: Process) -> None:
        sender, receiver = process.engine._sender, process.engine._receiver
        left = {
            name: value
            for thing in (sender, *sender._links.values(), process.engine.client)
            for name in ("requests", "waiting", "_draining", "_outbox", "open", "queue", "held", "taken", "_held")
            if (value := getattr(thing, name, None))
        }
        if left or sender._outbox_bytes:
            self.broken(9, f"{process} still has {left}")
        if receiver._reply_bytes or receiver.unanswered or any(peer.records for peer in receiver._peers.values()):
            self.broken(9, f"{process} still remembers {receiver._replies}, {receiver.unanswered}")


class Remote(Exception):
    """What a server's endpoint raised."""
