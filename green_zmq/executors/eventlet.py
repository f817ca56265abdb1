# SPDX-License-Identifier: Apache-2.0
"""Eventlet: green threads, and ``eventlet.green.zmq`` sockets.

Such a socket listens to its descriptor in the hub. A second listener would lose wake-ups, since each reads
``zmq.EVENTS`` and so takes the edge from the other; therefore the poller puts its own in the place of the socket's. The
loop then uses the socket without ever blocking on it, straight through libzmq.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from math import inf
from time import monotonic
from typing import Any

import eventlet
import zmq
from eventlet import hubs, patcher
from eventlet.green import zmq as green_zmq
from eventlet.support import greenlets

from green_zmq.executors.base import SLACK
from green_zmq.executors.workers import Workers

NAME = "eventlet"
Context = green_zmq.Context

_native = patcher.original("threading")
LOCK = _native.Lock()


class _Callers:
    """Runs functions in a hub: on behalf of other native threads, since nothing of eventlet's own wakes a hub from outside; or
    of the hub's own thread, several with one timer or none, since one costs more than most of them.
    """

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._soon: deque[Callable[[], None]] = deque()
        self._gathers = False
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._calls: deque[Callable[[], None]] = deque()
        hub.add(hub.READ, self._fd, self._run, lambda _: None, lambda: None)

    @classmethod
    def of(cls, hub: Any) -> _Callers:
        """The one of that hub, made in its own thread."""
        callers: _Callers | None = getattr(hub, "green_zmq_callers", None)
        if callers is None:
            callers = hub.green_zmq_callers = cls(hub)
        return callers

    def call(self, fn: Callable[[], None]) -> None:
        self._calls.append(fn)
        os.eventfd_write(self._fd, 1)

    def call_soon(self, fn: Callable[[], None]) -> None:
        """In the hub's thread: after those that run already."""
        self._soon.append(fn)
        if len(self._soon) == 1 and not self._gathers:
            self._hub.schedule_call_global(0, self._run_soon)

    def resume(self, greenlet: Any) -> None:
        """In the hub: have a greenlet run until it waits, and then what it wants to be called soon."""
        self._gathers = True
        try:
            greenlet.switch()
        finally:
            self._gathers = False
            if self._soon:
                self._run_soon()

    def _run_soon(self) -> None:
        fns = self._soon
        self._soon = deque()
        try:
            while fns:
                try:
                    fns.popleft()()
                except self._hub.SYSTEM_EXCEPTIONS:
                    raise
                except BaseException:  # as for a timer: it takes away nothing from the others, nor from who called this
                    self._hub.squelch_generic_exception(sys.exc_info())
        finally:
            for fn in fns:
                self.call_soon(fn)

    def _run(self, fd: int) -> None:
        # A process that forked after eventlet made its hub shares the epoll descriptor with its child, and sees its events.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        while self._calls:
            self._calls.popleft()()

    def __del__(self) -> None:
        os.close(self._fd)


class Event:
    """Happens in any thread; the green thread that waits is resumed in the hub of its own."""

    __slots__ = ("_callers", "_done", "_hub", "_waiter")

    def __init__(self) -> None:
        self._done = False
        self._hub = hubs.get_hub()
        self._callers = _Callers.of(self._hub)
        self._waiter: Any = None

    def set(self) -> None:
        self._done = True
        if hubs.get_hub() is not self._hub:
            self._callers.call(self._resume)
        elif self._waiter is not None:
            self._callers.call_soon(self._resume)

    def wait(self) -> None:
        if self._done:
            return
        self._waiter = greenlets.getcurrent()
        try:
            self._hub.switch()
        finally:
            # One that is killed here waits for something else when the event happens: it must not be resumed then.
            self._waiter = None

    def _resume(self) -> None:
        if self._waiter is not None:
            self._waiter.switch()


