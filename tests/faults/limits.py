# SPDX-License-Identifier: Apache-2.0
"""In a worker: what the tests of limits have it do."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from typing import Any

import oslo_messaging
from oslo_messaging.exceptions import MessagingException

from green_zmq.directory.processes import boot_id
from tests.contract import models, scenarios
from tests.contract.models import parallel


def serve_topics(url: str, topic: str, count: int) -> None:
    """Listeners of so many topics in one transport."""

    def answer(batch: list[Any]) -> None:
        for message in batch:
            message.acknowledge()
            message.reply(message.message["args"].get("value"))

    opened = scenarios.transport(url)
    for number in range(count):
        listener = opened._driver.listen(oslo_messaging.Target(topic=f"{topic}-{number}", server="many"), 1, None)
        listener.start(answer)


def send(
    url: str,
    topic: str,
    kind: str,
    values: list[str],
    callers: int,
    load: int = 0,
    size: int = 0,
    **how: Any,
) -> dict[str, Any]:
    """From so many callers at the same time; which values ended well, the errors of the others, and how long it took."""
    client = scenarios._prepared(url, topic, fanout=kind == "fanout", **how)
    send_one = client.call if kind == "call" else client.cast
    args = {"body": "x" * load, "size": size}
    labels: dict[str, str] = {}
    errors: dict[str, str] = {}
    began = time.monotonic()

    def work(mine: list[str]) -> None:
        for value in mine:
            try:
                answer = send_one({}, "run", value=value, **args)
                labels[value] = answer["server"] if answer else ""
            except MessagingException as error:
                errors[value] = f"{type(error).__name__}: {error}"

    for outcome in parallel([functools.partial(work, values[i::callers]) for i in range(callers)]):
        outcome.result(110)
    return {"done": labels, "errors": errors, "seconds": time.monotonic() - began}


def send_to_topics(url: str, topic: str, served: int, count: int, callers: int) -> int:
    """Once to each of so many topics, of which the first are served: calls and casts, and to the others fanouts; how many."""
    opened = scenarios.transport(url)
    done: list[int] = []

    def work(first: int) -> None:
        for number in range(first, count, callers):
            target = oslo_messaging.Target(topic=f"{topic}-{number}", fanout=number >= served)
            client = oslo_messaging.get_rpc_client(opened, target, timeout=30)
            if number < served and number % 2:
                assert client.call({}, "echo", value=number) == number
            else:
                client.cast({}, "echo", value=number)
            done.append(number)

    for outcome in parallel([functools.partial(work, first) for first in range(callers)]):
        outcome.result(110)
    return len(done)


def tables(url: str) -> dict[str, int]:
    """How much a transport remembers of topics and processes."""
    engine = scenarios.transport(url)._driver._engine
    sender, resolver = engine._sender, engine._resolver
    return {
        "topics": len(sender.table.topics),
        "routes": len(sender._routes),
        "links": len(sender._links),
        "busy": len(sender._busy),
        "used": len(resolver._used),
        "stale": len(resolver._stale),
        "asked": len(resolver._asked),
        "again": len(resolver._again_at),
        "held": len(engine._sender._held),
        "records": sum(len(peer.records) for peer in engine._receiver._peers.values()),
        **scenarios.leftovers(url),
    }


# Descriptors.


def begin(url: str) -> None:
    """A transport that has begun its work, and asked nobody for anything yet."""
    driver = scenarios.transport(url)._driver
    driver.listen(oslo_messaging.Target(topic="unused", server="unused"), 1, None)
    models.wait_until(lambda: driver._engine._loop._poller is not None)


def boot() -> str:
    return boot_id()


def snatch(seconds: float) -> None:
    """An application that takes every descriptor as soon as it is free."""

    def take() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                scenarios._hoarded.append(os.dup(0))

    parallel([take], native=True)[0].result()
