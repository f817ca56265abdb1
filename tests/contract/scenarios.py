# SPDX-License-Identifier: Apache-2.0
"""What the tests have a worker do. Every public function is one scenario; arguments and values are JSON."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import functools
import gc
import logging
import os
import resource
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oslo_messaging
from futurist._thread import ThreadWorker
from oslo_config import cfg
from oslo_messaging import rpc
from oslo_messaging.rpc.dispatcher import _dispatcher_opts

import green_zmq
from tests.contract import models
from tests.contract.endpoints import ContextObject, Endpoint, Versioned, Wrapping
from tests.contract.models import parallel, wait_until

EXECUTORS = {"threads": "threading", "eventlet": "eventlet", "gevent": "gevent"}
POLICIES = {
    "legacy": rpc.LegacyRPCAccessPolicy,
    "default": rpc.DefaultRPCAccessPolicy,
    "explicit": rpc.ExplicitRPCAccessPolicy,
}

cfg.CONF([], project="contract")
# Transports are kept over the tests, as services keep them; tags tell those apart that have the same URL.
_transports: dict[tuple[str, str], Any] = {}
_making = threading.Lock()
_servers: dict[str, tuple[Any, Endpoint]] = {}
_batches: dict[str, tuple[Any, list[list[Any]], list[Any]]] = {}
# What other modules have to end after a test.
at_reset: list[Callable[[], None]] = []


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


_log = _Log()
logging.getLogger("green_zmq").addHandler(_log)
logging.basicConfig(level=logging.WARNING)
# An idle thread of this pool looks every second whether it is to end, and every test ends one.
ThreadWorker.MAX_IDLE_FOR = 0.05  # type: ignore[assignment]


# Transports.


def transport(url: str, tag: str = "", exmods: list[str] | None = None) -> Any:
    key = (url, tag)
    with _making:
        if key not in _transports:
            _transports[key] = oslo_messaging.get_rpc_transport(cfg.CONF, url, allowed_remote_exmods=exmods)
        return _transports[key]


def open_transport(url: str, tag: str = "") -> None:
    transport(url, tag)


def cleanup(url: str, tag: str = "") -> float:
    """Clean it up, and keep it; the seconds that took."""
    began = time.monotonic()
    transport(url, tag).cleanup()
    return time.monotonic() - began


def cleanup_slowly(url: str) -> None:
    """Clean it up on a machine that is so busy that whatever wakes another thread comes late."""
    write = os.eventfd_write

    def write_late(descriptor: int, value: int) -> None:
        time.sleep(0.02)  # in which a thread that is awake already takes what it was to be woken for
        write(descriptor, value)

    os.eventfd_write = write_late  # type: ignore[assignment]
    try:
        cleanup(url)
    finally:
        os.eventfd_write = write


def reset() -> None:
    """After a test: stop what it left running. The plain transports stay, as they would in a service."""
    for _, endpoint in _servers.values():
        endpoint.released = True
    for outcome in parallel([functools.partial(end, label) for label in _servers]):
        outcome.result()
    for fn in at_reset:
        fn()
    for listener, _, _ in _batches.values():
        listener.stop()
    _batches.clear()
    give_descriptors_back()
    for topic in list(_many):
        close_many(topic)
    for key in [key for key in _transports if key[1] or "&" in key[0]]:
        _transports.pop(key).cleanup()
    _log.lines.clear()


def configure(group: str, **options: Any) -> None:
    for name, value in options.items():
        cfg.CONF.set_override(name, value, group=group)


def logged() -> list[str]:
    return list(_log.lines)


def counts(url: str, tag: str = "") -> dict[str, int]:
    return dict(transport(url, tag)._driver.counts())


def address(url: str, tag: str = "") -> list[Any]:
    """Where this process listens: host, port and instance."""
    node = transport(url, tag)._driver._engine.server.node
    return [node.host, node.port, node.instance.hex()]


def leftovers(url: str, tag: str = "") -> dict[str, int]:
    """What a transport still holds; all of it must go when nothing is under way."""
    engine = wait_until(lambda: transport(url, tag)._driver._engine)
    sender = engine._sender
    links = list(sender._links.values())
    return {
        "requests": len(sender.requests),
        "waiting": len(sender.waiting),
        "draining": len(sender._draining),
        "outbox": sender.pending,
        "open": sum(len(link.open) for link in links),
        "queued": sum(len(link.queue) for link in links),
        "held back": sum(len(link.held) for link in links),
        "taken": sum(len(link.taken) for link in links),
        "held": len(sender._held),
        "mailbox": len(engine._loop._mailbox),
        "reply bytes": engine._receiver._reply_bytes,
        "unanswered": len(engine._receiver.unanswered),
    }


# Servers.


def serve(
    url: str,
    topic: str,
    server: str = "server",
    label: str = "",
    tag: str = "",
    exchange: str | None = None,
    executor: str = "",
    ours: bool = False,
    pool: int | None = None,
    policy: str = "default",
    serializer: bool = False,
    versions: list[list[Any]] | None = None,
    ping: bool = False,
) -> None:
    """Start an RPC server, known by its label (by default its name).

    :param ours: with an executor of ours; in gevent in any case, since oslo.messaging has none.
    """
    cfg.CONF.register_opts(_dispatcher_opts)
    cfg.CONF.set_override("rpc_ping_enabled", ping)
    label = label or server
    endpoint = Endpoint(label, call)
    name = executor or EXECUTORS[models.name]
    make = green_zmq.get_rpc_server if ours or name == "gevent" else oslo_messaging.get_rpc_server
    created = make(
        transport(url, tag),
        oslo_messaging.Target(topic=topic, server=server, exchange=exchange),
        [endpoint, *(Versioned(*each) for each in versions or [])],
        executor=None if name == "default" else name,
        serializer=Wrapping() if serializer else None,
        access_policy=POLICIES[policy],
    )
    assert label not in _servers
    created.start(override_pool_size=pool)
    _servers[label] = (created, endpoint)


def start_again(label: str) -> None:
    _servers[label][0].start()


def stop(label: str) -> None:
    _servers[label][0].stop()


def wait(label: str) -> None:
    _servers[label][0].wait()


def end(label: str) -> None:
    """Stop it and forget it; what it has seen."""
    stop(label)
    wait(label)
    del _servers[label]


def seen(label: str) -> list[Any]:
    return list(_servers[label][1].seen)


def began(label: str) -> list[Any]:
    return list(_servers[label][1].began)


def release(label: str) -> None:
    _servers[label][1].released = True


def listen_in_batches(url: str, topic: str, label: str, size: int, timeout: float | None) -> None:
    """A listener of the driver itself, as no RPC server takes batches."""
    batches: list[list[Any]] = []
    errors: list[Any] = []

    def on_incoming(batch: list[Any]) -> None:
        batches.append([message.message["args"]["value"] for message in batch])
        for message in batch:
            message.acknowledge()
            message.reply(message.message["args"]["value"])

    listener = transport(url)._driver.listen(oslo_messaging.Target(topic=topic, server=label), size, timeout)
    listener.start(on_incoming)
    _batches[label] = (listener, batches, errors)


def batches(label: str) -> list[list[Any]]:
    return [list(batch) for batch in _batches[label][1]]


# Clients.


def _prepared(
    url: str,
    topic: str,
    *,
    tag: str = "",
    exmods: list[str] | None = None,
    server: str | None = None,
    exchange: str | None = None,
    fanout: bool | None = None,
    namespace: str | None = None,
    version: str | None = None,
    serializer: bool = False,
    timeout: float | None = 10,
    monitor: int | None = None,
    retry: int | None = None,
    at_least_once: bool | None = None,
) -> Any:
    target = oslo_messaging.Target(
        topic=topic, server=server, exchange=exchange, fanout=fanout, namespace=namespace, version=version
    )
    options = None if at_least_once is None else oslo_messaging.TransportOptions(at_least_once=at_least_once)
    return oslo_messaging.get_rpc_client(
        transport(url, tag or ",".join(exmods or []), exmods),
        target,
        timeout=timeout,
        retry=retry,
        call_monitor_timeout=monitor,
        serializer=Wrapping() if serializer else None,
        transport_options=options,
    )


def call(
    url: str,
    topic: str,
    method: str,
    args: dict[str, Any] | None = None,
    ctxt: dict[str, Any] | None = None,
    context_object: bool = False,
    **how: Any,
) -> Any:
    context = ContextObject(ctxt or {}) if context_object else ctxt or {}
    return _prepared(url, topic, **how).call(context, method, **(args or {}))


def cast(url: str, topic: str, method: str, args: dict[str, Any] | None = None, **how: Any) -> None:
    _prepared(url, topic, **how).cast({}, method, **(args or {}))


def fanout(url: str, topic: str, method: str, args: dict[str, Any] | None = None, **how: Any) -> None:
    cast(url, topic, method, args, fanout=True, **how)


def call_fill(url: str, topic: str, method: str, size: int, **how: Any) -> Any:
    """A call with a string of that many characters; what it returned."""
    return call(url, topic, method, {"value": "ä" + "x" * (size - 1)}, **how)


def call_for_length(url: str, topic: str, size: int, **how: Any) -> int:
    """Have so many characters returned; how many came."""
    return len(call(url, topic, "fill", {"size": size}, **how))


def tick_while_sending(url: str, topic: str, size: int, **how: Any) -> list[Any]:
    """How late the worst tick was while so many characters went out; and how many arrived."""
    value = "x" * size
    client = _prepared(url, topic, **how)
    worst, (arrived, _) = _latest(lambda: client.call({}, "digest", value=value))
    return [worst, arrived]


def tick_while_echoing(url: str, topic: str, size: int, **how: Any) -> list[Any]:
    """How late the worst tick was while so many characters went there and back; and how many came back."""
    value = "x" * size
    client = _prepared(url, topic, **how)
    kept: list[str] = []  # giving so much memory back takes a while, and is none of the driver's
    worst, _ = _latest(lambda: kept.append(client.call({}, "echo", value=value)))
    return [worst, len(kept[0])]


def call_in_vain(url: str, topic: str, method: str, **how: Any) -> str:
    """The error."""
    try:
        call(url, topic, method, **how)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it was answered")


def call_unserialisable(url: str, topic: str, **how: Any) -> Any:
    return call(url, topic, "echo", {"value": threading.Lock()}, **how)


def calls(url: str, topic: str, method: str, count: int, args: dict[str, Any] | None = None, **how: Any) -> list[Any]:
    """One after the other."""
    client = _prepared(url, topic, **how)
    return [client.call({}, method, **(args or {})) for _ in range(count)]


def casts(url: str, topic: str, method: str, values: list[Any], **how: Any) -> None:
    """One after the other."""
    client = _prepared(url, topic, **how)
    for value in values:
        client.cast({}, method, value=value)


def casts_together(url: str, topic: str, method: str, values: list[Any], **how: Any) -> None:
    client = _prepared(url, topic, **how)
    for outcome in parallel([functools.partial(client.cast, {}, method, value=value) for value in values]):
        outcome.result()


def calls_together(
    url: str, topic: str, method: str, values: list[Any], args: dict[str, Any] | None = None, **how: Any
) -> list[Any]:
    """All at the same time; what each returned."""
    client = _prepared(url, topic, **how)
    outcomes = parallel(functools.partial(client.call, {}, method, value=value, **(args or {})) for value in values)
    return [outcome.result() for outcome in outcomes]


def call_until(url: str, topic: str, method: str, label: str, **how: Any) -> dict[str, Any]:
    """Call over and over until :func:`release` of that label, which some server here bears; how it went."""
    client = _prepared(url, topic, **how)
    endpoint = _servers[label][1]
    done, slowest, errors = 0, 0.0, []
    while not endpoint.released:
        began = time.monotonic()
        try:
            client.call({}, method)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
        slowest = max(slowest, time.monotonic() - began)
        done += 1
    return {"done": done, "slowest": slowest, "errors": errors}


# Native threads.


def logging_in_native_threads(url: str, topic: str) -> list[str]:
    """Where native threads, but the main one, take the lock of all loggers, while this process serves, calls and notifies."""
    found: list[str] = []
    lock: Any = logging._lock  # type: ignore[attr-defined]

    class Watched:
        def acquire(self, *how: Any) -> Any:
            if _thread.get_native_id() != os.getpid():
                found.append("".join(traceback.format_stack(limit=8)))
            return lock.acquire(*how)

        def release(self) -> None:
            lock.release()

        def __enter__(self) -> None:
            self.acquire()

        def __exit__(self, *_: object) -> None:
            self.release()

    logging._lock = Watched()  # type: ignore[attr-defined]
    try:
        serve(url, topic)
        call(url, topic, "who")
        notifications = oslo_messaging.get_notification_transport(cfg.CONF, url)
        notifier = oslo_messaging.Notifier(notifications, "test", driver="messagingv2", topics=[topic])
        notifier.info({}, "event", {})
        notifications.cleanup()
        cleanup(url)
    finally:
        logging._lock = lock  # type: ignore[attr-defined]
    return found


def native_threads(url: str, topic: str, first: str) -> list[Any]:
    """Use one transport from the main thread, and from native ones; ``first`` uses it first."""
    tag = f"native {first}"
    client = _prepared(url, topic, tag=tag)

    def use(name: str) -> list[Any]:
        values = [f"{name} {i}" for i in range(20)]
        for i, value in enumerate(values):
            if i % 4 == 3:
                client.cast({}, "note", value=value)
            else:
                assert client.call({}, "note", value=value) == value
        return values

    sent = []
    if first == "main":
        sent += use("first")
    else:
        sent += parallel([functools.partial(use, "first")], native=True)[0].result()
    outcomes = [
        *parallel([functools.partial(use, f"native {i}") for i in range(2)], native=True),
        *parallel([functools.partial(use, f"own {i}") for i in range(2)]),
    ]
    for outcome in outcomes:
        sent += outcome.result()
    return sent


# A ticker.


def _latest(while_running: Callable[[], Any]) -> tuple[float, Any]:
    """How late the worst tick of a 10 ms ticker was, in seconds, while that ran; and its value."""
    state = {"stop": False, "worst": 0.0}

    def tick() -> None:
        expected = time.monotonic() + 0.01
        while not state["stop"]:
            models.sleep(0.01)
            now = time.monotonic()
            state["worst"] = max(state["worst"], now - expected)
            expected = now + 0.01

    # The collector is the application's: its stops are none of the driver's.
    gc.collect()
    gc.freeze()
    ticker = parallel([tick])[0]
    models.sleep(0.02)
    value = while_running()
    models.sleep(0.02)
    state["stop"] = True
    ticker.result()
    return state["worst"], value


def tick_while(doing: str, **args: Any) -> list[Any]:
    """How late the worst tick was while that scenario ran; and its value."""
    return list(_latest(functools.partial(globals()[doing], **args)))


def tick_until_released(label: str) -> float:
    return _latest(lambda: wait_until(lambda: _servers[label][1].released, 60))[0]


# Many peers, and little to work with.

_many: dict[str, list[tuple[Any, Any]]] = {}
_hoarded: list[int] = []
# Before anything here has changed them.
_THRESHOLDS = gc.get_threshold()
_LIMITS = resource.getrlimit(resource.RLIMIT_NOFILE)


def listen_many(url: str, topic: str, count: int, first: int = 0) -> None:
    """So many peers in this process: transports of their own, each with a listener, named by numbers, that echoes."""

    def answer(batch: list[Any]) -> None:
        for message in batch:
            message.acknowledge()
            message.reply(message.message["args"].get("value"))

    def listen(number: int) -> None:
        opened = oslo_messaging.get_rpc_transport(cfg.CONF, url)
        listener = opened._driver.listen(oslo_messaging.Target(topic=topic, server=str(number)), 1, None)
        listener.start(answer)
        _many.setdefault(topic, []).append((opened, listener))

    for outcome in parallel([functools.partial(listen, number) for number in range(first, first + count)]):
        outcome.result()


def stop_many(topic: str) -> None:
    """Listen no more, without closing anything."""
    for _, listener in _many[topic]:
        listener.stop()


def close_many(topic: str) -> None:
    peers = _many.pop(topic, [])
    for outcome in parallel([opened.cleanup for opened, _ in peers]):
        outcome.result()


def call_many(url: str, topic: str, count: int, timeout: float = 20) -> list[str]:
    """Call each of them, all at the same time; the errors."""
    client = _prepared(url, topic, timeout=timeout)
    calls = [functools.partial(client.prepare(server=str(i)).call, {}, "echo", value=i) for i in range(count)]
    errors = []
    for i, outcome in enumerate(parallel(calls)):
        try:
            assert outcome.result() == i
        except oslo_messaging.MessagingTimeout as error:
            errors.append(str(error))
    return errors


def connections(url: str) -> int:
    """How many the pool of a transport has, standing or not."""
    return len(transport(url)._driver._engine._connections._connections)


def _descriptors() -> list[int]:
    return [int(path.name) for path in Path("/proc/self/fd").iterdir()]


def resources() -> dict[str, int]:
    """What this process uses: descriptors, and resident bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"descriptors": len(_descriptors()), "bytes": pages * resource.getpagesize()}


def thresholds(url: str, topic: str, before: list[int] | None = None) -> list[int]:
    """Those of garbage collection, once this process has called; at first they are Python's own, or these."""
    gc.set_threshold(*(before or _THRESHOLDS))
    call(url, topic, "who")
    return list(gc.get_threshold())


def threads() -> list[str]:
    """The names of those of this process, green ones where it is patched."""
    return [thread.name for thread in threading.enumerate()]


def cpu() -> float:
    """Seconds of CPU that this process has used."""
    return time.process_time()


def leave_descriptors(count: int) -> int:
    """Take all descriptors but so many; the limit, which is lowered for that."""
    limit = max(_descriptors()) + count + 16
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, _LIMITS[1]))
    with contextlib.suppress(OSError):
        while True:
            _hoarded.append(os.dup(0))
    for _ in range(count):
        os.close(_hoarded.pop())
    return limit


def give_descriptors_back() -> None:
    while _hoarded:
        os.close(_hoarded.pop())
    resource.setrlimit(resource.RLIMIT_NOFILE, _LIMITS)
