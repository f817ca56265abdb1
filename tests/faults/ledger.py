# SPDX-License-Identifier: Apache-2.0
"""Servers that write down on disk what they begin, so that nothing is lost or run twice unseen; tests read it back."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import oslo_messaging

import green_zmq
from tests.contract import models
from tests.contract.endpoints import Endpoint


class Entry(NamedTuple):
    value: str
    server: str
    pid: int


class Ledger(Endpoint):
    """Each execution is a line. Any number of processes write to the file."""

    def __init__(self, label: str, path: str, seconds: float = 0, *, released: bool = True) -> None:
        super().__init__(label, None)
        self.released = released
        self._seconds = seconds
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, ctxt: Any, value: Any = None) -> Any:
        os.write(self._file, json.dumps(Entry(str(value), self.label, os.getpid())).encode() + b"\n")
        return value

    echo = note

    def run(self, ctxt: Any, value: Any, seconds: float = 0, body: str = "", size: int | None = None) -> dict[str, Any]:
        """By whom it was run, and so many characters; by default those that came."""
        self.note(ctxt, value)
        models.wait_until(lambda: self.released, 200)
        models.sleep(self._seconds + seconds)
        return {"value": value, "server": self.label, "pid": os.getpid(), "body": body if size is None else "x" * size}

    def hold(self, ctxt: Any, value: Any = None) -> Any:
        return self.run(ctxt, value)["value"]

    def free(self, ctxt: Any) -> None:
        """Let the handlers go that hold what they are to run."""
        self.released = True


def serve(
    url: str,
    topic: str,
    server: str,
    path: str,
    pool: int | None = None,
    tag: str = "",
    seconds: float = 0,
    released: bool = True,
) -> None:
    """In a worker, an RPC server that is known by its name, as the contract's.

    :param seconds: that each run takes at least.
    :param released: else what is to be run is held until it is.
    """
    from tests.contract import scenarios  # which makes a worker of the process; tests that only read are none

    endpoint = Ledger(server, path, seconds, released=released)
    created = green_zmq.get_rpc_server(
        scenarios.transport(url, tag),
        oslo_messaging.Target(topic=topic, server=server),
        [endpoint],
        executor=scenarios.EXECUTORS[models.name],
    )
    created.start(override_pool_size=pool)
    scenarios._servers[server] = (created, endpoint)


def read(path: str | Path) -> list[Entry]:
    *lines, _ = Path(path).read_text().split("\n")  # the last one may still be being written
    return [Entry(*json.loads(line)) for line in lines]


def written(path: str | Path) -> set[str]:
    return {entry.value for entry in read(path)}


def all_once(path: str | Path, expected: Iterable[str]) -> dict[str, int]:
    """Each of these was run, and nothing was run twice; as figures."""
    times = Counter(entry.value for entry in read(path))
    lost, twice = set(expected) - set(times), {value for value, count in times.items() if count > 1}
    assert not lost | twice, f"lost {lost}, run twice {twice}"
    return {"lost": len(lost), "twice": len(twice)}
