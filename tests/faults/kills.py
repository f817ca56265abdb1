# SPDX-License-Identifier: Apache-2.0
"""In a worker: threads that are killed wherever they are in a call."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import random
import sys
import threading
import time
from collections import Counter
from typing import Any

import oslo_messaging

from tests.contract import models
from tests.contract.models import spawn, wait_until
from tests.contract.scenarios import leftovers, resources, transport

TAG = "killed"
# Threads that are in a call at the same time.
_AT_ONCE = 32


class Killed(BaseException):
    pass


class _Calls:
    def __init__(self, url: str, topic: str, silent: str, timeout: float) -> None:
        """:param silent: a topic that nobody serves."""
        self.url = url
        opened = transport(url, TAG)
        self.answered = oslo_messaging.get_rpc_client(opened, oslo_messaging.Target(topic=topic), timeout=60)
        self.unanswered = oslo_messaging.get_rpc_client(opened, oslo_messaging.Target(topic=silent), timeout=timeout)
        self.ended: Counter[str] = Counter()

    def call(self, number: int) -> None:
        """To a server that answers, or to nobody."""
        try:
            (self.answered, self.unanswered)[number % 2].call({}, "echo", value=number)
            self.ended["answered"] += 1
        except BaseException as error:
            self.ended[type(error).__name__] += 1

    def over(self) -> None:
        """Nothing of them is left, and further calls are answered."""
        for number in range(20):
            assert self.answered.call({}, "echo", value=number) == number
        idle = {"reply bytes": 0}
        wait_until(lambda: not any({**leftovers(self.url, TAG), **idle}.values()), what=f"{leftovers(self.url, TAG)}")

    def result(self) -> dict[str, Any]:
        return {"ended": dict(self.ended), "counts": transport(self.url, TAG)._driver.counts(), "resources": resources()}


_calls: _Calls


def begin(url: str, topic: str, silent: str, timeout: float) -> None:
    global _calls
    _calls = _Calls(url, topic, silent, timeout)
    _calls.over()


def kill_green_threads(count: int) -> dict[str, Any]:
    """Half are killed after a few steps of the hub, half by a timeout of their own."""

    def limited(number: int) -> None:
        try:
            with _green_timeout(0.001 * (number % 7)):
                _calls.call(number)
        except BaseException as error:  # it came when the call had ended
            _calls.ended[type(error).__name__] += 1

    for number in range(count):
        if number % 4 < 2:
            thread = spawn(_calls.call, number)
            for _ in range(number % 5):
                models.sleep(0)
            _kill(thread)
        else:
            spawn(limited, number)
        if number % 50 == 0:
            models.sleep(0.01)
    _calls.over()
    return _calls.result()


def _kill(thread: Any) -> None:
    if models.name == "gevent":
        thread.kill(block=False)
    else:
        thread.kill()


def _green_timeout(seconds: float) -> Any:
    if models.name == "gevent":
        import gevent

        return gevent.Timeout(seconds)
    import eventlet

    return eventlet.Timeout(seconds)


def kill_native_threads(count: int) -> dict[str, Any]:
    """An exception is raised in each, wherever it is; one that waits for a lock gets it when it has that."""
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    left = iter(range(count))
    # An identity is given to another thread once its own has ended; that one is not to be hit while it is only starting.
    identities = threading.Lock()

    def kill_some() -> None:
        while True:
            with identities:
                number = next(left, None)
                if number is None:
                    return
                thread = threading.Thread(target=_calls.call, args=(number,))
                thread.start()
            thread.join(random.uniform(0, 0.004))
            with identities:
                if thread.is_alive():
                    raise_in(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Killed))
            thread.join(60)
            assert not thread.is_alive()

    killers = [threading.Thread(target=kill_some) for _ in range(_AT_ONCE)]
    for killer in killers:
        killer.start()
    for killer in killers:
        killer.join()
    _calls.over()
    return _calls.result()


def kill_at_each_step(*, fanout: bool = False) -> dict[str, Any]:
    """A call is interrupted at its first step in the driver, the next one at its second, and so on until one is not.

    :param fanout: it is a fanout.
    """
    client = _calls.answered
    engine = transport(_calls.url, TAG)._driver._engine
    loop = engine._loop
    everybody = client.prepare(fanout=True)
    slowest = 0.0

    for step in itertools.count(1):
        left = step

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal left
            if "/green_zmq/" not in frame.f_code.co_filename:
                return None
            left -= 1
            if not left:
                raise Killed
            return trace

        def call(value: int = step) -> None:
            sys.settrace(trace)
            if not fanout:
                _calls.call(0)
                return
            with contextlib.suppress(Killed):
                everybody.cast({}, "note", value=value)

        wait_until(lambda: loop._sleeping)
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(60)
        began = time.monotonic()
        assert client.call({}, "echo", value=step) == step
        slowest = max(slowest, time.monotonic() - began)
        if left > 0:
            break
    wait_until(lambda: not engine._sender.requests)
    _calls.over()
    return {**_calls.result(), "steps": step, "slowest": slowest}
