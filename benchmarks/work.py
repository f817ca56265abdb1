# SPDX-License-Identifier: Apache-2.0
"""What the processes of the benchmarks do, besides what those of ``green-zmq bench`` do. Imported in processes that are patched
already.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import oslo_messaging
from oslo_messaging.transport import RPCTransport, TransportURL

from benchmarks import TOPIC
from green_zmq import executors
from green_zmq.bench import work
from green_zmq.bench.work import client, close, conf, leave, reach, send, serve, together, transport, transports, usage
from green_zmq.config import read
from green_zmq.directory import open_directory
from green_zmq.routing import Node, Topic

__all__ = ["close", "leave", "reach", "send", "serve", "usage"]

LARGE = 64 << 20

_executed: list[int] = []
_large: list[str] = []


class _Service:
    def record(self, ctxt: Any, value: int) -> int:  # noqa: ARG002 (oslo.messaging passes it by name)
        _executed.append(value)
        return -value

    def length(self, ctxt: Any, value: str) -> int:  # noqa: ARG002
        return len(value)

    def large(self, ctxt: Any) -> str:  # noqa: ARG002
        return _large[0]


work.endpoints.append(_Service())


def load(url: str, callers: int, seconds: float) -> str:
    return f"{send(url, TOPIC, 'call', callers, 100, seconds)['count'] / seconds:.0f} calls/s"


def soak(url: str, callers: int, first: int, count: int) -> dict[str, Any]:
    """Calls with the values ``first`` and following; what went wrong with them, and how long they took."""
    server = client(url, TOPIC)
    values = iter(range(first, first + count))
    latencies: list[tuple[float, float, int]] = []
    lost: list[list[Any]] = []
    wrong: list[list[Any]] = []
    start = time.perf_counter()

    def call() -> None:
        for value in values:  # the iterator of a range gives each value to one thread
            before = time.perf_counter()
            try:
                answer = server.call({}, "record", value=value)
            except Exception as error:
                lost.append([value, f"{type(error).__name__}: {error}"])
            else:
                if answer != -value:
                    wrong.append([value, answer])
            now = time.perf_counter()
            latencies.append((now - before, before - start, value))

    together([call] * callers)
    latencies.sort()
    return {
        "seconds": time.perf_counter() - start,
        "lost": lost,
        "wrong": wrong,
        "median": latencies[len(latencies) // 2][0],
        "max": latencies[-1][0],
        "slow": [each for each in latencies if each[0] > 1.0],
    }


def executed(first: int, count: int) -> dict[str, Any]:
    """Of these values: how many this server has executed, which twice, which never."""
    times = Counter(value for value in _executed if first <= value < first + count)
    return {
        "total": sum(times.values()),
        "twice": [value for value, n in times.items() if n > 1],
        "never": [value for value in range(first, first + count) if value not in times],
    }


def counts() -> dict[str, int]:
    """What the drivers of this process have counted."""
    found: Counter[str] = Counter()
    for each in transports.values():
        found.update(each._driver.counts())
    return found


def reach_together(url: str, servers: list[str], timeout: float) -> dict[str, Any]:
    """Call each once, all at the same time: how long the last took, and how many were not reached."""
    errors: list[Exception] = []

    def call(name: str) -> None:
        try:
            assert client(url, TOPIC, name, timeout).call({}, "echo", value=1) == 1
        except oslo_messaging.MessagingTimeout as error:
            errors.append(error)

    start = time.perf_counter()
    together([functools.partial(call, name) for name in servers])
    return {"seconds": time.perf_counter() - start, "errors": len(errors)}


_crowd: list[RPCTransport] = []


def call_once(url: str, count: int) -> None:
    """As so many clients, each with a transport of its own, that then do nothing."""
    for _ in range(count):
        _crowd.append(oslo_messaging.get_rpc_transport(conf, url))
        to = oslo_messaging.get_rpc_client(_crowd[-1], oslo_messaging.Target(topic=TOPIC), timeout=60)
        assert to.call({}, "echo", value=1) == 1


def hang_up() -> None:
    """What those have."""
    together([each.cleanup for each in _crowd])
    _crowd.clear()


def held() -> dict[str, float]:
    """What this process holds: descriptors, and MiB of memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {"descriptors": len(list(Path("/proc/self/fd").iterdir())), "MiB": usage()["MiB"]}


def freeze() -> None:
    """Keep what was imported out of garbage collections, whose pauses would hide others."""
    gc.collect()
    gc.freeze()


class _Ticker:
    """Wakes every 10 ms and takes down how late it is."""

    def __init__(self) -> None:
        self.late: list[float] = []
        self._going = True
        self._thread = threading.Thread(target=self._tick)
        self._thread.start()

    def stop(self) -> dict[str, Any]:
        self._going = False
        self._thread.join()
        self.late.sort()
        return {
            "ticks": len(self.late),
            "max": self.late[-1] * 1000,
            "above 10 ms": sum(late > 0.010 for late in self.late),
        }

    def _tick(self) -> None:
        last = time.monotonic()
        while self._going:
            time.sleep(0.01)
            now = time.monotonic()
            self.late.append(now - last - 0.01)
            last = now


_tickers: list[_Ticker] = []


def start_ticker() -> None:
    _tickers.append(_Ticker())


def stop_ticker() -> dict[str, Any]:
    return _tickers.pop().stop()


def idle(seconds: float) -> str:
    time.sleep(seconds)
    return ""


def announce_dead(url: str, host: str, port: int, server: str) -> None:
    """Register a server in the directory that nobody runs at that address."""
    directory = open_directory(read(conf, TransportURL.parse(conf, url)))
    node = Node(os.urandom(16), host, port, "dead", os.getpid(), executors.detect())
    directory.announce(node, [(Topic("openstack", TOPIC), server)])
    directory.close()


def call_dead(url: str, server: str, timeout: float) -> str:
    try:
        client(url, TOPIC, server, timeout).call({}, "echo", value=1)
    except oslo_messaging.MessagingTimeout as error:
        return f"{type(error).__name__}: {error}"
    raise RuntimeError("a dead server answered")


def cast_dead(url: str, server: str, size: int, count: int) -> str:
    """Messages that stay pending."""
    to = client(url, TOPIC, server)
    text = "x" * size
    together([lambda: to.cast({}, "echo", value=text)] * count)
    return f"{counts().get('messages in the outbox')} messages in the outbox"


def make_large() -> None:
    """Before a ticker runs: this alone takes a while."""
    _large.append("x" * LARGE)


def send_large(url: str, server: str) -> str:
    start = time.perf_counter()
    assert client(url, TOPIC, server).call({}, "length", value=_large[0]) == LARGE
    return f"{time.perf_counter() - start:.2f} s"


def receive_large(url: str, server: str) -> str:
    start = time.perf_counter()
    assert len(client(url, TOPIC, server).call({}, "large")) == LARGE
    return f"{time.perf_counter() - start:.2f} s"


def clean_up(url: str) -> str:
    start = time.perf_counter()
    transport(url).cleanup()
    return f"{time.perf_counter() - start:.2f} s"
