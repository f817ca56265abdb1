# SPDX-License-Identifier: Apache-2.0
"""Rounds of scenarios: every contender in turn, warm, in the same processes."""

from __future__ import annotations

import contextlib
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from green_zmq.bench.processes import Ended, Process
from green_zmq.bench.scenarios import BARE, DRIVER, Ratio, Round, Scenario, can, middle, ratios, spread, turns

# What was sent is lost if nothing of it arrives for so many seconds.
_LOST: Final = 10.0


class Outcome(NamedTuple):
    """Of one scenario in one model.

    :ivar rounds: the median of each contender.
    :ivar ratios: of the driver to each of the others.
    """

    model: str
    scenario: Scenario
    rounds: Mapping[str, Round]
    ratios: Mapping[str, Ratio]


def contenders(folder: str, urls: list[str], servers: int) -> dict[str, str]:
    """Their URLs by their names: the driver with a directory of its own, the bare loop, and any others."""
    found = {
        DRIVER: f"zmq://?directory_path={folder}/directory.sqlite&notification_path={folder}/notifications.sqlite",
        BARE: "bare://" + ",".join(f"127.0.0.1:{_free_port()}" for _ in range(servers)),
    }
    for url in urls:
        scheme = url.partition(":")[0]
        found[scheme if scheme not in found else f"{scheme} {len(found)}"] = url
    return found


class Fleet:
    """The processes of one model: one that sends, and those of the servers, which begin when they are needed.

    :ivar oslo_executors: whether its servers run what comes with oslo.messaging's own executors.
    """

    def __init__(self, model: str, stack: contextlib.ExitStack, oslo_executors: bool = False) -> None:
        self.model = model
        self.oslo_executors = oslo_executors
        self._stack = stack
        self._servers: list[Process] = []
        self.client = stack.enter_context(Process(model))

    def servers(self, count: int) -> list[Process]:
        while len(self._servers) < count:
            self._servers.append(self._stack.enter_context(Process(self.model)))
        return self._servers[:count]

    def leave(self, topics: Iterable[str]) -> None:
        """Nobody listens to these any more; of processes that have ended nothing is left."""
        for topic in topics:
            for server in self._servers:
                with contextlib.suppress(Ended):
                    server.ask("leave", topic=topic)

    def measure(
        self, scenario: Scenario, urls: Mapping[str, str], rounds: int, seconds: float, done: Callable[[], None] = lambda: None
    ) -> Outcome:
        """
        :param urls: of the contenders.
        :param seconds: of sending, of one contender in one round.
        :param done: called after each of them.
        :raises Ended: a process has failed.
        """
        able = {name: url for name, url in urls.items() if can(name, scenario)}
        topics = {name: f"bench-{uuid.uuid4().hex[:8]}" for name in able}
        shares = spread(scenario.servers)
        servers = self.servers(len(shares))
        found: dict[str, list[Round]] = {name: [] for name in able}
        try:
            for name, url in able.items():
                for server, share in zip(servers, shares, strict=True):
                    how = {"pattern": scenario.pattern, "oslo_executors": self.oslo_executors}
                    server.ask("serve", url=url, topic=topics[name], servers=share, **how)
                self._round(scenario, url, topics[name], servers, min(seconds, 0.5))
            for i in range(rounds):
                for name in turns(list(able), i):
                    found[name].append(self._round(scenario, able[name], topics[name], servers, seconds))
                    done()
        finally:
            self.leave(topics.values())
        return Outcome(self.model, scenario, {name: middle(each) for name, each in found.items()}, ratios(found))

    def _round(self, scenario: Scenario, url: str, topic: str, servers: list[Process], seconds: float) -> Round:
        before = [process.ask("usage")["cpu"] for process in (self.client, *servers)]
        begin = sum(server.ask("arrived", topic=topic)[0] for server in servers)
        how = {"pattern": scenario.pattern, "senders": scenario.senders, "size": scenario.size, "seconds": seconds}
        sent: dict[str, Any] = self.client.ask("send", url=url, topic=topic, **how)
        count, ended, lost = sent["count"], sent["ended"], 0
        if scenario.pattern != "call":
            count *= scenario.servers if scenario.pattern == "fanout" else 1
            ended, lost = _wait(servers, topic, begin, count)
        client, *others = (
            process.ask("usage")["cpu"] - used for process, used in zip((self.client, *servers), before, strict=True)
        )
        rate = (count - lost) / (ended - sent["began"])
        return Round(rate, sent["p50"], sent["p99"], client / count * 1e6, sum(others) / count * 1e6, lost)


@contextlib.contextmanager
def fleet(model: str, oslo_executors: bool) -> Iterator[Fleet]:
    with contextlib.ExitStack() as stack:
        yield Fleet(model, stack, oslo_executors)


def _wait(servers: list[Process], topic: str, before: int, count: int) -> tuple[float, int]:
    """Until all has arrived: when the last did, and how many are lost."""
    found, give_up = -1, 0.0
    while True:
        arrived = [server.ask("arrived", topic=topic) for server in servers]
        now, latest = sum(each for each, _ in arrived) - before, max(last for _, last in arrived)
        if now >= count:
            return latest, 0
        if now != found:
            found, give_up = now, time.monotonic() + _LOST
        elif time.monotonic() > give_up:
            return latest, count - now
        time.sleep(0.005)  # to be asked takes from what is measured


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
