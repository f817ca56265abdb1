# SPDX-License-Identifier: Apache-2.0
"""A server stands still (SIGSTOP), and goes on (SIGCONT)."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.contract.harness import MODELS, Fleet, Raised, following, wait_until
from tests.faults.ledger import all_once, read, written
from tests.servers import RedisServer

pytestmark = pytest.mark.slow

Figures = Callable[..., None]
# What the machine may take, seconds, until what has happened is seen from here.
MARGIN = 3.0
# Calls, and casts, of each kind.
COUNT = 20


class Still:
    """A client with two servers, of which one, the victim, stands still for a while. All that is run is in a ledger."""

    def __init__(self, fleet: Fleet, model: str, url: str, folder: Path) -> None:
        self.client, self.victim = fleet.start(model), fleet.start(following(model))
        self.other = fleet.start(following(following(model)))
        self.url = url
        self.topic = f"topic-{model}"
        self.model = model
        self._ledger = folder / f"ledger-{model}"
        self._sent: list[str] = []
        self._load: Future[Any] = Future()
        self.notice = 0.0
        self.recover = 0.0

    def call(self, value: str, method: str = "note") -> Future[Any]:
        """To the victim."""
        self._sent.append(value)
        how = {"url": self.url, "topic": self.topic, "server": "victim", "method": method, "timeout": 200}
        return self.client.begin("call", args={"value": value}, **how)

    def casts(self, name: str) -> Future[Any]:
        """To the victim."""
        values = [f"{name}-{i}" for i in range(COUNT)]
        self._sent += values
        how = {"url": self.url, "topic": self.topic, "server": "victim", "method": "note"}
        return self.client.begin("casts_together", values=values, **how)

    def run(self, seconds: float, limit: float) -> list[Future[Any]]:
        """The calls that the victim was sent before it was known to stand still, when it has done so and gone on.

        :param limit: within which it must be noticed.
        """
        client, victim = self.client, self.victim
        how = {"url": self.url, "topic": self.topic}
        victim.run("faults.ledger.serve", **how, server="victim", path=str(self._ledger), pool=4, released=False)
        victim.run("serve", url=self.url, topic=f"{self.topic}-aside", server="aside")
        self.other.run("faults.ledger.serve", **how, server="other", path=str(self._ledger))
        early = [self.call(f"running-{i}", "hold") for i in range(4)]
        wait_until(lambda: len(read(self._ledger)) == 4)
        self.casts("accepted").result(20)
        client.run("load.start", **how, callers=4, servers=[""], timeout=200)
        wait_until(lambda: sum(client.run("load.done", topic=self.topic).values()) > 100)
        lost = self.lost_connections()
        victim.signal(signal.SIGSTOP)
        stopped = time.monotonic()
        early += [self.call(f"written-{i}") for i in range(COUNT)]
        casts = [self.casts("written-cast")]
        wait_until(lambda: time.monotonic() > stopped + limit / 3)
        self._load = client.begin("load.stop", topic=self.topic)
        wait_until(lambda: self.lost_connections() > lost, seconds, "its standstill to be noticed")
        self.notice = time.monotonic() - stopped
        assert self.notice < limit
        casts.append(self.casts("waiting-cast"))
        late = [self.call(f"waiting-{i}") for i in range(COUNT)]
        while time.monotonic() < stopped + seconds:
            assert client.run("calls", **how, method="who", count=COUNT) == ["other"] * COUNT
            time.sleep(0.2)  # calls all along the stop, not as many as fit into it
        assert not any(call.done() for call in late)
        victim.signal(signal.SIGCONT)
        went_on = time.monotonic()
        # Its workers are still busy, so what it accepted before is not begun yet; a listener of its own has others.
        assert client.run("call", url=self.url, topic=f"{self.topic}-aside", method="who", timeout=60) == "aside"
        self.recover = time.monotonic() - went_on
        victim.run("release", label="victim")
        for future in [*late, *casts]:
            future.result(60)
        return early

    def lost_connections(self) -> int:
        return int(self.client.run("counts", url=self.url)["connections lost"])

    def end(self, *, uncertain: str = "none") -> tuple[dict[str, Any], dict[str, float]]:
        """How the calls to any server went all the time; and the figures.

        :param uncertain: begins the names of what need not have been run.
        """
        must = {value for value in self._sent if not value.startswith(uncertain)}
        wait_until(lambda: must <= written(self._ledger), what="all to be run")
        load = self._load.result(60)
        assert load["wrong"] == 0
        idle = {"reply bytes": 0}
        wait_until(lambda: not any({**self.client.run("leftovers", url=self.url), **idle}.values()), what="all to be over")
        found = all_once(self._ledger, must)
        of_load = {value for value in written(self._ledger) if value.startswith("[")}
        assert written(self._ledger) <= {*self._sent, *of_load}
        assert len(of_load) >= load["calls"] - len(load["errors"])
        return load, {"notice": self.notice, "recover": self.recover, **found}


def stand_still(still: Still, seconds: float, interval: float) -> dict[str, float]:
    early = still.run(seconds, 3 * interval + MARGIN)
    assert [call.result(60) for call in early] == [*[f"running-{i}" for i in range(4)], *[f"written-{i}" for i in range(COUNT)]]
    load, found = still.end()
    assert load["errors"] == []
    return {**found, "noticed_after_heartbeats": still.notice / interval}


def side_by_side(fault: str, figures: Figures, how: Callable[[Still], dict[str, float]], all_still: list[Still]) -> None:
    with ThreadPoolExecutor() as executor:
        for still, found in zip(all_still, executor.map(how, all_still), strict=True):
            figures(fault, still.model, **found)


def in_directories_of_their_own(fleet: Fleet, folder: Path, options: str = "") -> list[Still]:
    return [Still(fleet, model, f"zmq://?directory_path={folder}/{model}.sqlite{options}", folder) for model in MODELS]


@pytest.mark.parametrize("model", MODELS)
def test_a_server_that_stands_still_for_3_s(model: str, fleet: Fleet, tmp_path: Path, figures: Figures) -> None:
    url = f"zmq://?directory_path={tmp_path}/directory.sqlite&heartbeat_interval=0.5"
    figures("server stopped for 3 s", model, **stand_still(Still(fleet, model, url, tmp_path), 3, 0.5))


def test_servers_that_stand_still_for_60_s(fleet: Fleet, tmp_path: Path, figures: Figures) -> None:
    """With all options as they are by default. The models stand still side by side."""
    all_still = in_directories_of_their_own(fleet, tmp_path)
    side_by_side("server stopped for 60 s", figures, lambda still: stand_still(still, 60, 10), all_still)


# For longer than its record in the directory lives.

_SHORT = "heartbeat_interval=0.5&zmq_target_update=1&zmq_target_expire=3"


def test_servers_that_stand_still_for_longer_than_their_records_live(fleet: Fleet, tmp_path: Path, figures: Figures) -> None:
    """On one machine a process that is there is not gone, however long it stands still."""
    all_still = in_directories_of_their_own(fleet, tmp_path, f"&{_SHORT}")
    fault = "server stopped until its record expires, SQLite"
    side_by_side(fault, figures, lambda still: stand_still(still, 8, 0.5), all_still)


def stand_still_and_be_taken_for_dead(still: Still) -> dict[str, float]:
    for call in still.run(9, 3 * 0.5 + MARGIN):
        with pytest.raises(Raised, match="ServerGone"):
            call.result(60)
    load, found = still.end(uncertain="written-")
    assert all("ServerGone" in error for error in load["errors"])
    return found


def test_servers_that_stand_still_for_longer_than_their_records_in_redis_live(
    fleet: Fleet, tmp_path: Path, figures: Figures
) -> None:
    """They count as gone then: calls that they had end, run or not. Casts that they had acknowledged are run all the same."""
    with RedisServer() as redis:
        url = f"zmq+redis://{redis.address}/0?rpc_zmq_host=127.0.0.1&{_SHORT}"
        all_still = [Still(fleet, model, url, tmp_path) for model in MODELS]
        fault = "server stopped until its record expires, Redis"
        side_by_side(fault, figures, stand_still_and_be_taken_for_dead, all_still)
