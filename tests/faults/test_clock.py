# SPDX-License-Identifier: Apache-2.0
"""Clocks jump by an hour: those of processes, and that of Redis."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from oslo_config import cfg
from oslo_messaging.transport import TransportURL

from green_zmq import config
from green_zmq.directory import open_directory
from green_zmq.routing import Topic
from tests.contract.harness import MODELS, Worker, following, wait_until
from tests.packages import libfaketime
from tests.servers import RedisServer

pytestmark = pytest.mark.slow

Figures = Callable[..., None]
HOUR = 3600
# The offsets of the client's clock and the server's, one after the other.
JUMPS = [(HOUR, 0), (HOUR, HOUR), (0, 0), (-HOUR, 0), (0, -HOUR)]
TIMEOUT = KEPT = 5.0
EXPIRE, UPDATE = 4, 1
OPTIONS = f"zmq_target_expire={EXPIRE}&zmq_target_update={UPDATE}&cast_grace=0.2&zmq_linger=1&rpc_zmq_host=127.0.0.1"
# How late the machine may be, seconds.
MARGIN = 5.0


class Clock:
    """The wall clock of whoever is started with it; the monotonic clock stays as it is."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.jump(0)
        self.environment = {
            "LD_PRELOAD": str(libfaketime()),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_CACHE_DURATION": "1",  # seconds after which the file is read again
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def jump(self, offset: int) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(f"{offset:+}\n")
        new.replace(self._file)


class Clocks:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._workers: list[Worker] = []

    def start(self, model: str) -> tuple[Worker, Clock]:
        """A process, and its clock."""
        number = len(self._workers)
        clock = Clock(self._folder / f"clock-{number}")
        within = ["env", *(f"{name}={value}" for name, value in clock.environment.items())]
        self._workers.append(Worker(model, self._folder / f"{number}-{model}.log", within=within))
        self._workers[-1].run("faults.clock.wall")
        return self._workers[-1], clock

    def end(self) -> None:
        for worker in self._workers:
            worker.kill()
            _forget(worker.process.pid)


def _forget(pid: int) -> None:
    """What the library leaves behind of a process that is killed."""
    for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
        Path("/dev/shm", name).unlink(missing_ok=True)


@pytest.fixture
def clocks(tmp_path: Path) -> Iterator[Clocks]:
    clocks = Clocks(tmp_path)
    yield clocks
    clocks.end()


def expiry(url: str, topic: str, limit: float) -> float:
    """The seconds until nobody finds a server of it any more."""
    began = time.monotonic()
    conf = cfg.ConfigOpts()
    conf([], project="green_zmq_tests", default_config_files=[], default_config_dirs=[])
    directory = open_directory(config.read(conf, TransportURL.parse(conf, url)))
    with contextlib.closing(directory):
        wait_until(lambda: not directory.look_up(Topic("openstack", topic)), limit)
    return time.monotonic() - began


def jump(client: tuple[Worker, Clock], server: tuple[Worker, Clock], newcomer: Worker, url: str) -> dict[str, float]:
    """Let the clocks of both jump again and again while all goes on that takes time."""
    topic = f"topic-{client[0].model}"
    server[0].run("serve", url=url, topic=topic)
    client[0].run("call", url=url, topic=topic, method="echo")
    short = f"{url}&message_ttl={KEPT}"
    newcomer.run("serve", url=url, topic=f"{topic}-newcomer")  # with nobody left, Redis would look as if it had lost all
    calls, casts, found = [], [], []
    for number, offsets in enumerate(JUMPS):
        late = f"{topic}-late-{number}"
        held = client[0].begin("call", url=url, topic=topic, method="rest", args={"seconds": 2}, timeout=60, monitor=30)
        calls.append(client[0].begin("faults.clock.call_in_vain", url=url, topic=f"{topic}-silent", timeout=TIMEOUT))
        casts.append(client[0].begin("faults.clock.cast_in_vain", url=short, topic=f"{topic}-silent-{number}"))
        client[0].run("cast", url=url, topic=late, method="note", args={"value": number})
        for (worker, clock), offset in zip((client, server), offsets, strict=True):
            clock.jump(offset)
            wait_until(lambda: abs(worker.run("faults.clock.wall") - time.time() - offset) < 60)  # noqa: B023
        client[0].run("calls", url=url, topic=topic, method="echo", count=20)
        found += [each.run("faults.clock.call_anew", url=url, topic=topic) for each in (newcomer, client[0], server[0])]
        server[0].run("serve", url=url, topic=late, label=late)
        wait_until(lambda: server[0].run("seen", label=late) == [number])  # noqa: B023
        assert held.result(60) == 2
    late_calls = [call.result(60) - TIMEOUT for call in calls]
    late_casts = [cast.result(60) - KEPT for cast in casts]
    for late_by in (*late_calls, *late_casts):
        assert -0.01 < late_by < MARGIN
    for number in range(len(JUMPS)):
        assert server[0].run("seen", label=f"{topic}-late-{number}") == [number]
    assert client[0].run("counts", url=url).get("servers gone", 0) == 0
    # A server that says nothing any more is forgotten when its time has come, although its clock has jumped.
    server[1].jump(HOUR)
    server[0].signal(signal.SIGSTOP)
    expired = expiry(url, topic, EXPIRE + MARGIN)
    assert expired > EXPIRE - UPDATE - 1
    return {
        "lost": 0,
        "call_late_by_most_s": max(late_calls),
        "cast_late_by_most_s": max(late_casts),
        "found_by_newcomers_within_s": max(found),
        "expired_after_s": expired,
    }


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_the_clocks_of_processes_jump(
    kind: str, clocks: Clocks, start: Callable[[str], Worker], tmp_path: Path, figures: Figures
) -> None:
    with RedisServer() if kind == "redis" else contextlib.nullcontext() as redis:
        url = f"zmq+redis://{redis.address}/0?" if redis else f"zmq://?directory_path={tmp_path}/directory.sqlite&"
        all_of = [(clocks.start(model), clocks.start(following(model)), start(model), url + OPTIONS) for model in MODELS]
        with ThreadPoolExecutor() as executor:
            for model, found in zip(MODELS, executor.map(lambda each: jump(*each), all_of), strict=True):
                figures(f"clocks of processes jump by an hour, {kind}", model, **found)


@pytest.fixture
def redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RedisServer, Clock]]:
    clock = Clock(tmp_path / "clock-of-redis")
    server = RedisServer()
    try:
        with monkeypatch.context() as patch:
            for name, value in clock.environment.items():
                patch.setenv(name, value)
            server.start()
        yield server, clock
    finally:
        server.stop()
        if server.process is not None:
            _forget(server.process.pid)


