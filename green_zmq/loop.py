# SPDX-License-Identifier: Apache-2.0
"""The one owner of sockets, timers and the mailbox.

Everything here but what is marked runs in the loop's own thread. Sockets are used with NOBLOCK
only, so nothing in it ever waits but :meth:`Poller.wait`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, Final, Protocol, cast

import zmq
from zmq.backend import Socket as _Libzmq

from green_zmq.descriptors import no_descriptors, shortage
from green_zmq.errors import TransportClosed
from green_zmq.executors.base import Event, Model, Poller

LOG = logging.getLogger(__name__)

Socket = zmq.Socket[bytes]
OnMessage = Callable[[list[bytes]], None]

# Messages taken from one socket, and posts from the mailbox, before the others have their turn.
_BURST: Final = 100
# Seconds of reading after which timers, posts and other green threads have their turn, however little was read: a message
# may take a thousand times as long to be dealt with as others do.
READING: Final = 0.02
# After a frame of this size other green threads may run: copying it takes about as long as 50 small messages.
_LARGE: Final = 1 << 18

# The green sockets' own methods look at their state at every operation, for waiters that this loop never has; so it uses
# those of libzmq's binding that they themselves are made of.
_send, _recv = _Libzmq.send, _Libzmq.recv
_get = cast("Callable[[Socket, int], int]", _Libzmq.get)
_EVENTS, _POLLIN, _RCVMORE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.RCVMORE)
_NOBLOCK, _SNDMORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)


# Monitors need an address of their own each, in the context that all loops of the process share.
_monitors = itertools.count()


def _nothing() -> None: ...


class Timed(Protocol):
    """Something with a next thing to do: ``tick`` is called when ``due``, a monotonic time, has come."""

    @property
    def due(self) -> float: ...

    def tick(self, now: float) -> None: ...


class _Contexts:
    """The ZeroMQ contexts of this process: one for each model, made when first used and ended with the last loop."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[zmq.Context[Any], int]] = {}
        self._inherited: list[object] = []

    def after_fork(self) -> None:
        """A parent's context is of no use in its child, and must not be ended there either."""
        self._inherited.append(self._open)
        self._open = {}

    def take(self, model: Model) -> zmq.Context[Any]:
        context, users = self._open.get(model.NAME, (None, 0))
        if context is None:
            context = model.Context()
            # 1,023 by default; a process has two for each of its peers. What the descriptors allow is the limit.
            context.set(zmq.MAX_SOCKETS, context.get(zmq.SOCKET_LIMIT))
        self._open[model.NAME] = (context, users + 1)
        return context

    def give_back(self, model: Model) -> zmq.Context[Any] | None:
        """The context if nobody uses it any more: then the caller must end it, off the hub."""
        context, users = self._open.pop(model.NAME)
        if users == 1:
            return context
        self._open[model.NAME] = (context, users - 1)
        return None


contexts = _Contexts()


