# SPDX-License-Identifier: Apache-2.0
"""Listeners, the messages they hand to oslo.messaging's servers, and their replies."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, Final, TypeVar

from oslo_messaging._drivers import base
from oslo_messaging._drivers.common import serialize_remote_exception
from oslo_messaging.exceptions import MessagingException

from green_zmq import wire
from green_zmq.batches import Batches
from green_zmq.config import Settings
from green_zmq.delivery import Receiver, Record
from green_zmq.errors import AddressError, MessageTooLarge, TransportClosed, Unserializable, WireError, WireVersionError
from green_zmq.loop import Loop
from green_zmq.resolver import Resolver
from green_zmq.router import Router
from green_zmq.routing import Node, Topic
from green_zmq.wire import Key

LOG = logging.getLogger(__name__)

_What = TypeVar("_What")

# A caller that wants to hear heartbeats more rarely hears them this often, in seconds: so soon ends what watches its call.
_MONITOR_MOST: Final = 60.0
# The most of a reason why there is no reply, characters.
_REASON: Final = 1000


class _TooLargeForCaller(MessageTooLarge):
    pass


class Revoked(MessagingException):
    """The message is not to be processed any more: it was given back, or its time has run out."""


class Incoming(base.RpcIncomingMessage):
    """A message on its way through an oslo.messaging server. Its methods are called in that server's workers."""

    def __init__(self, listener: Listener, record: Record, codec: int, ctxt: Any, message: Any) -> None:
        super().__init__(ctxt, message, wire.message_name(record.sender, record.id))
        self.client_timeout = None if record.monitor is None else min(record.monitor, _MONITOR_MOST)
        self.record = record
        self.listener = listener
        self._codec = codec

    def acknowledge(self) -> None:
        """Processing begins.

        :raises Revoked: it must not begin any more. Oslo.messaging's servers then skip the message.
        """
        self.listener.begin(self)

    def requeue(self) -> None:
        """RPC has no requeue: ``require_features`` says so."""

    def reply(self, reply: Any = None, failure: Any = None) -> None:
        if self.record.kind != wire.CALL:
            return
        server, codec = self.listener.server, self._codec
        try:
            if failure is None:
                server.reply(self.record, wire.REPLY, codec, reply)
            else:
                server.reply(self.record, wire.FAILURE, codec, serialize_remote_exception(failure))
        except TransportClosed:
            LOG.error("the reply to request %s cannot be sent: the transport was closed", self.msg_id)
        except Exception as error:
            # The caller is not left waiting: it gets the reason instead of the reply, however little it takes.
            text = str(error)[:_REASON]
            level = logging.DEBUG if isinstance(error, _TooLargeForCaller) else logging.ERROR  # what callers ask is theirs
            LOG.log(level, "the reply to request %s cannot be sent: %s", self.msg_id, text)
            reason = MessageTooLarge(text) if isinstance(error, MessageTooLarge) else Unserializable(text)
            failure = serialize_remote_exception((type(reason), reason, None))
            server.reply(self.record, wire.FAILURE, codec, failure, limited=False)

    def heartbeat(self) -> None:
        """:raises Revoked: the call is over. That ends oslo.messaging's watchdog of a call for which it found no method."""
        if not self.record.running:
            raise Revoked(f"Message {self.msg_id} is not being processed any more.")
        self.listener.server.heartbeat(self.record)


