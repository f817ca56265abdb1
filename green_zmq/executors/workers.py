# SPDX-License-Identifier: Apache-2.0
"""What runs the messages of oslo.messaging's servers in a green model, at the price of a switch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from green_zmq.executors.base import Event


class Workers(Executor):
    """At most so many green threads, all of one hub; the rest waits in line.

    Those that have nothing to do are kept. One that begins takes memory from the system, and one that ends gives it back; and
    eventlet looks at all native threads for one that it has not seen yet, whenever that makes a thread object.
    """

    def __init__(self, spawn: Callable[[Callable[[], None]], object], event: type[Event], max_workers: int = 64) -> None:
        self._spawn = spawn
        self._event = event
        self._most = max_workers
        self._line: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = deque()
        # Those that run something, or were called to.
        self._running = 0
        # What wakes each of the others.
        self._resting: list[Event] = []
        self._closed = False
        self._ended: list[Event] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._closed:
            raise RuntimeError("the executor was shut down")
        future: Future[Any] = Future()
        self._line.append((future, fn, args, kwargs))
        self._call()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """From any thread."""
        self._closed = True
        if cancel_futures:
            while self._line:
                self._line.popleft()[0].cancel()
        self._dismiss()
        if wait:
            ended = self._event()
            self._ended.append(ended)
            self._tell()
            ended.wait()

    def _call(self) -> None:
        """Have another one look at the line, unless enough do."""
        if self._running < self._most:
            self._running += 1
            if self._resting:
                self._resting.pop().set()
            else:
                self._spawn(self._work)

    def _dismiss(self) -> None:
        while self._resting:
            self._running += 1
            self._resting.pop().set()

    def _tell(self) -> None:
        if not self._running:
            while self._ended:
                self._ended.pop().set()

    def _work(self) -> None:
        try:
            while True:
                while self._line:
                    self._run(*self._line.popleft())
                if self._closed:
                    return
                self._rest()
        finally:
            self._running -= 1
            if self._line:  # it was killed
                self._call()
            self._tell()

    def _rest(self) -> None:
        event = self._event()
        self._resting.append(event)
        self._running -= 1
        if self._closed:  # by another native thread, just now
            self._dismiss()
        try:
            event.wait()
        except BaseException:  # it was killed
            if event in self._resting:
                self._resting.remove(event)
                self._running += 1
            raise

    @staticmethod
    def _run(future: Future[Any], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = fn(*args, **kwargs)
        except BaseException as error:
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            future.set_result(result)