class Loop:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.timed: list[Timed] = []
        # Called after each round, to write what it decided.
        self.settle: Callable[[], None] = lambda: None
        # Whether there is nothing to be written or told.
        self.is_settled: Callable[[], bool] = lambda: True
        # Called with the reason when the loop must end because of a defect, or cannot begin.
        self.on_crash: Callable[[str], None] | None = None
        self._mailbox: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._later: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._poller: Poller | None = None
        self._own: object = None
        self._sleeping = False
        # Until then, if nothing happens before.
        self._due = inf
        self._stopping = False
        self._started = False
        self._context: zmq.Context[Any] | None = None
        self._ended: list[Event] = []
        self._over = False
        self._ended_already = False
        self._handlers: dict[Socket, OnMessage] = {}
        self._routed: set[Socket] = set()
        # Those that may have something to be read, and those that were written to since that was looked at.
        self._touched: dict[Socket, None] = {}
        self._sent: dict[Socket, None] = {}

    # For all threads.

    def start(self) -> None:
        """With the model's lock held."""
        self._context = contexts.take(self.model)
        self._started = True
        self.model.spawn(self._run)

    def post(self, fn: Callable[..., object], *arguments: Any) -> None:
        """Have ``fn`` called by the loop, with these arguments.

        :raises TransportClosed: it has ended.
        """
        self._mailbox.append((fn, arguments))
        if self._over:
            raise TransportClosed("The transport was closed.")
        if self._sleeping:
            try:
                self._sleeping = False
                poller = self._poller
                if poller is not None:
                    poller.wake()
            except BaseException:  # raised in this thread by another, or by a signal: others rely on this wake
                self._wake()
                raise

    def _wake(self) -> None:
        poller = self._poller
        if poller is not None:
            poller.wake()

    def call(self, fn: Callable[..., object], *arguments: Any) -> bool:
        """Call ``fn`` at once, here, if the loop rests; whether it did. So a thread less is to be woken, or to be switched to.

        Many cost less together, so this is for one that comes alone. ``fn`` must neither wait nor log, or other green threads
        could come in between. A native thread may be ended by an exception at any step of it; its caller mends what is left.
        """
        poller = self._poller
        if not self._sleeping or poller is None or not poller.is_here():
            return False
        try:
            poller.lock.acquire()
            rests = self._sleeping
            if rests:
                self._sleeping = False  # what comes in between, from a finalizer maybe, is for the mailbox
                fn(*arguments)
                self._sleeping = True  # as in _turn(), before the mailbox is looked at: other native threads post as well
                if self._mailbox or not self._may_rest():
                    self._sleeping = False
                    poller.wake()
            poller.lock.release()
        except BaseException:
            self._sleeping = False
            with contextlib.suppress(RuntimeError):  # it was not taken yet, or is given back already
                poller.lock.release()
            self._wake()
            raise
        return rests

    def _may_rest(self) -> bool:
        """Whether what was done at once leaves nothing for the loop to do, or to do earlier."""
        for timed in self.timed:
            if timed.due < self._due:
                return False
        self._look()
        return not self._touched and self.is_settled()

    def _look(self) -> None:
        """Find out where something has arrived whose edge a send took."""
        sent = self._sent
        for socket in sent:
            if _get(socket, _EVENTS) & _POLLIN:
                self._touched[socket] = None
        sent.clear()

    def is_mine(self) -> bool:
        """Whether it is the loop itself that asks, and so must not wait for it."""
        return self.model.current() == self._own

    def post_lazily(self, fn: Callable[..., object], *arguments: Any) -> None:
        """As :meth:`post`, but it can wait for whatever else wakes the loop."""
        self._later.append((fn, arguments))

    def join(self) -> None:
        """Wait until the loop has ended and its sockets have sent what they had, or had no more time to."""
        if not self._started:
            return
        ended = self.model.Event()
        self._ended.append(ended)
        if self._ended_already:
            self._tell()
        ended.wait()

    def abandon(self) -> None:
        """In a forked child: this is the parent's loop, and its sockets and descriptors must not be touched."""
        self._stopping = self._over = True
        if self._poller is not None:
            self._poller.abandon()
            self._poller = None

    # For the loop's thread.

    def open(self, kind: zmq.SocketType, on_message: OnMessage) -> Socket:
        """A socket of the model; it is watched once :meth:`watch` is called, when its options are set."""
        assert self._context is not None
        socket: Socket = self._context.socket(kind)
        self._handlers[socket] = on_message
        if kind == zmq.ROUTER:
            self._routed.add(socket)
        return socket

    def monitor(self, socket: Socket, events: int, on_message: Callable[[Socket, list[bytes]], None]) -> Socket:
        """A socket that gets the events of another one; it is watched as others are."""
        address = f"inproc://green_zmq/monitor/{next(_monitors)}"
        socket.monitor(address, events)
        monitor = self.open(zmq.PAIR, lambda frames: on_message(monitor, frames))
        monitor.set(zmq.RCVHWM, 1)  # libzmq's own end holds a thousand events
        monitor.connect(address)
        return monitor

    def watch(self, socket: Socket) -> None:
        assert self._poller is not None
        self._poller.register(socket)
        self._touched[socket] = None

    def close(self, socket: Socket, linger: float) -> None:
        """Close a socket; what it still has to send may take so many seconds in the background."""
        if self._handlers.pop(socket, None) is None:
            return
        self._touched.pop(socket, None)
        self._sent.pop(socket, None)
        self._routed.discard(socket)
        if self._poller is not None:
            with contextlib.suppress(KeyError):
                self._poller.unregister(socket)
        socket.close(linger=int(linger * 1000))

    def send(self, socket: Socket, frames: Sequence[bytes]) -> bool:
        """Whether libzmq took it; a ROUTER takes nothing for a connection that is gone or does not read."""
        self._sent[socket] = None
        try:
            for frame in frames[:-1]:
                _send(socket, frame, _SNDMORE)
                if len(frame) > _LARGE:
                    self.model.pause()
            frame = frames[-1]
            _send(socket, frame, _NOBLOCK)
            if len(frame) > _LARGE:
                self.model.pause()
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def read(self, socket: Socket, most: int, until: float = inf) -> bool:
        """Hand up to so many messages to the socket's handler, until that time; whether there may be more.

        Most often there is one, or there are many. To be told that there is no more takes half as long as to find that out by
        an error, and twice as long as to read another one.
        """
        handlers = self._handlers
        routed = socket in self._routed
        first = True
        while socket in handlers:
            try:
                # Behind a routing id there is always another frame, so that need not be asked.
                frames = [_recv(socket, _NOBLOCK), _recv(socket, _NOBLOCK)] if routed else [_recv(socket, _NOBLOCK)]
            except zmq.Again:
                break
            while _get(socket, _RCVMORE):
                if len(frames[-1]) > _LARGE:
                    self.model.pause()
                frames.append(_recv(socket, _NOBLOCK))
            handlers[socket](frames)
            most -= 1
            if not most or time.monotonic() > until:
                return True
            if first:
                if socket not in handlers or not _get(socket, _EVENTS) & _POLLIN:
                    break
                first = False
        return False

    def finish(self) -> None:
        """End the loop after this round."""
        self._stopping = True

    def _run(self) -> None:
        self._own = self.model.current()
        try:
            try:
                poller = self._poller = self.model.Poller()
            except OSError as error:  # there were enough descriptors just before
                reason = shortage() or no_descriptors(error.errno)
                LOG.error("a transport cannot begin its work: %s", reason)
                if self.on_crash is not None:
                    self.on_crash(reason)
                return
            self._turn(poller)
        except BaseException as error:
            if not self._over:
                LOG.critical("the loop of a transport ended because of a defect: %s", error, exc_info=True)
                if self.on_crash is not None:
                    self.on_crash("the transport was closed")
            raise
        finally:
            self._end()

    def _turn(self, poller: Poller) -> None:  # noqa: C901 (one loop, in one piece: nothing of it makes sense alone)
        mailbox, touched = self._mailbox, self._touched
        while not self._stopping:
            while self._later:
                mailbox.append(self._later.popleft())
            for _ in range(min(len(mailbox), _BURST)):
                fn, arguments = mailbox.popleft()
                fn(*arguments)
            fn, arguments = _nothing, ()  # or the last one, a large message maybe, would be kept until the next comes
            if self._sent:
                self._look()
            if touched:
                until = time.monotonic() + READING
                for socket in list(touched):
                    if time.monotonic() > until:
                        break  # those that are left are the first the next time
                    touched.pop(socket, None)
                    if self.read(socket, _BURST, until):
                        touched[socket] = None
            self.settle()
            now = time.monotonic()
            due = inf
            for timed in self.timed:
                if timed.due < due:
                    due = timed.due
            if due <= now:
                self._tick(now)
                continue
            if self._sent:
                self._look()
            self._due = due
            # From here on whoever posts wakes us; what was posted before is seen by the test.
            self._sleeping = True
            if mailbox or touched or self._later or self._stopping:
                self._sleeping = False
                timeout: float | None = 0
            else:
                timeout = None if due == inf else max(0, due - now)
            fired = poller.wait(timeout)
            self._sleeping = False
            for socket in fired:
                touched[socket] = None

    def _tick(self, now: float) -> None:
        for timed in self.timed:
            if timed.due <= now:
                timed.tick(now)
        self.settle()
        if self._poller is not None and not self._stopping:
            # Something may be due again at once for as long as it likes; others are to have their turn.
            self._touched.update(dict.fromkeys(self._poller.wait(0)))

    def _end(self) -> None:
        if self._over:
            return
        self._over = True
        self._sleeping = False
        for posts in (self._later, self._mailbox):  # whoever posted before that is told by what was posted
            while posts:
                fn, arguments = posts.popleft()
                fn(*arguments)
        for socket in list(self._handlers):
            self.close(socket, 0)
        with self.model.LOCK:
            context = contexts.give_back(self.model)
        poller = self._poller
        if poller is not None:
            if context is not None:
                self._terminate(context, poller)
            self._poller = None
            poller.close()
        self._tell()

    def _terminate(self, context: zmq.Context[Any], poller: Poller) -> None:
        """Ending a context blocks until its sockets have lingered, even in a green model; so a native thread does it."""
        ended = []

        def terminate() -> None:
            context.term()
            ended.append(True)
            poller.wake()

        self.model.start_native(terminate)
        while not ended:
            poller.wait(None)

    def _tell(self) -> None:
        self._ended_already = True
        while self._ended:
            self._ended.pop().set()
