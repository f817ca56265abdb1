# SPDX-License-Identifier: Apache-2.0
"""Gevent: greenlets, and ``zmq.green`` sockets.

A ``zmq.green`` socket watches its descriptor in the hub. A second watcher would lose wake-ups, since each reads
``zmq.EVENTS`` and so takes the edge from the other; therefore the poller makes the socket's own watcher call *it*. The
loop then uses the socket without ever blocking on it, straight through libzmq.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from math import inf
from time import monotonic
from typing import Any

import gevent
import gevent.monkey
import gevent.socket
import zmq
import zmq.green
from gevent._hub_local import get_hub_if_exists
from gevent.hub import get_hub

from green_zmq.executors.base import SLACK
from green_zmq.executors.workers import Workers

NAME = "gevent"
Context = zmq.green.Context

_start_new_thread = gevent.monkey.get_original("_thread", "start_new_thread")
_get_ident = gevent.monkey.get_original("_thread", "get_ident")
_allocate_lock = gevent.monkey.get_original("_thread", "allocate_lock")
_allocate_owned_lock = gevent.monkey.get_original("_thread", "RLock")
LOCK = _allocate_lock()


class _Keeper:
    """Keeps a hub running while its greenlets wait for what happens in other threads: it would end with LoopExit."""

    def __init__(self, hub: Any) -> None:
        self._watcher = hub.loop.async_()
        self._waiting = 0

    @classmethod
    def of(cls, hub: Any) -> _Keeper:
        keeper: _Keeper | None = getattr(hub, "green_zmq_keeper", None)
        if keeper is None:
            keeper = hub.green_zmq_keeper = cls(hub)
        return keeper

    def __enter__(self) -> None:
        self._waiting += 1
        if self._waiting == 1:
            self._watcher.start(_nothing)

    def __exit__(self, *_: object) -> None:
        self._waiting -= 1
        if not self._waiting:
            self._watcher.stop()


def _nothing() -> None: ...


class Event:
    """Happens in any thread; the greenlet that waits is resumed in the hub of its own."""

    __slots__ = ("_done", "_hub", "_waiter")

    def __init__(self) -> None:
        self._done = False
        self._hub = get_hub()
        self._waiter: Any = None

    def set(self) -> None:
        self._done = True
        if get_hub() is not self._hub:
            self._hub.loop.run_callback_threadsafe(self._resume)
        elif self._waiter is not None:
            self._hub.loop.run_callback(self._resume)

    def wait(self) -> None:
        if self._done:
            return
        self._waiter = gevent.getcurrent()
        try:
            with _Keeper.of(self._hub):
                self._hub.switch()
        finally:
            # One that is killed here waits for something else when the event happens: it must not be resumed then.
            self._waiter = None

    def _resume(self) -> None:
        if self._waiter is not None:
            self._waiter.switch()


class Poller:
    def __init__(self) -> None:
        self._hub = get_hub()
        self._thread = _get_ident()
        self._greenlet = gevent.getcurrent()
        self._sockets: set[Any] = set()
        self._fired: set[zmq.Socket[bytes]] = set()
        self._woken = False
        self._waiting = False
        # Armed for this time; it may be earlier than the wait in hand needs, which only makes that end early.
        self._armed = inf
        self.lock = native_owned_lock()
        self._timer = self._hub.loop.timer(0)
        self._at_once = self._hub.loop.timer(0)
        self._others = self._hub.loop.async_()
        self._others.start(self._resume)

    def register(self, socket: Any) -> None:
        socket._state_event.stop()
        socket._state_event.start(self._ready, socket)
        self._sockets.add(socket)

    def unregister(self, socket: Any) -> None:
        socket._state_event.stop()
        self._sockets.discard(socket)
        self._fired.discard(socket)

    def wait(self, timeout: float | None) -> Collection[zmq.Socket[bytes]]:
        self._waiting = True
        try:
            if self._woken or self._fired or timeout == 0:
                # Not a callback: gevent runs up to 50 of those before it looks at timers and descriptors.
                self._at_once.start(self._resume)
            elif timeout is not None and (until := monotonic() + timeout) < self._armed - SLACK:
                self._arm(until, timeout)
            self._hub.switch()
        finally:
            self._waiting = False
        self._woken = False
        fired, self._fired = self._fired, set()
        return fired

    def wake(self) -> None:
        if _get_ident() != self._thread:  # which may have no hub, nor a descriptor for one: libev ends the process then
            self._woken = True
            self._others.send_ignoring_arg(None)
        elif not self._woken:
            self._woken = True
            if self._waiting:
                self._hub.loop.run_callback(self._resume)

    def is_here(self) -> bool:
        return bool(_get_ident() == self._thread)

    def close(self) -> None:
        self._timer.close()
        self._at_once.close()
        self._others.close()

    def abandon(self) -> None:
        # The child's hub has the parent's watchers, and would take the parent's edges.
        for socket in self._sockets:
            socket._state_event.stop()
        self._waiting = False
        self._others.stop()
        self._timer.stop()
        self._at_once.stop()

    def _ready(self, socket: zmq.Socket[bytes]) -> None:
        if not self._fired and self._waiting:
            self._hub.loop.run_callback(self._resume)
        self._fired.add(socket)

    def _arm(self, until: float, timeout: float) -> None:
        self._armed = until
        self._timer.close()
        self._timer = self._hub.loop.timer(timeout)
        self._timer.start(self._on_time, update=True)  # the hub's own idea of now is as old as its last iteration

    def _on_time(self) -> None:
        self._armed = inf
        self._resume()

    def _resume(self) -> None:
        if self._waiting:
            self._waiting = False
            self._greenlet.switch()


def spawn(fn: Callable[[], None]) -> None:
    """In the main thread a greenlet; from a thread that may end before the process, a native thread with its own hub."""
    if get_hub().main_hub:
        gevent.spawn(fn)
    else:
        start_native(fn)


def start_native(fn: Callable[[], None]) -> None:
    def run() -> None:
        try:
            fn()
        finally:
            # If it used patched modules, it has a hub of its own, which holds descriptors.
            hub = get_hub_if_exists()
            if hub is not None:
                hub.destroy(destroy_loop=True)

    _start_new_thread(run, ())


Executor = partial(Workers, gevent.spawn, Event)
current = gevent.getcurrent
native_lock = _allocate_lock
native_owned_lock = _allocate_owned_lock
native_poll = gevent.monkey.get_original("select", "poll")
native_sleep = gevent.monkey.get_original("time", "sleep")
native_socket = gevent.monkey.get_original("socket", "socket")


def wait_readable(fd: int, seconds: float) -> None:
    with gevent.Timeout(seconds, False):
        gevent.socket.wait_read(fd)


def pause() -> None:
    # Not 0: gevent runs up to 50 such callbacks before it looks at timers and descriptors.
    gevent.sleep(1e-6)


def after_fork() -> None:
    gevent.reinit()
    global LOCK
    LOCK = _allocate_lock()
