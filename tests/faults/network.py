# SPDX-License-Identifier: Apache-2.0
"""In a worker: servers that write down on disk what they run, and callers and casters that go on while a test does harm."""

from __future__ import annotations

import itertools
import json
import os
import time
from typing import Any

import oslo_messaging

import green_zmq
from tests.contract import models
from tests.contract.scenarios import EXECUTORS, transport

_servers: dict[str, Any] = {}
_loads: dict[str, _Load] = {}


class _Endpoint:
    def __init__(self, server: str, ledger: str) -> None:
        self._server = server
        self._ledger = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def run(self, ctxt: Any, value: str, seconds: float = 0, body: str = "") -> list[Any]:
        line = {"value": value, "server": self._server, "at": time.monotonic()}
        os.write(self._ledger, json.dumps(line).encode() + b"\n")
        models.sleep(seconds)
        return [value, body]


def serve(url: str, topic: str, server: str, ledger: str, pool: int | None = None) -> None:
    """Start an RPC server that writes each execution into that file before it does anything else."""
    _servers[server] = created = green_zmq.get_rpc_server(
        transport(url),
        oslo_messaging.Target(topic=topic, server=server),
        [_Endpoint(server, ledger)],
        executor=EXECUTORS[models.name],
    )
    created.start(override_pool_size=pool)


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
        size: int = 0, seconds: float = 0, pause: float = 0.01,
    ) -> None:  # fmt: skip
        client = self._client.prepare(server=server, timeout=timeout)
        body = "x" * size
        for i in itertools.count():
            if self.over:
                return
            value = f"{self._topic} {name} {number} {i}"
            record = {"name": name, "kind": kind, "value": value, "timeout": timeout, "error": None}
            record["began"] = time.monotonic()
            try:
                if kind == "cast":
                    client.cast({}, "run", value=value, seconds=seconds, body=body)
                elif client.call({}, "run", value=value, seconds=seconds, body=body) != [value, body]:
                    record["error"] = "a wrong reply"
            except Exception as error:
                record["error"] = f"{type(error).__name__}: {error}"
            record["ended"] = time.monotonic()
            self.records.append(record)
            if record["error"] is None:
                self.latest[f"{name} {number}"] = record["began"]
            models.sleep(pause)


def start(url: str, topic: str, lines: list[dict[str, Any]]) -> None:
    """Each line: its name; kind (call or cast), server, timeout, size of the body, seconds that it takes; pause between two
    messages, and the count of those who send so."""
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
