# SPDX-License-Identifier: Apache-2.0
"""In a worker: notifiers, and listeners to notifications."""

from __future__ import annotations

import functools
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oslo_messaging
from futurist._thread import ThreadWorker
from oslo_config import cfg
from oslo_messaging.notify import notifier
from oslo_messaging.notify.dispatcher import PRIORITIES

import green_zmq
from tests.contract import models, scenarios
from tests.contract.endpoints import ContextObject
from tests.contract.models import parallel, wait_until
from tests.contract.scenarios import EXECUTORS, transport
from tests.faults import forks

REQUEUE = oslo_messaging.NotificationResult.REQUEUE

cfg.CONF.register_opts(notifier._notifier_opts, group="oslo_messaging_notifications")
_listeners: dict[str, tuple[Any, Endpoint]] = {}
_children: list[int] = []


class _OsloLog(logging.Handler):
    """What oslo.messaging's own drivers do with the errors of a transport."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0]:
            self.errors.append(record.exc_info[0].__name__)


_oslo_log = _OsloLog()
logging.getLogger("oslo_messaging").addHandler(_oslo_log)


class _Context(ContextObject):
    """Oslo.messaging sends no other contexts with notifications than those that can leave out what is secret."""

    def redacted_copy(self) -> _Context:
        return self


class Endpoint:
    """What it does with a payload is told by that; else it just notes it.

    :ivar began: payloads, in the order in which they were given to it.
    :ivar seen: those that are processed.
    :ivar batches: as they came.
    :ivar details: of each that came: priority, context, publisher, event, payload, metadata.
    """

    def __init__(self, doing: dict[str, str]) -> None:
        self.began: list[Any] = []
        self.seen: list[Any] = []
        self.batches: list[list[Any]] = []
        self.details: list[list[Any]] = []
        self.arrivals: list[float] = []
        self.released = False
        self._doing = doing

    def take(self, priority: str, *details: Any) -> Any:
        payload = details[3]
        self.arrivals.append(time.monotonic())
        self.details.append([priority, *details])
        self.began.append(payload)
        return self._process(payload)

    def take_batch(self, priority: str, messages: list[dict[str, Any]]) -> Any:
        payloads = [message["payload"] for message in messages]
        self.arrivals.append(time.monotonic())
        self.batches.append(payloads)
        self.began += payloads
        results = [self._process(payload) for payload in payloads]
        return REQUEUE if REQUEUE in results else None

    def _process(self, payload: Any) -> Any:
        what = self._doing.get(str(payload), self._doing.get("*", "note"))
        if what == "fail":
            raise ValueError(f"{payload!r} cannot be processed")
        if what == "requeue":
            return REQUEUE
        if what == "hold":
            wait_until(lambda: self.released, 120)
        if what == "rest":
            models.sleep(0.01)
        self.seen.append(payload)
        return None


def _at_priorities(endpoint: Endpoint, priorities: list[str], *, in_batches: bool) -> Any:
    """An endpoint as oslo.messaging wants it: with a method for each priority."""
    take = endpoint.take_batch if in_batches else endpoint.take
    return type("AtPriorities", (), {each: staticmethod(functools.partial(take, each)) for each in priorities})()


# Listeners.


def listen(
    url: str,
    topics: list[str],
    label: str = "listener",
    tag: str = "",
    pool: str | None = None,
    exchange: str | None = None,
    priorities: list[str] | None = None,
    doing: dict[str, str] | None = None,
    requeue: bool = False,
    size: int = 0,
    timeout: float | None = None,
    workers: int | None = None,
) -> None:
    """Start a listener, known by its label.

    :param size: of a batch; 0: it takes none; -1: it does not say.
    """
    endpoint = Endpoint(doing or {})
    targets = [oslo_messaging.Target(topic=topic, exchange=exchange) for topic in topics]
    endpoints = [_at_priorities(endpoint, priorities or list(PRIORITIES), in_batches=size != 0)]
    how = {"executor": EXECUTORS[models.name], "allow_requeue": requeue, "pool": pool}
    made_by: Any = green_zmq if models.name == "gevent" else oslo_messaging
    if size:
        most = None if size < 0 else size
        created = made_by.get_batch_notification_listener(
            transport(url, tag), targets, endpoints, batch_size=most, batch_timeout=timeout, **how
        )
    else:
        created = made_by.get_notification_listener(transport(url, tag), targets, endpoints, **how)
    assert label not in _listeners
    created.start(override_pool_size=workers)
    _listeners[label] = (created, endpoint)


def listen_to_nothing(url: str, topics: list[str], count: int) -> None:
    """Start and end so many listeners, one after the other."""
    for number in range(count):
        listen(url, topics, label=f"nothing {number}")
        end(f"nothing {number}")


def listen_at_all(url: str, topics: list[str], count: int) -> None:
    """Start so many listeners, and end them when all have begun."""
    labels = [f"all {number}" for number in range(count)]
    for label in labels:
        listen(url, topics, label=label)
    for outcome in parallel([functools.partial(end, label) for label in labels]):
        outcome.result()


def start_again(label: str = "listener") -> None:
    _listeners[label][0].start()


def stop(label: str = "listener") -> None:
    _listeners[label][0].stop()


def wait(label: str = "listener") -> None:
    _listeners[label][0].wait()


def end(label: str = "listener") -> list[Any]:
    """Stop it and forget it; what it has processed."""
    release(label)
    stop(label)
    wait(label)
    return _listeners.pop(label)[1].seen


def seen(label: str = "listener") -> list[Any]:
    return list(_listeners[label][1].seen)


def began(label: str = "listener") -> list[Any]:
    return list(_listeners[label][1].began)


def batches(label: str = "listener") -> list[list[Any]]:
    return list(_listeners[label][1].batches)


def details(label: str = "listener") -> list[list[Any]]:
    return list(_listeners[label][1].details)


def arrivals(label: str = "listener") -> list[float]:
    """By the monotonic clock, which all processes of a machine share."""
    return list(_listeners[label][1].arrivals)


def lengths(label: str = "listener") -> list[int]:
    """Of what it has processed."""
    return [len(each) for each in _listeners[label][1].seen]


def release(label: str = "listener") -> None:
    _listeners[label][1].released = True


def _reset() -> None:
    for _, endpoint in _listeners.values():
        endpoint.released = True
    for outcome in parallel([functools.partial(end, label) for label in list(_listeners)]):
        outcome.result()
    while _children:
        os.kill(_children[-1], signal.SIGKILL)
        os.waitpid(_children.pop(), 0)
    _oslo_log.errors.clear()


scenarios.at_reset.append(_reset)


# Notifiers.


def notify(
    url: str,
    topics: list[str],
    values: list[Any],
    priority: str = "info",
    driver: str = "messagingv2",
    ctxt: dict[str, Any] | None = None,
    event: str = "event",
    retry: int | None = None,
    tag: str = "",
) -> None:
    """As services do it, one after the other."""
    created = oslo_messaging.Notifier(transport(url, tag), "publisher", driver=driver, topics=topics, retry=retry)
    for value in values:
        getattr(created, priority)(_Context(ctxt or {}), event, value)


def notify_together(url: str, topics: list[str], values: list[Any], tag: str = "") -> None:
    outcomes = parallel([functools.partial(notify, url, topics, [value], tag=tag) for value in values])
    for outcome in outcomes:
        outcome.result()


def swallowed() -> list[str]:
    """Errors that oslo.messaging has logged, by their names."""
    return list(_oslo_log.errors)


def send(
    url: str,
    topic: str,
    values: list[Any],
    priority: str = "info",
    exchange: str | None = None,
    retry: int | None = None,
    tag: str = "",
) -> float:
    """Without oslo.messaging's driver, which keeps errors to itself; the seconds it took."""
    before = time.monotonic()
    target = oslo_messaging.Target(topic=f"{topic}.{priority}", exchange=exchange)
    for value in values:
        transport(url, tag)._send_notification(target, {}, _message(value, priority), version=2.0, retry=retry)
    return time.monotonic() - before


