# SPDX-License-Identifier: Apache-2.0
"""In a worker: callers that go on calling while a test breaks something."""

from __future__ import annotations

from collections import Counter
from typing import Any

import oslo_messaging

from tests.contract import models
from tests.contract.scenarios import transport

_loads: dict[str, _Load] = {}


class _Load:
    """Callers that call until told to stop, each server in turn, and what became of their calls."""

    def __init__(self, url: str, topic: str, callers: int, servers: list[str], timeout: float) -> None:
        self.done: Counter[str] = Counter()
        self.errors: list[str] = []
        self.over = False
        self.wrong = 0
        client = oslo_messaging.get_rpc_client(transport(url), oslo_messaging.Target(topic=topic), timeout=timeout)
        self._clients = [client.prepare(server=server or None) for server in servers]
        self._outcomes = models.parallel([lambda n=n: self._call(n) for n in range(callers)])  # type: ignore[misc]

    def _call(self, caller: int) -> None:
        number = caller
        while not self.over:
            client = self._clients[number % len(self._clients)]
            try:
                if client.call({}, "echo", value=[caller, number]) != [caller, number]:
                    self.wrong += 1
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                if len(self.errors) > 1000:
                    return
            self.done[str(caller)] += 1
            number += 1

    def end(self) -> dict[str, Any]:
        self.over = True
        for outcome in self._outcomes:
            outcome.result(60)
        return {"calls": sum(self.done.values()), "errors": self.errors, "wrong": self.wrong}


def start(url: str, topic: str, callers: int, servers: list[str], timeout: float = 20) -> None:
    """:param servers: called in turn; "" is any of the topic."""
    _loads[topic] = _Load(url, topic, callers, servers, timeout)


def done(topic: str) -> dict[str, int]:
    """The calls that each caller has made."""
    return dict(_loads[topic].done)


def stop(topic: str) -> dict[str, Any]:
    return _loads.pop(topic).end()
