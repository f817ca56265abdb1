# SPDX-License-Identifier: Apache-2.0
"""In a worker: servers and clients that it forks, to be killed; and callers who write down what became of each call.

Starting a process of Python takes a second of CPU; a fork of one that has imported everything, and opened nothing, does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import random
import time
import weakref
from collections.abc import Callable
from typing import Any

import oslo_messaging

import green_zmq
from tests.contract import models, scenarios
from tests.contract.models import parallel
from tests.contract.scenarios import EXECUTORS, transport
from tests.faults import forks

_callers: dict[str, _Callers] = {}


class Ledger:
    """An endpoint that writes down what it runs, and in which process, before it does."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, entry: object) -> None:
        os.write(self._file, f"{entry} {os.getpid()}\n".encode())

    def run(self, ctxt: Any, entry: object, seconds: float = 0.0, body: str = "", size: int = 0) -> list[Any]:
        self.write(entry)
        models.sleep(seconds)
        return [os.getpid(), "x" * size]


# Processes to be killed.


def fork(url: str, doing: str, **args: Any) -> int:
    """Have a process do that until it is killed, or its parent is; its pid."""
    transport(url)  # as services do it: made by the parent, first used by its children
    return forks.child(functools.partial(_in_child, os.getpid(), functools.partial(globals()[doing], url, **args)))


def _in_child(parent: int, fn: Callable[[], None]) -> None:
    # Gevent's green threads survive a fork, so also the one that reads commands: they are for the parent.
    os.dup2(os.pipe()[0], 0)
    fn()
    while os.getppid() == parent:
        models.sleep(0.1)


def serve(url: str, topic: str, name: str, ledger: str) -> None:
    """A server whose ledger has a line when it is found."""
    endpoint = Ledger(ledger)
    server = green_zmq.get_rpc_server(
        transport(url), oslo_messaging.Target(topic=topic, server=name), [endpoint], executor=EXECUTORS[models.name]
    )
    server.start()
    endpoint.write("serves")


def use(url: str, topic: str, name: str, ledger: str, sent: int, returned: int) -> None:
    """A client that has two calls under way all the time: one that takes a while, and one with so much to be carried."""
    client = oslo_messaging.get_rpc_client(transport(url), oslo_messaging.Target(topic=topic), timeout=2)
    told = Ledger(ledger)

    def go_on(what: str, **args: Any) -> None:
        for i in itertools.count():
            told.write(f"{name}-begins-{what}-{i}")
            with contextlib.suppress(oslo_messaging.MessagingTimeout):
                client.call({}, "run", entry=f"{name}-{what}-{i}", **args)

    rests = functools.partial(go_on, "rest", seconds=1.0)
    parallel([rests, functools.partial(go_on, "carry", body="x" * sent, size=returned)])


# Callers.


class _Callers:
    def __init__(self, url: str, topic: str, callers: int, servers: list[str]) -> None:
        self.calls: list[dict[str, Any]] = []
        self.answered = [0.0] * callers
        self.over = False
        client = oslo_messaging.get_rpc_client(transport(url), oslo_messaging.Target(topic=topic), timeout=60)
        clients = [client.prepare(server=servers[i % len(servers)] or None) for i in range(callers)]
        self.outcomes = parallel([functools.partial(self._call, i, each) for i, each in enumerate(clients)])

    def _call(self, caller: int, client: Any) -> None:
        for entry in itertools.count(caller, len(self.answered)):
            if self.over:
                return
            call: dict[str, Any] = {"entry": str(entry), "caller": caller, "began": time.monotonic()}
            # Some are acknowledged before they are answered, some are answered at once.
            seconds = random.choice([0.0, 0.01, 0.02, 0.1])
            try:
                call["by"] = client.call({}, "run", entry=entry, seconds=seconds)[0]
                self.answered[caller] = call["began"]
            except Exception as error:
                call["error"] = [cls.__name__ for cls in type(error).__mro__]
                call["text"], call["server"] = str(error), getattr(error, "server", "")
            call["ended"] = time.monotonic()
            self.calls.append(call)


def start_calling(url: str, topic: str, callers: int, servers: list[str]) -> None:
    """:param servers: each caller has one of them to call; "" is any of the topic."""
    _callers[topic] = _Callers(url, topic, callers, servers)


def answered(topic: str, since: float) -> bool:
    """Whether every caller has had an answer to a call that it made since then."""
    return all(began > since for began in _callers[topic].answered)


def stop_calling(topic: str) -> list[dict[str, Any]]:
    """What became of each call."""
    callers = _callers.pop(topic)
    callers.over = True
    for outcome in callers.outcomes:
        outcome.result(90)
    return callers.calls


# What a server holds.


def return_memory() -> None:
    """Give large pieces back to the system when they are freed; the C library else keeps some, for each of its arenas."""
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)


def held(url: str) -> dict[str, int]:
    """By the receiving side of a transport."""
    engine = transport(url)._driver._engine
    receiver = engine._receiver
    peers = list(receiver._peers.values())
    return {
        "senders": len(peers),
        "records": sum(len(peer.records) for peer in peers),
        "replies": len(receiver._replies),
        "reply bytes": receiver._reply_bytes,
        "unanswered": len(receiver._unanswered),
        "messages": sum(len(each.waiting) + len(each.unbegun) for each in engine.server._all()),
    }


class _Large:
    """Something that is handed to a loop, and can be referred to weakly."""


def wait_until_the_last_is_dropped(url: str) -> None:
    """What a loop was handed last goes as soon as that is done, and not when it is handed something else."""
    engine = transport(url)._driver._engine
    models.wait_until(lambda: not engine._resolver._asked)
    large = _Large()
    reference = weakref.ref(large)
    engine._loop.post(lambda _: None, large)
    del large
    models.wait_until(lambda: reference() is None)


# Casts that are still to be delivered.


def cast_and_end(urls: list[str], topic: str, casts: int) -> None:
    """What a program does last: casts over each of several transports, none of which it cleans up."""
    for url in urls:
        scenarios.casts_together(url, topic, "note", list(range(casts)))
    print("ends", flush=True)