def send_fill(url: str, topic: str, size: int) -> None:
    send(url, topic, ["ä" + "x" * (size - 1)])


def send_until(url: str, topic: str, name: str, path: str) -> int:
    """Until that file is there; how many. Each has its number behind the name."""
    number = 0
    while not Path(path).exists():
        send(url, topic, [f"{name}-{number}"])
        models.sleep(0.005)
        number += 1
    return number


def send_at(url: str, topic: str, value: Any) -> float:
    """When it was sent, by the monotonic clock."""
    now = time.monotonic()
    send(url, topic, [value])
    return now


def send_and_be_killed(url: str, topic: str, values: list[Any], line: str) -> None:
    """Green threads that send are killed once a line with that has been logged."""
    threads = [models.spawn(_send_in_vain, url, topic, value) for value in values]
    wait_until(lambda: any(line in each for each in scenarios.logged()), 60)
    models.sleep(0.05)
    for thread in threads:
        thread.kill()


def send_and_be_killed_soon(url: str, topic: str, value: Any) -> None:
    """A green thread that sends is killed a moment later."""
    thread = models.spawn(_send_in_vain, url, topic, value)
    models.sleep(0.3)
    thread.kill()


def _send_in_vain(url: str, topic: str, value: Any) -> None:
    send(url, topic, [value])
    raise AssertionError("it was not killed")


