# SPDX-License-Identifier: Apache-2.0
"""The directory of one process, for tests: ``zmq+memory://``. All transports of the process share it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterable

from green_zmq.config import Settings
from green_zmq.directory.base import Listing, Stale
from green_zmq.routing import Entry, Node, Topic


class _Shared:
    """What all transports of the process have in common."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.version = 0
        self.since: dict[tuple[Topic, str, Node], float] = {}
        self.expires: dict[Node, float] = {}


_shared = _Shared()


class MemoryDirectory:
    def __init__(self, expire: float) -> None:
        self._expire = expire
        self._seen = -1

    def announce(self, node: Node, listeners: Collection[tuple[Topic, str]]) -> None:
        now = time.monotonic()
        with _shared.lock:
            old = {entry for entry in _shared.since if entry[2] == node}
            new = {(topic, server, node) for topic, server in listeners}
            for entry in old - new:
                del _shared.since[entry]
            for entry in new - old:
                _shared.since[entry] = now
            _shared.expires[node] = now + self._expire
            _shared.version += old != new

    def withdraw(self, instance: bytes) -> bool:
        now = time.monotonic()
        with _shared.lock:
            self._drop_dead(now)
            found = [node for node in _shared.expires if node.instance == instance]
            for node in found:
                del _shared.expires[node]
            self._drop_dead(now)
            return bool(found)

    def look_up(self, topic: Topic) -> list[Entry]:
        with _shared.lock:
            self._drop_dead(time.monotonic())
            return [Entry(server, node) for (t, server, node) in _shared.since if t == topic]

    def forget(self, topic: Topic) -> None: ...

    def is_alive(self, node: Node) -> bool:
        with _shared.lock:
            self._drop_dead(time.monotonic())
            return node in _shared.expires

    def listings(self) -> Iterable[Listing]:
        now = time.monotonic()
        with _shared.lock:
            self._drop_dead(now)
            return [
                Listing(topic.exchange, topic.name, server, node, now - since)
                for (topic, server, node), since in _shared.since.items()
            ]

    def sweep(self, *, dry_run: bool = False) -> list[Stale]:
        now = time.monotonic()
        with _shared.lock:
            dead = {node for node, expires in _shared.expires.items() if expires <= now}
            stale = [Stale(*topic, server, node.instance) for topic, server, node in _shared.since if node in dead]
            if not dry_run:
                self._drop_dead(now)
            return stale

    def changes(self) -> Collection[Topic] | None:
        seen, self._seen = self._seen, _shared.version
        return () if seen == self._seen else None

    def wait(self, wake: int) -> None:
        os.eventfd_read(wake)

    def close(self) -> None: ...

    def _drop_dead(self, now: float) -> None:
        dead = [node for node, expires in _shared.expires.items() if expires <= now]
        for node in dead:
            del _shared.expires[node]
        for entry in [entry for entry in _shared.since if entry[2] not in _shared.expires]:
            del _shared.since[entry]
            _shared.version += 1


def open_directory(settings: Settings) -> MemoryDirectory:
    global _shared
    if _shared.pid != os.getpid():  # a parent's listeners are not its child's
        _shared = _Shared()
    return MemoryDirectory(settings.expire)
