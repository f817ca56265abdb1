# SPDX-License-Identifier: Apache-2.0
"""What the processes of a benchmark do. Imported in processes that are patched already.

Arguments and results of the public functions are JSON. Transports are kept by their URL, so that a process stays warm.
"""

from __future__ import annotations

import functools
import gc
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oslo_messaging
from oslo_config import cfg
from oslo_messaging.transport import RPCTransport, TransportURL

import green_zmq
from green_zmq import executors
from green_zmq.bench.bare import BareDriver

conf = cfg.CONF  # oslo.messaging's client works with no other
conf([], project="benchmarks", default_config_files=[], default_config_dirs=[])
executor = {"threads": "threading"}.get(executors.detect(), executors.detect())
transports: dict[str, Any] = {}
# That servers have besides their own.
endpoints: list[Any] = []
_served: defaultdict[str, list[Any]] = defaultdict(list)


class _Arrived:
    """What has come to a topic."""

    def __init__(self) -> None:
        self.count = 0
        self.last = 0.0

    def note(self) -> None:
        self.count += 1
        self.last = time.monotonic()


_arrived: defaultdict[str, _Arrived] = defaultdict(_Arrived)


class Service:
    def __init__(self, topic: str) -> None:
        self._arrived = _arrived[topic]

    def echo(self, ctxt: Any, value: Any) -> Any:  # noqa: ARG002 (oslo.messaging passes it by name)
        return value

    def sink(self, ctxt: Any, value: Any) -> None:  # noqa: ARG002
        self._arrived.note()


class _Endpoint:
    def __init__(self, topic: str) -> None:
        self._arrived = _arrived[topic]

    def info(self, ctxt: Any, publisher_id: str, event_type: str, payload: Any, metadata: Any) -> None:  # noqa: ARG002
        self._arrived.note()


def transport(url: str, kind: str = "rpc", name: str = "") -> Any:
    key = f"{url} {kind} {name}"
    if key not in transports:
        if url.startswith("bare:"):
            transports[key] = RPCTransport(BareDriver(conf, TransportURL.parse(conf, url)))
        elif kind == "rpc":
            transports[key] = oslo_messaging.get_rpc_transport(conf, url)
        else:
            transports[key] = oslo_messaging.get_notification_transport(conf, url)
    return transports[key]


def client(url: str, topic: str, server: str | None = None, timeout: float = 60) -> Any:
    target = oslo_messaging.Target(topic=topic, server=server)
    return oslo_messaging.get_rpc_client(transport(url), target, timeout=timeout)


def together(fns: list[Callable[[], None]]) -> None:
    """All at once, each in a thread, which in a patched process is a green one."""
    threads = [threading.Thread(target=fn) for fn in fns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# Of servers.


def serve(url: str, topic: str, servers: list[str], pattern: str = "call", oslo_executors: bool = False) -> None:
    """Listen with these names, each with a transport of its own, as services do.

    :param oslo_executors: with those of oslo.messaging, which has none for gevent.
    """
    made_by: Any = oslo_messaging if oslo_executors and executor != "gevent" else green_zmq
    for name in servers:
        if pattern == "notification":
            targets = [oslo_messaging.Target(topic=topic)]
            own = transport(url, "notification", f"{topic} {name}")
            server = made_by.get_notification_listener(own, targets, [_Endpoint(topic)], executor=executor)
        else:
            target = oslo_messaging.Target(topic=topic, server=name)
            own = transport(url, "rpc", f"{topic} {name}")
            server = made_by.get_rpc_server(own, target, [Service(topic), *endpoints], executor=executor)
        server.start()
        _served[topic].append(server)


def leave(topic: str) -> None:
    """Stop all that listens to it."""
    servers = _served.pop(topic, [])
    together([server.stop for server in servers])
    together([server.wait for server in servers])
    keys = [key for key in transports if f" {topic} " in key]
    together([transports.pop(key).cleanup for key in keys])


def arrived(topic: str) -> tuple[int, float]:
    """How much has come to it in this process, and when the last did, by the monotonic clock."""
    found = _arrived[topic]
    return found.count, found.last


# Of senders.


def send(url: str, topic: str, pattern: str, senders: int, size: int, seconds: float) -> dict[str, Any]:
    """As many as go in that time; when the first began and the last ended, and what senders waited for one, in ms."""
    value = "x" * size
    once = _notify(url, topic, value) if pattern == "notification" else _rpc(url, topic, pattern, value)
    latencies: list[float] = []
    began = time.monotonic()
    until = began + seconds

    def go_on() -> None:
        now = time.monotonic()
        while now < until:
            before = now
            once()
            now = time.monotonic()
            latencies.append(now - before)

    together([go_on] * senders)
    ended = time.monotonic()
    latencies.sort()
    count = len(latencies)
    if not count:
        raise RuntimeError("nothing was sent: the messages of the senders before are the reason")
    return {
        "count": count,
        "began": began,
        "ended": ended,
        "p50": latencies[count // 2] * 1000,
        "p99": latencies[count * 99 // 100] * 1000,
    }


def _rpc(url: str, topic: str, pattern: str, value: str) -> Callable[[], Any]:
    if pattern == "call":
        return functools.partial(client(url, topic).call, {}, "echo", value=value)
    to = client(url, topic).prepare(fanout=True) if pattern == "fanout" else client(url, topic)
    return functools.partial(to.cast, {}, "sink", value=value)


def _notify(url: str, topic: str, value: str) -> Callable[[], Any]:
    own = transport(url, "notification")
    notifier = oslo_messaging.Notifier(own, driver="messagingv2", publisher_id="bench", topics=[topic])
    return functools.partial(notifier.info, {}, "bench", {"value": value})


def reach(url: str, topic: str, servers: list[str]) -> None:
    """Call each once."""
    for name in servers:
        assert client(url, topic, name).call({}, "echo", value=1) == 1


# Of all.


def usage() -> dict[str, float]:
    """What this process has used so far: CPU seconds, voluntary context switches, full garbage collections; MiB it has."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "cpu": used.ru_utime + used.ru_stime,
        "switches": used.ru_nvcsw,
        "collections": gc.get_stats()[2]["collections"],
        "MiB": pages * resource.getpagesize() / 2**20,
    }


def close() -> None:
    for topic in list(_served):
        leave(topic)
    together([each.cleanup for each in transports.values()])
