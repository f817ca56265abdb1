# SPDX-License-Identifier: Apache-2.0
"""In a worker: servers that write down on disk what they begin, so that nothing is lost or run twice unseen."""

from __future__ import annotations

import os
from typing import Any

import oslo_messaging

import green_zmq
from tests.contract import models, scenarios
from tests.contract.endpoints import Endpoint


class Ledger(Endpoint):
    """Each value is a line of its own. Any number of processes write to the file."""

    def __init__(self, label: str, path: str) -> None:
        super().__init__(label, scenarios.call)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _write(self, value: Any) -> None:
        os.write(self._file, f"{value}\n".encode())

    def echo(self, ctxt: Any, value: Any = None) -> Any:
        self._write(value)
        return value

    def note(self, ctxt: Any, value: Any) -> Any:
        self._write(value)
        return value

    def hold(self, ctxt: Any, value: Any = None) -> Any:
        self._write(value)
        models.wait_until(lambda: self.released, 200)
        return value

    def free(self, ctxt: Any) -> None:
        """Let the handlers go that were told to hold."""
        self.released = True


def serve(url: str, topic: str, server: str, path: str, pool: int | None = None, tag: str = "") -> None:
    """As the contract's, known by its name."""
    endpoint = Ledger(server, path)
    created = green_zmq.get_rpc_server(
        scenarios.transport(url, tag),
        oslo_messaging.Target(topic=topic, server=server),
        [endpoint],
        executor=scenarios.EXECUTORS[models.name],
    )
    created.start(override_pool_size=pool)
    scenarios._servers[server] = (created, endpoint)