def test_the_clock_of_redis_jumps(redis: tuple[RedisServer, Clock], start: Callable[[str], Worker], figures: Figures) -> None:
    """Forward: whatever it has expires at once, and is there again within a period. Who is known goes on being used.

    Backward: what it has lives on for an hour, unless it is refreshed; so all is well within a period again.
    """
    server, clock = redis
    url = f"zmq+redis://{server.address}/0?{OPTIONS}"
    pairs = [(start(model), start(following(model)), f"topic-{model}") for model in MODELS]
    newcomer = start("threads")
    victim = start("threads")
    for one, other, topic in pairs:
        other.run("serve", url=url, topic=topic)
        one.run("load.start", url=url, topic=topic, callers=2, servers=[""])
    victim.run("serve", url=url, topic="victim")

    def records() -> list[int]:
        """How long those of processes have to live, ms."""
        with server.client() as looker:
            return [int(looker.pttl(key)) for key in looker.keys("green_zmq:node:*")]

    def now() -> int:
        with server.client() as looker:
            return int(looker.time()[0])

    recover = {}
    for offset in (HOUR, 0, -HOUR):
        held = [one.begin("call", url=url, topic=topic, method="rest", args={"seconds": 2}) for one, _, topic in pairs]
        before = [sum(one.run("load.done", topic=topic).values()) for one, _, topic in pairs]
        clock.jump(offset)
        wait_until(lambda: abs(now() - time.time() - offset) < 60)  # noqa: B023
        began = time.monotonic()
        for _, _, topic in pairs:
            newcomer.run("faults.clock.call_anew", url=url, topic=topic, registered=False)
        recover[offset] = time.monotonic() - began
        assert recover[offset] < UPDATE + MARGIN
        wait_until(lambda: len(found := records()) == 4 and max(found) <= EXPIRE * 1000, UPDATE + MARGIN)
        assert [call.result(30) for call in held] == [2] * len(held)
        for (one, _, topic), done in zip(pairs, before, strict=True):
            assert sum(one.run("load.done", topic=topic).values()) > done
    for one, _, topic in pairs:
        assert one.run("load.stop", topic=topic)["errors"] == []
        assert one.run("counts", url=url).get("servers gone", 0) == 0
    # One that dies with an hour to live is missed all the same, on its own machine.
    victim.kill()
    clock.jump(-2 * HOUR)
    wait_until(lambda: abs(now() - time.time() + 2 * HOUR) < 60)
    assert expiry(url, "victim", MARGIN) < MARGIN
    for one, _, topic in pairs:
        assert one.run("call", url=url, topic=topic, method="echo", args={"value": 1}) == 1
    figures("clock of Redis jumps forward by an hour", recover=recover[HOUR], lost=0)
    figures("clock of Redis jumps backward by an hour", recover=max(recover[0], recover[-HOUR]), lost=0)
