# SPDX-License-Identifier: Apache-2.0
"""Who can take a message: what is known of the directory, and the choice of one server. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from green_zmq.wire import VERSION, Key


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def endpoint(address: str, port: int | str) -> str:
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


class Node(NamedTuple):
    """A process that listens.

    ``instance`` is drawn anew whenever a process begins to listen, so that one that took over an address is never
    mistaken for its predecessor.
    """

    instance: bytes
    host: str
    port: int
    hostname: str
    pid: int
    model: str
    wire: int = VERSION
    # The largest message it takes, bytes.
    max_bytes: int = 256 << 20

    @property
    def address(self) -> str:
        return endpoint(self.host, self.port)

    def __str__(self) -> str:
        return f"{self.hostname} (pid {self.pid}, {self.address})"


class Entry(NamedTuple):
    """One listener: a server name on a topic, and the node that serves it."""

    server: str
    node: Node


class Topic(NamedTuple):
    exchange: str
    name: str


class Table:
    """What this process knows of the directory: for each topic that was ever asked for, who serves it.

    A topic that was never looked up is *unknown* (``None``), one that nobody serves is empty. There is no negative
    cache: whoever finds an empty answer looks again.
    """

    def __init__(self) -> None:
        self._topics: dict[Topic, tuple[Entry, ...]] = {}

    def __contains__(self, topic: Topic) -> bool:
        return topic in self._topics

    @property
    def topics(self) -> list[Topic]:
        return list(self._topics)

    def update(self, topic: Topic, entries: Iterable[Entry]) -> bool:
        """Take over what the directory says; whether that is news."""
        new = tuple(sorted(entries, key=lambda entry: (entry.server, entry.node.instance)))
        if self._topics.get(topic) == new:
            return False
        self._topics[topic] = new
        return True

    def forget(self, topic: Topic) -> None:
        self._topics.pop(topic, None)

    def discard(self, instance: bytes, key: Key | None = None) -> list[Topic]:
        """Take a node off the table, or off one address only; the topics that changed. The directory may bring it back."""
        changed = []
        for topic, entries in self._topics.items():
            if key is not None and topic != key[:2]:
                continue
            kept = tuple(
                e for e in entries if e.node.instance != instance or (key is not None and key.server not in ("", e.server))
            )
            if kept != entries:
                self._topics[topic] = kept
                changed.append(topic)
        return changed

    def nodes(self, key: Key) -> list[Node] | None:
        """The nodes that can take a message to ``key``, each once, in a stable order; None if that was never asked."""
        entries = self._topics.get(Topic(key.exchange, key.topic))
        if entries is None:
            return None
        return list(dict.fromkeys(e.node for e in entries if key.server in ("", e.server)))


class Loaded(Protocol):
    """What a choice looks at: how many requests from here a server has, and whether it can take one now."""

    @property
    def load(self) -> int: ...

    def usable(self, key: Key, now: float) -> bool: ...


_L = TypeVar("_L", bound=Loaded)


def choose(servers: Sequence[_L], key: Key, turn: int, now: float) -> tuple[int, _L] | None:
    """The server that can take a message to ``key`` and has the fewest requests outstanding from here, ties in turn.

    Equal idle servers so get strict round robin, beginning at ``turn``. Returns the turn for the next choice with it; None:
    none is usable.
    """
    count = len(servers)
    if count == 1:
        return (0, servers[0]) if servers[0].usable(key, now) else None
    best = None
    least = -1
    for i in range(turn, turn + count):
        server = servers[i % count]
        load = server.load
        if (best is None or load < least) and server.usable(key, now):
            best = (i % count + 1, server)
            if load == 0:
                break
            least = load
    return best