class Poller:
    def __init__(self) -> None:
        self._hub = hubs.get_hub()
        self._thread = _native.get_native_id()
        self._callers = _Callers.of(self._hub)
        self._greenlet = greenlets.getcurrent()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._fired: set[zmq.Socket[bytes]] = set()
        self._woken = False
        self._waiting = False
        # Armed for this time; it may be earlier than the wait in hand needs, which only makes that end early.
        self._armed = inf
        self.lock = native_owned_lock()
        self._timer: Any = None

    def register(self, socket: Any) -> None:
        fd = socket.fileno()
        self._hub.remove(socket._eventlet_listener)
        socket.__dict__["_eventlet_listener"] = self._hub.add(self._hub.READ, fd, self._ready, lambda _: None, lambda: None)
        self._sockets[fd] = socket

    def unregister(self, socket: Any) -> None:
        self._hub.remove(socket._eventlet_listener)
        socket.__dict__["_eventlet_listener"] = None
        del self._sockets[socket.fileno()]
        self._fired.discard(socket)

    def wait(self, timeout: float | None) -> Collection[zmq.Socket[bytes]]:
        self._waiting = True
        try:
            if self._woken or self._fired or timeout == 0:
                self._hub.schedule_call_global(0, self._resume)
            elif timeout is not None and (until := monotonic() + timeout) < self._armed - SLACK:
                if self._timer is not None:
                    self._timer.cancel()
                self._armed = until
                self._timer = self._hub.schedule_call_global(timeout, self._on_time)
            self._hub.switch()
        finally:
            self._waiting = False
        self._woken = False
        fired, self._fired = self._fired, set()
        return fired

    def wake(self) -> None:
        if _native.get_native_id() != self._thread:  # which may have no hub, nor a descriptor for one
            self._woken = True
            self._callers.call(self._resume)
        elif not self._woken:
            self._woken = True
            if self._waiting:
                self._hub.schedule_call_global(0, self._resume)

    def is_here(self) -> bool:
        return bool(_native.get_native_id() == self._thread)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def abandon(self) -> None:
        """It goes with the parent's hub, see :func:`after_fork`."""

    def _ready(self, fd: int) -> None:
        socket = self._sockets.get(fd)
        if socket is None:
            return  # unregistered by what the hub ran just before
        first = not self._fired and self._waiting
        self._fired.add(socket)
        if first and self._others_are_due():
            self._hub.schedule_call_global(0, self._resume)
        elif first:
            self._resume()

    def _others_are_due(self) -> bool:
        """Whether the hub has anybody else to run now: more may have arrived when they have, and is read together with this."""
        hub = self._hub
        return bool(hub.next_timers) or (hub.sleep_until() or inf) <= hub.clock()

    def _on_time(self) -> None:
        self._armed, self._timer = inf, None
        self._resume()

    def _resume(self) -> None:
        if self._waiting:
            self._waiting = False
            self._callers.resume(self._greenlet)


def spawn(fn: Callable[[], None]) -> None:
    """In the main thread a green thread; from one that may end before the process, a native thread with its own hub."""
    if _native.get_native_id() == os.getpid():
        eventlet.spawn_n(fn)
    else:
        start_native(fn)


def start_native(fn: Callable[[], None]) -> None:
    def run() -> None:
        try:
            fn()
        finally:
            # If it used patched modules, it has a hub of its own, which holds a descriptor.
            hub = getattr(hubs._threadlocal, "hub", None)
            if hub is not None and hub.running:
                hub.abort(wait=True)
            close = getattr(getattr(hub, "poll", None), "close", None)
            if close is not None:
                close()

    _native.Thread(target=run, daemon=True).start()


Executor = partial(Workers, eventlet.spawn, Event)
current = greenlets.getcurrent
native_lock = _native.Lock
native_owned_lock = _native.RLock
native_poll = patcher.original("select").poll
native_sleep = patcher.original("time").sleep
native_socket = patcher.original("socket").socket


def wait_readable(fd: int, seconds: float) -> None:
    with eventlet.Timeout(seconds, False):
        hubs.trampoline(fd, read=True)


def pause() -> None:
    eventlet.sleep(0)


def after_fork() -> None:
    # The epoll descriptor is shared with the parent: what the child adds or removes there, the parent's hub sees.
    hubs.use_hub()
    global LOCK
    LOCK = _native.Lock()
