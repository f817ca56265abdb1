# SPDX-License-Identifier: Apache-2.0
"""What a store of notifications must provide: it keeps what was sent until every pool of listeners has processed it.

A topic includes the priority, as oslo.messaging has it: ``notifications.info``. Each *pool* of a topic gets each message once;
its members, one *consumer* for each listener, share them. A consumer *takes* messages, and *acknowledges* those that are
processed; what it has when it dies is taken over by another of its pool, as is what it gives back.

The default pool, ``""``, has everything that a topic has kept, whenever its first listener comes. A pool that has a name begins
with the first message after its first listener.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from typing import NamedTuple, Protocol

from green_zmq.routing import Topic


class Busy(Exception):
    """What was asked for cannot be done without waiting for others; nothing was done."""


class Taken(NamedTuple):
    """A message that a consumer has.

    :ivar name: what the store knows it by, within its topic.
    :ivar tries: how often it was taken in this pool, this time included.
    """

    topic: Topic
    name: str
    body: bytes
    tries: int


class Dead(NamedTuple):
    """A message that was put aside.

    :ivar name: what the store knows it by, among all that were put aside.
    :ivar age: seconds since it was put aside.
    """

    name: str
    topic: Topic
    pool: str
    age: float
    tries: int
    body: bytes


class Pool(NamedTuple):
    """
    :ivar waiting: messages that nobody has taken.
    :ivar taken: messages that consumers have.
    :ivar consumers: how many there are.
    :ivar oldest: the age of the oldest message that is not acknowledged, seconds; None: all are.
    """

    name: str
    waiting: int
    taken: int
    consumers: int
    oldest: float | None


class State(NamedTuple):
    """What a store has of one topic.

    :ivar kept: messages, also those that some pool has processed already.
    :ivar oldest: the age of the oldest of them, seconds; None: there is none.
    :ivar dropped: messages that went because of the bounds before every pool had processed them, since the topic began.
    """

    topic: Topic
    kept: int
    oldest: float | None
    dropped: int
    pools: Sequence[Pool]


class Consumer(Protocol):
    """One listener's share of a pool. Used by one native thread."""

    def take(self, most: int) -> Sequence[Taken]:
        """Up to so many messages, of each topic the oldest first; none if there is none. Never waits for one.

        Also tells others that this consumer lives, and takes over from those that do not: so it is to be called whenever
        :meth:`wait` returns, with 0 if nothing is wanted.
        """

    def acknowledge(self, messages: Collection[Taken]) -> None:
        """They are processed: nobody of this pool gets them any more."""

    def give_back(self, messages: Collection[Taken], *, tried: bool) -> None:
        """Somebody else of the pool, or this consumer, is to take them.

        :param tried: whether it was attempted to process them; else this time does not count.
        """

    def put_aside(self, messages: Collection[Taken]) -> None:
        """Nobody of this pool gets them any more, unless they are put back."""

    def wait(self, wake: int, seconds: float) -> None:
        """Block until there may be more to take, that eventfd is written to, or so many seconds have passed.

        Takes what was written to the eventfd. May return before. Nothing is waited for but the eventfd and the time if the last
        call of :meth:`take` was for 0.
        """

    def close(self) -> None:
        """Leave the pool: others take at once what this consumer still has, as if it was given back untried."""


class Store(Protocol):
    """Used by one native thread. All methods, also of consumers, raise :class:`green_zmq.errors.StoreError`."""

    def append(self, messages: Sequence[tuple[Topic, bytes]]) -> None:
        """Keep them, in this order: all are safe when this returns. If it raises, none is kept as far as is known."""

    def append_at_once(self, topic: Topic, body: bytes) -> Generator[tuple[int, float]]:
        """As :meth:`append`, in a thread that must not be kept waiting, and may be a green one.

        Yields a descriptor that is to be readable before it is resumed, and how many seconds that may be waited for. If it is
        closed before its end, nothing is known of the message.

        :raises Busy: it needs :meth:`append`.
        """

    def trim(self, topics: Collection[Topic]) -> Mapping[Topic, int]:
        """Remove what all pools have processed, and what is beyond the bounds; how many of the latter some pool had not."""

    def consume(self, topics: Collection[Topic], pool: str) -> Consumer:
        """Begin to listen: what is sent from here on, the pool gets. One store has at most one consumer."""

    def overview(self) -> Sequence[State]:
        """All topics."""

    def dead(self) -> Sequence[Dead]:
        """What was put aside, the oldest first. It is bounded like a topic, all pools and topics together."""

    def put_back(self, names: Collection[str]) -> int:
        """Have messages that were put aside taken once more, as new ones of their pool; how many were there."""

    def since(self, topic: Topic, after: str | None) -> tuple[str, Sequence[bytes]]:
        """What was stored of a topic after that place, and the place after it; None: after what is there now.

        No pool is touched by it.
        """

    def close(self) -> None: ...
