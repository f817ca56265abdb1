# SPDX-License-Identifier: Apache-2.0
"""What a directory must provide: who serves what. Soft state: everything in it is written again by whom it is about."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple, Protocol

from green_zmq.routing import Entry, Node, Topic


class Listing(NamedTuple):
    """One listener, as operators see it. ``age`` is the seconds since it began to listen."""

    exchange: str
    topic: str
    server: str
    node: Node
    age: float


class Directory(Protocol):
    """All but :meth:`changes` may block, and are called from one native thread.

    All raise :class:`green_zmq.errors.DirectoryError` where the directory cannot be read or written.
    """

    def announce(self, node: Node, listeners: Collection[tuple[Topic, str]]) -> None:
        """Write the node's record anew, with exactly these listeners; it expires unless announced again in time."""

    def withdraw(self, node: Node) -> None:
        """Remove the node's record."""

    def look_up(self, topic: Topic) -> list[Entry]:
        """The live listeners of a topic, as of now."""

    def is_alive(self, node: Node) -> bool:
        """Whether the node's record is there and its process not known to be gone."""

    def listings(self) -> Iterable[Listing]:
        """All live listeners."""

    def sweep(self) -> int:
        """Remove what has expired; how many nodes that were."""

    def changes(self) -> Collection[Topic] | None:
        """The topics that may have changed since this was last asked; None: any. Never blocks, costs microseconds."""

    def close(self) -> None: ...
