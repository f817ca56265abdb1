# SPDX-License-Identifier: Apache-2.0
"""What the processes of the benchmarks do. Imported in processes that are patched already.

Arguments and results of the public functions are JSON. Transports are kept by their URL, so that a process stays warm.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import resource
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oslo_messaging
from bare import BareDriver
from oslo_config import cfg
from oslo_messaging.transport import RPCTransport, TransportURL

import green_zmq
from green_zmq import executors
from green_zmq.config import read
from green_zmq.directory import open_directory
from green_zmq.routing import Node, Topic

LARGE = 64 << 20
PAYLOAD = {"host": "compute-1", "ids": [1, 2, 3], "text": "a small payload"}

_conf = cfg.CONF  # oslo.messaging's client works with no other
_conf([], project="benchmarks")
_transports: dict[str, RPCTransport] = {}
_servers: list[Any] = []
_executed: list[int] = []
_large: list[str] = []


class Service:
    def echo(self, ctxt: Any, value: Any) -> Any:  # noqa: ARG002 (oslo.messaging passes it by name)
        return value

    def record(self, ctxt: Any, value: int) -> int:  # noqa: ARG002
        _executed.append(value)
        return -value

    def length(self, ctxt: Any, value: str) -> int:  # noqa: ARG002
        return len(value)

    def large(self, ctxt: Any) -> str:  # noqa: ARG002
        return _large[0]


def _transport(url: str) -> RPCTransport:
    transport = _transports.get(url)
    if transport is None:
        if url.startswith("bare:"):
            transport = RPCTransport(BareDriver(_conf, TransportURL.parse(_conf, url)))
        else:
            transport = oslo_messaging.get_rpc_transport(_conf, url)
        _transports[url] = transport
    return transport


def _client(url: str, server: str | None = None, timeout: float = 60) -> Any:
    target = oslo_messaging.Target(topic="benchmark", server=server)
    return oslo_messaging.get_rpc_client(_transport(url), target, timeout=timeout)


def _run(fns: list[Callable[[], None]]) -> None:
    """All at once, each in a thread, which in a patched process is a green one."""
    threads = [threading.Thread(target=fn) for fn in fns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def serve(url: str, servers: list[str]) -> None:
    """Listen with these server names, each with a transport of its own if they are several."""
    executor = {"threads": "threading"}.get(executors.detect(), executors.detect())
    for i, name in enumerate(servers):
        transport = oslo_messaging.get_rpc_transport(_conf, url) if i else _transport(url)
        _transports[f"{url} {name}" if i else url] = transport
        target = oslo_messaging.Target(topic="benchmark", server=name)
        server = green_zmq.get_rpc_server(transport, target, [Service()], executor=executor)
        server.start()
        _servers.append(server)


def calls(url: str, callers: int, seconds: float) -> dict[str, Any]:
    """Echo calls, as many as go in that time."""
    client = _client(url)
    latencies: list[float] = []
    start = time.perf_counter()
    end = start + seconds

    def call() -> None:
        now = time.perf_counter()
        while now < end:
            before = now
            client.call({}, "echo", value=PAYLOAD)
            now = time.perf_counter()
            latencies.append(now - before)

    _run([call] * callers)
    latencies.sort()
    n = len(latencies)
    return {
        "calls": n,
        "rate": n / (time.perf_counter() - start),
        "p50": latencies[n // 2] * 1000,
        "p99": latencies[n * 99 // 100] * 1000,
        "max": latencies[-1] * 1000,
    }


class _Listening:
    """An endpoint that counts, and tells when it has counted as many as are waited for."""

    def __init__(self) -> None:
        self.count = 0
        self.sent = 0
        self.last = 0.0

    def info(self, ctxt: Any, publisher_id: str, event_type: str, payload: Any, metadata: Any) -> None:  # noqa: ARG002
        self.count += 1
        self.last = time.monotonic()


_listening: dict[str, _Listening] = defaultdict(_Listening)


def listen(url: str, topic: str) -> None:
    transport = _transports[f"{url} {topic}"] = oslo_messaging.get_notification_transport(_conf, url)
    target = oslo_messaging.Target(topic=topic)
    executor = {"threads": "threading"}.get(executors.detect(), executors.detect())
    server = green_zmq.get_notification_listener(transport, [target], [_listening[topic]], executor=executor)
    server.start()
    _servers.append(server)


def notify(url: str, topic: str, notifiers: int, seconds: float, size: int) -> dict[str, Any]:
    """Notifications, as many as go in that time."""
    if f"notify {url}" not in _transports:
        _transports[f"notify {url}"] = oslo_messaging.get_notification_transport(_conf, url)
    payload = {"text": "x" * size}
    latencies: list[float] = []
    began = time.monotonic()

    def run() -> None:
        notifier = oslo_messaging.Notifier(
            _transports[f"notify {url}"], driver="messagingv2", publisher_id="benchmark", topics=[topic]
        )
        now = time.monotonic()
        while now < began + seconds:
            before = now
            notifier.info({}, "benchmark", payload)
            now = time.monotonic()
            latencies.append(now - before)

    _run([run] * notifiers)
    ended = time.monotonic()
    _listening[topic].sent += len(latencies)
    latencies.sort()
    return {
        "count": len(latencies),
        "total": _listening[topic].sent,
        "began": began,
        "ended": ended,
        "p50": latencies[len(latencies) // 2] * 1000,
        "p99": latencies[len(latencies) * 99 // 100] * 1000,
    }


def notified(topic: str, count: int) -> float:
    """Wait until so many have been processed since this process listens; when the last was."""
    listening = _listening[topic]
    give_up = time.monotonic() + 120
    while listening.count < count:
        if time.monotonic() > give_up:
            raise RuntimeError(f"{listening.count} of {count} notifications have been processed")
        time.sleep(0.005)
    return listening.last


def load(url: str, callers: int, seconds: float) -> str:
    return f"{calls(url, callers, seconds)['rate']:.0f} calls/s"


def soak(url: str, callers: int, first: int, count: int) -> dict[str, Any]:
    """Calls with the values ``first`` and following; what went wrong with them, and how long they took."""
    client = _client(url)
    values = iter(range(first, first + count))
    latencies: list[tuple[float, float, int]] = []
    lost: list[list[Any]] = []
    wrong: list[list[Any]] = []
    start = time.perf_counter()

    def call() -> None:
        for value in values:  # the iterator of a range gives each value to one thread
            before = time.perf_counter()
            try:
                answer = client.call({}, "record", value=value)
            except Exception as error:
                lost.append([value, f"{type(error).__name__}: {error}"])
            else:
                if answer != -value:
                    wrong.append([value, answer])
            now = time.perf_counter()
            latencies.append((now - before, before - start, value))

    _run([call] * callers)
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


def counts(url: str) -> dict[str, int]:
    """What the driver has counted."""
    driver = _transport(url)._driver
    return driver.counts() if hasattr(driver, "counts") else {}


def reach(url: str, servers: list[str]) -> None:
    """Call each server once."""
    for name in servers:
        assert _client(url, name).call({}, "echo", value=1) == 1


def reach_together(url: str, servers: list[str], timeout: float) -> dict[str, Any]:
    """Call each once, all at the same time: how long the last took, and how many were not reached."""
    errors: list[Exception] = []

    def call(name: str) -> None:
        try:
            assert _client(url, name, timeout).call({}, "echo", value=1) == 1
        except oslo_messaging.MessagingTimeout as error:
            errors.append(error)

    start = time.perf_counter()
    _run([functools.partial(call, name) for name in servers])
    return {"seconds": time.perf_counter() - start, "errors": len(errors)}


def leave() -> None:
    """Stop and clean up everything that this process serves."""
    _run([server.stop for server in _servers])
    _run([server.wait for server in _servers])
    _run([transport.cleanup for transport in _transports.values()])
    _servers.clear()
    _transports.clear()


def held() -> dict[str, float]:
    """What this process holds: descriptors, and MiB of memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"descriptors": len(list(Path("/proc/self/fd").iterdir())), "MiB": pages * resource.getpagesize() / 2**20}