def _message(value: Any, priority: str) -> dict[str, Any]:
    return {
        "message_id": "1",
        "publisher_id": "publisher",
        "event_type": "event",
        "priority": priority.upper(),
        "payload": value,
        "timestamp": "now",
    }


# Processes and what they use.


def transports(url: str, topic: str, count: int) -> None:
    """So many, one after the other, that send and listen."""
    for number in range(count):
        tag = f"one of many {number}"
        listen(url, [topic], label=tag, tag=tag)
        send(url, topic, [number], tag=tag)
        wait_until(lambda: _listeners[tag][1].seen, 60)  # noqa: B023 (it is over before the next)
        end(tag)
        scenarios._transports.pop((url, tag)).cleanup()


def executor_threads() -> list[int]:
    """Those of oslo.messaging's servers, which look whether they are to end."""
    return [thread.native_id for thread in threading.enumerate() if isinstance(thread, ThreadWorker) and thread.native_id]


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208


def fork_and_send(url: str, topic: str, children: int, count: int) -> dict[str, Any]:
    """A process that sends all the time forks others that send as well; their exit codes, and what all have sent."""
    parent, sent = os.getpid(), [f"before-{i}" for i in range(count)]
    send(url, topic, sent)
    state = {"stop": False}

    def keep_sending(name: str) -> None:
        number = 0
        # Where green threads survive in a child, those of the parent are not to go on there.
        while not state["stop"] and os.getpid() == parent:
            sent.append(f"{name}-{number}")
            send(url, topic, [sent[-1]])
            number += 1

    def more() -> None:
        before = len(sent)
        wait_until(lambda: len(sent) > before + 10, 60)

    outcomes = parallel([functools.partial(keep_sending, f"meanwhile-{i}") for i in range(2)])
    pids = []
    more()
    for child in range(children):
        values = [f"child-{child}-{i}" for i in range(count)]
        pids.append(forks.child(functools.partial(send, url, topic, values)))
        more()
        sent += values
    codes = forks.wait_for(pids)
    state["stop"] = True
    for outcome in outcomes:
        outcome.result()
    return {"codes": codes, "sent": sent}


def fork_and(doing: list[str], url: str = "", topic: str = "", values: list[Any] | None = None) -> int:
    """Have a child do these; its exit code."""
    known: dict[str, Callable[[], object]] = {
        "send": lambda: send(url, topic, values or []),
        "stop": stop,
        "wait": wait,
        "cleanup": lambda: scenarios.cleanup(url),
    }

    def work() -> None:
        for each in doing:
            known[each]()

    return forks.wait_for([forks.child(work)])[0]


def send_unserialisable(url: str, topic: str) -> None:
    send(url, topic, [threading.Lock()])


def fork_to_send(url: str, topic: str, values: list[Any], go: str, done: str) -> None:
    """Have a child send one at once, and the others when the file ``go`` is there; returns when it has sent the first."""
    first = Path(f"{done}-first")

    def work() -> None:
        send(url, topic, values[:1])
        first.touch()
        wait_until(Path(go).exists, 60)
        send(url, topic, values[1:])
        Path(done).touch()
        models.sleep(60)

    _children.append(forks.child(work))
    wait_until(first.exists, 60)


def remount(folder: str, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True, stdin=subprocess.DEVNULL)
