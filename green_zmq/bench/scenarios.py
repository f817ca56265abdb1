# SPDX-License-Identifier: Apache-2.0
"""What is measured, and what is made of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final, NamedTuple

KIB: Final = 1 << 10
MIB: Final = 1 << 20

# Contenders that every run has: the driver, and the bare loop.
DRIVER: Final = "zmq"
BARE: Final = "bare"


class Scenario(NamedTuple):
    """
    :ivar pattern: ``call``, ``cast``, ``fanout`` or ``notification``.
    :ivar senders: of one process, that send at the same time, each one message after the other.
    :ivar servers: that listen, in up to four processes.
    :ivar size: of the payload, in bytes; the answer to a call has the same.
    """

    pattern: str
    senders: int
    servers: int = 1
    size: int = 100

    @property
    def name(self) -> str:
        servers = f"x{self.servers}" if self.servers > 1 else ""
        size = f"-{size_of(self.size)}" if self.size != 100 else ""
        return f"{self.pattern}-{self.senders}{servers}{size}"

    @property
    def text(self) -> str:
        who = {"call": "caller", "notification": "notifier"}.get(self.pattern, "sender")
        servers = f", {self.servers} servers" if self.servers > 1 else ""
        size = f", {size_of(self.size)}" if self.size != 100 else ""
        return f"{self.pattern}, {self.senders} {who}{'s' * (self.senders > 1)}{servers}{size}"

    @property
    def unit(self) -> str:
        return "deliveries" if self.pattern == "fanout" else f"{self.pattern}s"


SCENARIOS: Final = (
    Scenario("call", 1),
    Scenario("call", 8),
    Scenario("call", 64),
    Scenario("call", 256),
    Scenario("call", 64, servers=4),
    Scenario("call", 8, size=10 * KIB),
    Scenario("call", 1, size=MIB),
    Scenario("call", 1, size=16 * MIB),
    Scenario("cast", 1),
    Scenario("cast", 64),
    Scenario("fanout", 1, servers=8),
    Scenario("fanout", 1, servers=64),
    Scenario("notification", 1),
)


class Round(NamedTuple):
    """One contender's round.

    :ivar rate: messages a second, until the last has arrived.
    :ivar p50: ms that half of the senders waited for one at the most.
    :ivar p99: the same of 99 %.
    :ivar client: CPU µs of the senders' process for one.
    :ivar server: CPU µs of the servers' processes for one.
    :ivar lost: messages that did not arrive.
    """

    rate: float
    p50: float
    p99: float
    client: float
    server: float
    lost: int


class Ratio(NamedTuple):
    """Of the driver's rate to another's, in rounds that were run beside each other."""

    median: float
    least: float
    most: float


def can(contender: str, scenario: Scenario) -> bool:
    """The bare loop has no fanouts and no notifications."""
    return contender != BARE or scenario.pattern in ("call", "cast")


def middle(rounds: Sequence[Round]) -> Round:
    """The median of each value; what is lost is the sum."""
    rate, p50, p99, client, server, _ = (median(values) for values in zip(*rounds, strict=True))
    return Round(rate, p50, p99, client, server, sum(each.lost for each in rounds))


def ratios(rounds: Mapping[str, Sequence[Round]]) -> dict[str, Ratio]:
    """Of the driver to each of the others."""
    found = {}
    for name, others in rounds.items():
        if name != DRIVER and DRIVER in rounds:
            each = [ours.rate / theirs.rate for ours, theirs in zip(rounds[DRIVER], others, strict=True) if theirs.rate]
            if each:
                found[name] = Ratio(median(each), min(each), max(each))
    return found


def turns(names: Sequence[str], round: int) -> Sequence[str]:
    """The order of a round: each goes first in turn, so that a drift of the machine favours none."""
    return names[:: -1 if round % 2 else 1]


def spread(servers: int, processes: int = 4) -> list[list[str]]:
    """The names of servers, by the process that they are in."""
    names = [f"server-{i}" for i in range(servers)]
    return [part for i in range(processes) if (part := names[i::processes])]


def size_of(size: int) -> str:
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size // unit}{name}"
    return f"{size}B"
