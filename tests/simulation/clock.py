# SPDX-License-Identifier: Apache-2.0
"""Simulated time, in which everything happens in one order that a seed decides, and threads that wait in it."""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Any
from weakref import WeakSet

from greenlet import getcurrent, greenlet


class Clock:
    """
    :ivar now: seconds.
    :ivar digest: of everything that was noted: two runs that differ anywhere differ in it.
    :ivar notes: the latest of what was noted, to be read when something is wrong.
    """

    def __init__(self, seed: int) -> None:
        self.now = 1000.0
        self.random = Random(seed)
        self.digest = 0
        self.notes: deque[str] = deque(maxlen=100_000)
        self._queue: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._numbers = count()
        self._hub = getcurrent()
        self._threads: WeakSet[greenlet] = WeakSet()

    def time(self) -> float:
        return self.now

    def note(self, text: str) -> None:
        """Something that happened. All simulated processes have the pid of the real one, which differs from run to run."""
        line = f"{self.now:.6f} {text}".replace(f"pid {os.getpid()}", "pid 1")
        self.notes.append(line)
        self.digest = zlib.crc32(line.encode(), self.digest)

    def at(self, when: float, fn: Callable[..., Any], *args: Any) -> None:
        heappush(self._queue, (when, next(self._numbers), fn, args))

    def after(self, delay: float, fn: Callable[..., Any], *args: Any) -> None:
        self.at(self.now + delay, fn, *args)

    def run(self, until: float) -> None:
        """Let everything happen that does until then."""
        queue = self._queue
        while queue and queue[0][0] <= until:
            when, _, fn, args = heappop(queue)
            self.now = max(self.now, when)
            fn(*args)
        self.now = until

    def spawn(self, fn: Callable[..., None], *args: Any) -> greenlet:
        """A thread."""
        thread = greenlet(fn, self._hub)
        self._threads.add(thread)
        self.after(0, thread.switch, *args)
        return thread

    def end(self) -> None:
        """End the threads that still wait: they would keep a whole world in memory."""
        for thread in list(self._threads):
            thread.throw()

    def sleep(self, seconds: float) -> None:
        """In a thread."""
        self.after(seconds, getcurrent().switch)
        self._hub.switch()

    def wait(self) -> None:
        """In a thread: until somebody switches to it."""
        self._hub.switch()


class Event:
    """What a concurrency model has to wait for."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._set = False
        self._waiting: list[greenlet] = []

    def set(self) -> None:
        self._set = True
        for thread in self._waiting:
            self._clock.after(0, thread.switch)
        self._waiting.clear()

    def wait(self) -> None:
        if not self._set:
            self._waiting.append(getcurrent())
            self._clock.wait()
