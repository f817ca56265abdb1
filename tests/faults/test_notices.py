# SPDX-License-Identifier: Apache-2.0
"""Notifiers, listeners and the store are killed under load: what was stored is processed, and nearly always once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.harness import Worker, following, wait_until
from tests.faults.notices import Line, read
from tests.servers import RedisServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Start = Callable[[str], Worker]
Figures = Callable[..., None]

KILLS = 12
# What was processed so long before its listener or the store was killed may not have been acknowledged, seconds.
IN_WORK = 2.0
# Until a process that is sent the signal is dead, seconds.
DYING = 1.0
# Until a dead listener is replaced by another, seconds.
TAKEOVER = 6


class Processes:
    """Of a worker that forks them; by their names."""

    def __init__(self, parent: Worker, ledger: Path, **how: str) -> None:
        self._parent = parent
        self._how = {**how, "path": str(ledger)}
        self._ledger = ledger
        self.pids: dict[str, int] = {}
        self.killed: dict[int, float] = {}
        ledger.touch()

    def begin(self, name: str) -> None:
        doing = {"doing": "listen"} if name.startswith("listener") else {"doing": "notify", "senders": 3}
        generation = f"{name}.{len(self.killed)}"
        self.pids[name] = self._parent.run("faults.notices.fork", name=generation, **doing, **self._how)

    def kill(self, name: str) -> None:
        pid = self.pids[name]
        self.killed[pid] = time.monotonic()
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, RedisServer | None]]:
    """Its URL, and what may be killed of it."""
    query = f"notification_takeover={TAKEOVER}&notification_tries=1000"
    if request.param == "sqlite":
        yield f"zmq://?directory_path={tmp_path}/directory.sqlite&{query}", None
    else:
        # With everysec Redis answers before it has written anything, for up to 2 s, when the disk is slow.
        with RedisServer("appendonly yes", "appendfsync always") as server:
            yield f"zmq+redis://{server.address}/0?rpc_zmq_host=127.0.0.1&redis_timeout=1&{query}", server


def test_notifiers_listeners_and_store_are_killed(
    client_model: str, start: Start, store: tuple[str, RedisServer | None], topic: str, tmp_path: Path, figures: Figures
) -> None:
    (url, server), ledger = store, tmp_path / "ledger"
    notifiers = Processes(start(client_model), ledger, url=url, topic=topic)
    listeners = Processes(start(following(client_model)), ledger, url=url, topic=topic)
    for name in ("listener a", "listener b"):
        listeners.begin(name)
    for name in ("notifier a", "notifier b"):
        notifiers.begin(name)
    stores: list[tuple[float, float]] = []

    def stored() -> int:
        return sum(line.what == "stored" for line in read(ledger))

    def goes_on() -> None:
        before = stored()
        wait_until(lambda: stored() > before + 20, 60, "more to be stored")

    victims = ["notifier a", "notifier b", "listener a", "listener b"] + (["store"] * 2 if server else [])
    goes_on()
    for _ in range(KILLS):
        time.sleep(random.uniform(0, 0.5))  # the moment of the kill is what is tried; nothing is waited for
        name = random.choice(victims)
        if name == "store" and server is not None:
            at = time.monotonic()
            server.restart(keep=True)
            stores.append((at, time.monotonic()))
        else:
            processes = listeners if name.startswith("listener") else notifiers
            processes.kill(name)
            processes.begin(name)
        goes_on()
    for name in ("notifier a", "notifier b"):
        notifiers.kill(name)
    safe = {line.value for line in read(ledger) if line.what == "stored"}

    def processed() -> set[str]:
        return {line.value for line in read(ledger) if line.what == "ends"}

    with contextlib.suppress(AssertionError):  # it says below what is missing
        wait_until(lambda: safe <= processed(), 60, "what was stored to be processed")
    lost = safe - processed()
    assert not lost, f"of {len(safe)} stored: {sorted(lost)[:10]}"
    lines = read(ledger)
    twice = repeated(lines)
    wrong = {value: begun for value, begun in twice.items() if not excused(value, begun, lines, listeners.killed, stores)}
    assert not wrong, f"processed again without a reason: {wrong}, killed {listeners.killed}, store {stores}"
    figures(
        f"kill -9 of notifiers, listeners{' and Redis' if server else ''} under load",
        client_model,
        lost=len(lost),
        stored=len(safe),
        kills=KILLS,
        processed_again=len(twice),
    )


def repeated(lines: list[Line]) -> dict[str, list[Line]]:
    """What was begun more than once, with those lines."""
    begun = defaultdict(list)
    for line in lines:
        if line.what == "begins":
            begun[line.value].append(line)
    return {value: each for value, each in begun.items() if len(each) > 1}


def excused(
    value: str, begun: list[Line], lines: list[Line], killed: dict[int, float], stores: list[tuple[float, float]]
) -> bool:
    """Each time but the last was in work when its listener was killed or the store; or that was when it was being stored."""
    ends = {(line.value, line.pid): line.at for line in lines if line.what == "ends"}
    sends = {line.value: line.at for line in lines if line.what == "sends"}
    returned = {line.value: line.at for line in lines if line.what == "stored"}
    for at, back in stores:
        if sends[value] <= back + IN_WORK and returned.get(value, back) >= at - IN_WORK:
            return True
    for line in begun[:-1]:
        ended = ends.get((value, line.pid))
        moments = [killed.get(line.pid), *(at for at, _ in stores)]
        if not any(m is not None and line.at <= m + DYING and (ended is None or m - IN_WORK <= ended) for m in moments):
            return False
    return True
