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


class Stale(NamedTuple):
    """A listener whose process is gone, or does not have it any more."""

    exchange: str
    topic: str
    server: str
    instance: bytes


class Directory(Protocol):
    """All but :meth:`changes` may block, and are called from one native thread.

    All raise :class:`green_zmq.errors.DirectoryError` where the directory cannot be read or written.
    """

    def announce(self, node: Node, listeners: Collection[tuple[Topic, str]]) -> None:
        """Write the node's record anew, with exactly these listeners; it expires unless announced again in time."""

    def withdraw(self, instance: bytes) -> bool:
        """Remove a node's record and its listeners; whether it was there."""

    def look_up(self, topic: Topic) -> list[Entry]:
        """The live listeners of a topic, as of now."""

    def forget(self, topic: Topic) -> None:
        """It is not asked for any more: its changes need not be told."""

    def is_alive(self, node: Node) -> bool:
        """Whether the node's record is there and its process not known to be gone."""

    def listings(self) -> Iterable[Listing]:
        """All live listeners."""

    def sweep(self, *, dry_run: bool = False) -> list[Stale]:
        """Remove what was left behind, unless it is only asked for; the listeners that were, or would be, removed."""

    def changes(self) -> Collection[Topic] | None:
        """The topics that were looked up and may have changed since this was last asked; None: any.

        Never blocks, costs microseconds.
        """

    def wait(self, wake: int) -> None:
        """Block until that eventfd is written to, and take what was written. May return before if there is news."""

    def close(self) -> None: ...