class Listener(base.Listener):
    """What one oslo.messaging server listens to: an address of this process, and what has come for it.

    :ivar arriving: how many messages were accepted and not yet decoded.
    :ivar batches: messages that were decoded and not yet handed over.
    :ivar unbegun: messages that were handed over and whose processing has not begun. Whoever takes one out, a worker that
        begins it or the loop that gives it back, has it: taking a key out of a dict is atomic.
    """

    def __init__(self, server: Server, key: Key, batch_size: int, batch_timeout: float | None) -> None:
        super().__init__(batch_size, batch_timeout)
        self.server = server
        self.key = key
        self.arriving = 0
        self.batches: Batches[Incoming] = Batches(batch_size, batch_timeout)
        self.unbegun: dict[Incoming, bool] = {}
        self._over = False

    def start(self, on_incoming_callback: Callable[[list[Incoming]], None]) -> None:
        """Be found by everybody from here on.

        :raises AddressError: this process cannot listen.
        :raises DirectoryError: it cannot be registered.
        """
        super().start(on_incoming_callback)
        self._over = False
        self.server.start(self)

    def stop(self) -> None:
        """Be found by nobody any more, and give back what was not begun."""
        with contextlib.suppress(TransportClosed):  # then it was stopped with everything else
            self.server.stop(self)
        super().stop()

    def cleanup(self) -> None:
        """Nothing is left: its replies are on their way, and the process goes on listening for others."""

    def room(self, window: int) -> bool:
        return self.arriving + len(self.batches.waiting) + len(self.unbegun) < window and not self._over

    def take(self, incoming: Incoming, now: float) -> None:
        """Hand it over however many its executor has: a worker that finds one in line need not be made anew, or waked."""
        if self.batch_size == 1:
            self.run([incoming])
        else:
            self.batches.add(incoming, now)
            self.hand_over(now)

    def hand_over(self, now: float) -> None:
        """Hand over whole batches, and what there is when the time for a batch has run out."""
        while batch := self.batches.next(now):
            self.run(batch)

    def run(self, batch: list[Incoming]) -> None:
        """Have the executor run it. What that does not take, since it was shut down or the process ends, is given back then."""
        self.unbegun.update(dict.fromkeys(batch, True))
        callback = self.on_incoming_callback
        try:
            if callback is not None:
                callback(batch)
        except RuntimeError as error:
            if not self._over:
                self._over = True
                LOG.warning("no message to %s is taken any more, though its server was not stopped: %s", self.key, error)

    def begin(self, incoming: Incoming) -> None:
        """In a worker."""
        if not self.unbegun.pop(incoming, False):
            raise Revoked(f"Message {incoming.msg_id} was given back, because its listener is stopping.")
        self.server.begun(incoming)


