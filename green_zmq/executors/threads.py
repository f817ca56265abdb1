# SPDX-License-Identifier: Apache-2.0
"""Native threads."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

import zmq

NAME = "threads"
Context = zmq.Context
LOCK = threading.Lock()


class Event:
    """A lock that is taken until the event happens: half the price of ``threading.Event``."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        if self._lock.locked():
            self._lock.release()

    def wait(self) -> None:
        self._lock.acquire()


class Poller:
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self.lock = native_owned_lock()
        self.lock.acquire()
        self._main = threading.main_thread().ident

    def register(self, socket: zmq.Socket[bytes]) -> None:
        fd = socket.fileno()
        self._sockets[fd] = socket
        self._epoll.register(fd, select.EPOLLIN)

    def unregister(self, socket: zmq.Socket[bytes]) -> None:
        fd = socket.fileno()
        del self._sockets[fd]
        self._epoll.unregister(fd)

    def wait(self, timeout: float | None) -> Collection[zmq.Socket[bytes]]:
        fired = []
        self.lock.release()
        try:
            events = self._epoll.poll(timeout)
        finally:
            self.lock.acquire()
        for fd, _ in events:
            if fd == self._wake:
                os.eventfd_read(fd)
            else:
                fired.append(self._sockets[fd])
        return fired

    def wake(self) -> None:
        os.eventfd_write(self._wake, 1)

    def is_here(self) -> bool:
        # Not in the main thread: handlers of signals run there, at any time, and may wait for the loop.
        return threading.get_ident() != self._main

    def close(self) -> None:
        self._epoll.close()
        self.lock.release()  # whoever has waited for it finds that the loop does not rest

    def __del__(self) -> None:
        # Not before: another thread may be about to wake it, and would write to whatever has that descriptor then.
        os.close(self._wake)

    def abandon(self) -> None:
        """No thread of the child looks at it."""


def spawn(fn: Callable[[], None]) -> None:
    threading.Thread(target=fn, name="green_zmq loop", daemon=True).start()


def start_native(fn: Callable[[], None]) -> None:
    threading.Thread(target=fn, name="green_zmq directory", daemon=True).start()


Executor = ThreadPoolExecutor
current = threading.get_ident
native_lock = threading.Lock
native_owned_lock = threading.RLock
native_poll = select.poll
native_sleep = time.sleep
native_socket = socket.socket


def wait_readable(fd: int, seconds: float) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll(seconds * 1000)


def pause() -> None:
    """Native threads run by themselves."""


def after_fork() -> None:
    global LOCK
    LOCK = threading.Lock()