def usage() -> dict[str, float]:
    """What this process has used so far: CPU seconds, voluntary context switches, full garbage collections."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu": used.ru_utime + used.ru_stime,
        "switches": used.ru_nvcsw,
        "collections": gc.get_stats()[2]["collections"],
    }


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
    directory = open_directory(read(_conf, TransportURL.parse(_conf, url)))
    node = Node(os.urandom(16), host, port, "dead", os.getpid(), executors.detect())
    directory.announce(node, [(Topic("openstack", "benchmark"), server)])
    directory.close()


def call_dead(url: str, server: str, timeout: float) -> str:
    try:
        _client(url, server, timeout).call({}, "echo", value=1)
    except oslo_messaging.MessagingTimeout as error:
        return f"{type(error).__name__}: {error}"
    raise RuntimeError("a dead server answered")


def cast_dead(url: str, server: str, size: int, count: int) -> str:
    """Messages that stay pending."""
    client = _client(url, server)
    text = "x" * size
    _run([lambda: client.cast({}, "echo", value=text)] * count)
    return f"{counts(url).get('messages in the outbox')} messages in the outbox"


def make_large() -> None:
    """Before a ticker runs: this alone takes a while."""
    _large.append("x" * LARGE)


def send_large(url: str, server: str) -> str:
    start = time.perf_counter()
    assert _client(url, server).call({}, "length", value=_large[0]) == LARGE
    return f"{time.perf_counter() - start:.2f} s"


def receive_large(url: str, server: str) -> str:
    start = time.perf_counter()
    assert len(_client(url, server).call({}, "large")) == LARGE
    return f"{time.perf_counter() - start:.2f} s"


def clean_up(url: str) -> str:
    start = time.perf_counter()
    _transports.pop(url).cleanup()
    return f"{time.perf_counter() - start:.2f} s"


def close() -> None:
    for server in _servers:
        server.stop()
    for server in _servers:
        server.wait()
    for transport in _transports.values():
        transport.cleanup()