class Server:
    """The receiving side of a process: one ROUTER, and its listeners.

    :ivar refused_at: when somebody last sent something to an address that nobody listens at.
    :ivar figures: tells what this process has counted, for whoever asks over the wire.
    """

    def __init__(
        self,
        loop: Loop,
        receiver: Receiver,
        router: Router,
        resolver: Resolver,
        settings: Settings,
        now: Callable[[], float],
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.due = inf
        self.node: Node | None = None
        self.refused_at = -inf
        self.figures: Callable[[], dict[str, int]] = dict
        self._closed = False
        self._loop = loop
        self._receiver = receiver
        self._resolver = resolver
        self._settings = settings
        self._now = now
        self._router = router
        router.on_message = self._on_message
        self._listeners: dict[Key, deque[Listener]] = {}
        # What was accepted and not yet given to those listeners.
        self.arrived: deque[tuple[Sequence[Listener], Record, wire.Request]] = deque()
        self._complained: dict[str, float] = {}

    # For all threads.

    def start(self, listener: Listener) -> None:
        self._ask_loop(self._start, listener)

    def stop(self, listener: Listener) -> None:
        self._ask_loop(self._stop, listener)

    def begun(self, incoming: Incoming) -> None:
        record = incoming.record
        # A cast that was accepted is run even if its sender took this process for dead meanwhile: nobody else will run it.
        if record.deadline <= self._now() or (record.forgotten and record.kind == wire.CALL):
            self._loop.post(self._too_late, record)
            raise Revoked(f"Message {incoming.msg_id} is too late: its sender has given it up.")
        if record.kind != wire.CALL:
            self._loop.post_lazily(self._begun, record)

    def reply(self, record: Record, kind: int, codec: int, value: object, *, limited: bool = True) -> None:
        body = wire.encode_body(value, codec, self._loop.model.pause)
        size, most = sum(map(len, body)), self._settings.limits.message_bytes
        if limited and size > most:
            raise MessageTooLarge(f"The reply has {size} bytes; max_message_bytes allows {min(most, record.most)}.")
        if limited and size > record.most:
            raise _TooLargeForCaller(f"The reply has {size} bytes; max_message_bytes of the caller allows {record.most}.")
        if size > wire.INLINE and not self._loop.is_mine():  # who makes large ones is to make no more than can be written
            self._ask_loop(self._reply, (record, kind, codec, body))
            return
        alone = len(self._receiver.unanswered) < 2
        reply = (self._receiver.reply, record, kind, codec, body)
        if not (alone and self._loop.call(*reply, True)):
            self._loop.post(*reply)

    def heartbeat(self, record: Record) -> None:
        with contextlib.suppress(TransportClosed):
            self._loop.post(self._receiver.heartbeat, record)

    def _ask_loop(self, fn: Callable[[_What, Callable[[Exception | None], None]], None], what: _What) -> None:
        """Have the loop do something that takes a while, and wait for it."""
        done = self._loop.model.Event()
        errors: list[Exception] = []

        def then(error: Exception | None) -> None:
            if error is not None:
                errors.append(error)
            done.set()

        self._loop.post(fn, what, then)
        done.wait()
        if errors:
            raise errors[0]

    # For the loop's thread.

    def tick(self, now: float) -> None:
        """Batches whose time has run out."""
        self.due = inf
        for listener in self._all():
            if listener.batches.due <= now:
                listener.hand_over(now)
            self.due = min(self.due, listener.batches.due)

    def leave(self) -> None:
        """Nobody finds this process any more: what still comes is refused."""
        self._closed = True
        for listener in self._all():
            self._stopped(listener, lambda _: None)

    def close(self, linger: float) -> None:
        self.leave()
        self._receiver.flush()
        self._router.close(linger)

    def _all(self) -> list[Listener]:
        return [listener for key, listeners in self._listeners.items() if key.server for listener in listeners]

    def _start(self, listener: Listener, then: Callable[[Exception | None], None]) -> None:
        if self._closed:
            then(TransportClosed("The transport was closed."))
            return
        if self.node is None:
            try:
                host, port = self._router.open()
            except AddressError as error:
                then(error)
                return
            self.node = Node(
                instance=self._receiver.instance,
                host=host,
                port=port,
                hostname=socket.gethostname(),
                pid=os.getpid(),
                model=self._loop.model.NAME,
                max_bytes=self._settings.limits.message_bytes,
            )
        # It can take messages before anybody finds it.
        self._add(listener)
        self._announce(lambda error: self._started(listener, error, then))

    def _started(self, listener: Listener, error: Exception | None, then: Callable[[Exception | None], None]) -> None:
        if error is not None:
            self._remove(listener)
            self._announce(lambda _: None)
        then(error)

    def _stop(self, listener: Listener, then: Callable[[Exception | None], None]) -> None:
        if listener not in self._listeners.get(listener.key, ()):
            then(None)
            return
        self._announce(lambda _: self._stopped(listener, then), without=listener)

    def _stopped(self, listener: Listener, then: Callable[[Exception | None], None]) -> None:
        """Nobody finds it any more: give back what was not begun, in the order it came."""
        if listener in self._listeners.get(listener.key, ()):
            self._remove(listener)
        self._receiver.flush()
        self.distribute()
        for incoming in list(listener.unbegun):
            if listener.unbegun.pop(incoming, False):
                self._give_back(listener, incoming)
        while listener.batches.waiting:
            self._give_back(listener, listener.batches.waiting.popleft())
        then(None)

    def _give_back(self, listener: Listener, incoming: Incoming) -> None:
        told = self._refuse(incoming.record, wire.GIVEN_BACK)
        if (incoming.record.forgotten or not told) and incoming.record.kind == wire.CAST:
            # Its sender is not there to take it back, or has given it up, so it is run here after all; and that is what it is
            # told if it returns.
            self._receiver.accept(incoming.record, self._now())
            listener.run([incoming])

    def _add(self, listener: Listener) -> None:
        for key in (listener.key, listener.key._replace(server="")):
            self._listeners.setdefault(key, deque()).append(listener)

    def _remove(self, listener: Listener) -> None:
        for key in (listener.key, listener.key._replace(server="")):
            self._listeners[key].remove(listener)
            if not self._listeners[key]:
                del self._listeners[key]

    def _announce(self, then: Callable[[Any], None], without: Listener | None = None) -> None:
        if self.node is None:
            then(None)
            return
        listeners = {(Topic(*li.key[:2]), li.key.server) for li in self._all() if li is not without}
        self._resolver.announce(self.node, listeners, then)

    def _on_message(self, frames: list[bytes]) -> None:
        try:
            messages = wire.unpack(frames[1:])
        except WireError as error:
            self._refuse_frames("requests that are none of ours", error)
            return
        for message in messages:
            self._on_request(frames[0], message)

    def _on_request(self, route: bytes, frames: list[bytes]) -> None:
        try:
            request = wire.decode_request(frames)
        except WireVersionError as error:
            self._refuse_frames("requests of wire version", error, f" {error.version}")
            self._router.write(route, wire.encode_answer(wire.WRONG_VERSION, self._receiver.instance, ()))
            return
        except WireError as error:
            self._refuse_frames("requests that are none of ours", error)
            return
        if request.kind == wire.FIGURES:
            self._tell_figures(route, request)
            return
        now = self._now()
        record = self._receiver.request(route, request, now)
        if record is not None:
            self._accept(record, request, now)

    def _tell_figures(self, route: bytes, request: wire.Request) -> None:
        body = wire.encode_body(self.figures(), wire.JSON, self._loop.model.pause)
        frames = wire.encode_answer(wire.REPLY, self._receiver.instance, (request.id,), codec=wire.JSON, body=body)
        self._router.write(route, frames)

    def _accept(self, record: Record, request: wire.Request, now: float) -> None:
        """Choose a listener of its address for a new request, in turn; for a fanout all of them."""
        listeners = self._listeners.get(record.key)
        if not listeners:
            self.refused_at = now
            self._refuse(record, wire.NOT_HERE)
            return
        chosen = self._choose(listeners, record.kind)
        if not chosen:
            self._refuse(record, wire.BUSY)
            return
        self._receiver.accept(record, now)
        for listener in chosen:
            listener.arriving += 1
        self.arrived.append((chosen, record, request))

    def distribute(self, until: float = inf) -> None:
        """Give what was accepted to its listeners: after it was acknowledged, since to decode and begin it takes longest.

        So a sender goes on meanwhile. And native threads that begin with something take the interpreter from the loop at each
        frame that it reads or writes, so they are not to begin while there is more of that.
        """
        arrived, now = self.arrived, self._now()
        decoded: list[Incoming] = []
        while arrived and now <= until:
            decoded += self._decode(*arrived.popleft())
            if arrived:
                now = self._now()
        for incoming in decoded:
            listener = incoming.listener
            listener.take(incoming, now)
            self.due = min(self.due, listener.batches.due)

    def _decode(self, listeners: Sequence[Listener], record: Record, request: wire.Request) -> list[Incoming]:
        """What each of them is to get: its own."""
        if LOG.isEnabledFor(logging.DEBUG):
            LOG.debug("took message %s to %s", wire.message_name(record.sender, record.id), record.key)
        for listener in listeners:
            listener.arriving -= 1
        decoded = []
        try:
            for listener in listeners:
                ctxt, message = wire.decode_body(request.body, request.codec, self._loop.model.pause)
                if not isinstance(message, dict):
                    raise WireError("the body of a request is no message")
                decoded.append(Incoming(listener, record, request.codec, ctxt, message))
        except (WireError, TypeError, ValueError) as error:
            self._bad_body(record, error)
            return []
        return decoded

    def _refuse(self, record: Record, kind: int) -> bool:
        name = wire.message_name(record.sender, record.id)
        LOG.debug("refused message %s to %s: %s", name, record.key, wire.kind_name(kind))
        return self._receiver.refuse(record, kind)

    def _choose(self, listeners: deque[Listener], kind: int) -> Sequence[Listener]:
        """The listeners that are to take a message: for a fanout all or none, else one that has room, in turn."""
        window = self._settings.listener_window
        if len(listeners) == 1:
            return (listeners[0],) if listeners[0].room(window) else ()
        if kind == wire.FANOUT:
            return tuple(listeners) if all(listener.room(window) for listener in listeners) else ()
        for _ in listeners:
            listeners.rotate(-1)
            if listeners[-1].room(window):
                return (listeners[-1],)
        return ()

    def _bad_body(self, record: Record, error: Exception) -> None:
        self._refuse_frames("requests with a bad body", error)
        if record.kind == wire.CALL:
            text = serialize_remote_exception((WireError, WireError(str(error)), None))
            body = wire.encode_body(text, wire.JSON, self._loop.model.pause)
            self._receiver.reply(record, wire.FAILURE, wire.JSON, body)
        else:
            self._receiver.started(record, self._now())

    def _begun(self, record: Record) -> None:
        if record.answer == wire.ACCEPTED:
            self._receiver.started(record, self._now())

    def _too_late(self, record: Record) -> None:
        """It was not begun in time, and its sender is to know."""
        if record.running and not record.forgotten:
            self._refuse(record, wire.GIVEN_BACK)

    def _reply(self, reply: tuple[Record, int, int, list[bytes]], then: Callable[[Exception | None], None]) -> None:
        try:
            self._receiver.reply(*reply)
        finally:
            then(None)

    def _refuse_frames(self, what: str, error: Exception, which: str = "") -> None:
        """Counted, and logged once a minute, whichever it is."""
        self.counts[what + which] += 1
        now = self._now()
        if self._complained.get(what, -inf) + 60 <= now:
            self._complained[what] = now
            LOG.warning("dropped a message (%s%s, %d so far): %s", what, which, self.counts[what + which], error)
