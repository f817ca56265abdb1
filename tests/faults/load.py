# SPDX-License-Identifier: Apache-2.0
"""In a worker: callers and casters that go on while a test does harm; their servers are those of the ledger."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import oslo_messaging

from tests.contract import models
from tests.contract.scenarios import transport

_loads: dict[str, _Load] = {}


class _Load:
    """Callers and casters, each message with a value of its own, and what became of each."""

    def __init__(self, url: str, topic: str, lines: list[dict[str, Any]]) -> None:
        self.over = False
        self.records: list[dict[str, Any]] = []
        self.latest: dict[str, float] = {}
        self._client = oslo_messaging.get_rpc_client(transport(url), oslo_messaging.Target(topic=topic))
        self._topic = topic
        functions = [lambda line=line, n=n: self._go_on(n, **line) for line in lines for n in range(line.pop("count", 1))]
        self._outcomes = models.parallel(functions)

    def _go_on(
        self, number: int, name: str, kind: str = "call", server: str | None = None, timeout: float = 30,
        size: int = 0, seconds: tuple[float, ...] = (0,), pause: float = 0.01,
    ) -> None:  # fmt: skip
        client = self._client.prepare(server=server, timeout=timeout)
        body, caller = "x" * size, f"{name} {number}"
        for i in itertools.count():
            if self.over:
                return
            value = f"{self._topic} {caller} {i}"
            message = {"value": value, "seconds": random.choice(seconds), "body": body}
            record = {"name": name, "caller": caller, "kind": kind, "value": value, "timeout": timeout, "error": None}
            record["began"] = time.monotonic()
            try:
                if kind == "cast":
                    client.cast({}, "run", **message)
                else:
                    reply = client.call({}, "run", **message)
                    record["by"] = reply["pid"]
                    if (reply["value"], reply["body"]) != (value, body):
                        record["error"] = "a wrong reply"
            except Exception as error:
                record["error"] = f"{type(error).__name__}: {error}"
                record["names"] = [cls.__name__ for cls in type(error).__mro__]
                record["server"] = getattr(error, "server", None)
            record["ended"] = time.monotonic()
            self.records.append(record)
            if record["error"] is None:
                self.latest[caller] = record["began"]
            models.sleep(pause)


def start(url: str, topic: str, lines: list[dict[str, Any]]) -> None:
    """Each line: its name; kind (call or cast), server, timeout, size of the body, seconds of which it takes some; pause
    between two messages, and the count of those who send so."""
    _loads[topic] = _Load(url, topic, lines)


def latest(topic: str) -> dict[str, float]:
    """When the latest message began that went well, for each who sends."""
    return dict(_loads[topic].latest)


def stop(topic: str) -> list[dict[str, Any]]:
    """What became of each message, once all have ended."""
    load = _loads.pop(topic)
    load.over = True
    for outcome in load._outcomes:
        outcome.result(90)
    return load.records
