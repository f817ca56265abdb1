# SPDX-License-Identifier: Apache-2.0
"""Networks that are cut or lose packets, and addresses at which somebody else answers.

Servers write down on disk whatever they run, and a load of callers and casters goes on all the while.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.contract.harness import MODELS, Raised, Worker, following, wait_until
from tests.faults.ledger import all_once, read, written
from tests.networks import DIRECTORY, LAN, Networks, needs_networks

pytestmark = [pytest.mark.slow, needs_networks]

Figures = Callable[..., None]
Record = dict[str, Any]
SHORT: dict[str, object] = {"heartbeat_interval": 0.5, "cast_grace": 0.5}
# Records of processes that are gone live no longer than that.
BRIEF: dict[str, object] = {**SHORT, "zmq_target_expire": 5, "zmq_target_update": 1}
PORT = 30_000
# What clients send, see faults.load.
CALLS: Record = {"name": "call", "count": 4}
CASTS: Record = {"name": "cast", "kind": "cast", "count": 2}
NAMED: Record = {"name": "named", "server": "server"}
# What a call that ended at its deadline may say.
KNOWN = ("which did not accept it", "accepted it and did not reply", "no connection to")
# An answer at the deadline is late by no more than this on a machine that others use as well.
LATE = 8.0


def url(number: int = 0, **options: object) -> str:
    """For the host of that number, which serves; or for one that does not."""
    if number:
        options["rpc_zmq_bind_address"] = f"{LAN}.{number}"
    return f"zmq+redis://{DIRECTORY}/0?" + "&".join(f"{name}={value}" for name, value in options.items())


def at_port(number: int, **options: object) -> str:
    return url(number, rpc_zmq_min_port=PORT, rpc_zmq_max_port=PORT + 1, **options)


class Bench:
    """A client's load, and what the servers of a test have run."""

    def __init__(self, networks: Networks, ledger: Path, topic: str) -> None:
        self.networks = networks
        self.ledger = ledger
        self.topic = topic
        self.client: Worker
        self.url = ""

    def ready(self, space: str, model: str) -> Worker:
        """A process that can serve at once when it is told to."""
        worker = self.networks.start(space, model)
        worker.run("logged")
        return worker

    def serve(self, space: str, model: str, at: str, server: str, topic: str = "", worker: Worker | None = None) -> Worker:
        worker = worker or self.networks.start(space, model)
        worker.run("faults.ledger.serve", url=at, topic=topic or self.topic, server=server, path=str(self.ledger))
        return worker

    def pair(self, here: str, there: str, model: str, options: Record, *lines: Record, at: Callable[..., str] = url) -> Worker:
        """A client on one host, with that load, and a server of another model on the other one, the third; the server."""
        server = self.serve(there, following(model), at(3, **options), "server")
        self.load(self.networks.start(here, model), url(**options), *lines)
        return server

    def load(self, client: Worker, at: str, *lines: Record) -> None:
        """Returns when each who sends has sent something."""
        self.client, self.url = client, at
        count = sum(line.get("count", 1) for line in lines)
        client.run("faults.load.start", url=at, topic=self.topic, lines=lines)
        wait_until(lambda: len(self.latest()) == count, 60, "the first messages")

    def latest(self) -> dict[str, float]:
        return dict(self.client.run("faults.load.latest", topic=self.topic))

    def stop(self) -> list[Record]:
        return list(self.client.run("faults.load.stop", topic=self.topic, limit=120))

    def count(self, name: str) -> int:
        return int(self.client.run("counts", url=self.url).get(name, 0))

    def notices(self, since: float, limit: float = 20, lost: int = 1) -> float:
        """Wait until so many connections were lost; after how many seconds that was."""
        wait_until(lambda: self.count("connections lost") >= lost, limit, "the loss of the connection to be noticed")
        return time.monotonic() - since

    def recovers(self, since: float, limit: float = 30) -> float:
        """Wait until each who sends has sent something since then that went well; after how many seconds that was."""
        wait_until(lambda: min(self.latest().values()) > since, limit, "all to go well again")
        return time.monotonic() - since

    def hold(self) -> Future[Any]:
        """A call of the client that its server has accepted, and is to work on for longer than the test takes."""
        message = {"url": self.url, "topic": self.topic, "method": "run", "timeout": 60}
        held = self.client.begin("call", **message, args={"value": "held", "seconds": 60})
        wait_until(lambda: "held" in written(self.ledger))
        rest(0.2)  # it is acknowledged after a moment
        return held

    def check(self, records: list[Record]) -> dict[str, int]:
        """Every call that was answered and every cast that returned was run once, and nothing twice; the figures.

        What went with its server is missing, and counted where it was sent.
        """
        sent = {record["value"] for record in records if record["error"] is None}
        answered = {record["value"] for record in records if record["error"] is None and record["kind"] == "call"}

        def lost() -> int:
            return len(sent - written(self.ledger))

        counted = self.count("messages lost")
        wait_until(lambda: lost() <= counted and not self.count("messages in the outbox"), 40, "what is to be delivered")
        return {**all_once(self.ledger, answered), "lost": lost()}

    def all_went_well(self) -> tuple[dict[str, int], list[Record]]:
        """In the end; the figures, and what was sent."""
        records = self.stop()
        found = self.check(records)
        assert found["lost"] == 0
        assert errors(records) == []
        return found, records


@pytest.fixture
def bench(networks: Networks, tmp_path: Path, topic: str) -> Bench:
    return Bench(networks, tmp_path / "ledger", topic)


def of(records: list[Record], *names: str) -> list[Record]:
    return [record for record in records if record["name"] in names]


def errors(records: list[Record]) -> list[Record]:
    return [record for record in records if record["error"] is not None]


def ends_as_gone(held: Future[Any]) -> Raised:
    """A call that its server had accepted."""
    with pytest.raises(Raised) as caught:
        held.result(40)
    assert caught.value.name == "ServerGone"
    assert "accepted it and is gone" in caught.value.text
    return caught.value


def rest(seconds: float) -> None:
    """As long as a fault is to last."""
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= end, seconds + 10)


# Partitions.


@pytest.mark.parametrize("direction", ["both ways", "to the server", "to the client"])
@pytest.mark.parametrize("model", MODELS)
def test_one_of_two_servers_is_cut_off(bench: Bench, figures: Figures, model: str, direction: str) -> None:
    networks = bench.networks
    _, here, cut, other = networks.lan(3)
    bench.serve(cut, following(model), url(3, **SHORT), "cut")
    bench.serve(other, model, url(4, **SHORT), "other")
    bench.load(
        networks.start(here, model),
        url(**SHORT),
        {"name": "patient", "server": "cut", "count": 3},
        {"name": "impatient", "server": "cut", "timeout": 1, "count": 3},
        # Until the cut is noticed, those for any server go to this one as long as it has no more outstanding than the other. So
        # at most four of these and of the casts to any wait for it; three could all be of these.
        {"name": "any", "count": 6},
        {"name": "cast", "kind": "cast", "server": "cut", "count": 2},
        {"name": "cast any", "kind": "cast", "count": 2},
    )
    began = time.monotonic()
    if direction != "to the client":
        networks.lose(cut, source=f"{LAN}.2")
    if direction != "to the server":
        networks.lose(here, source=f"{LAN}.3")
    cut_off = time.monotonic()
    notice = bench.notices(began)
    noticed = time.monotonic()
    rest(2.5)
    healing = time.monotonic()
    networks.heal(cut)
    networks.heal(here)
    healed = time.monotonic()
    recover = bench.recovers(healed)
    records = bench.stop()
    found = bench.check(records)
    assert found["lost"] == 0
    assert errors(of(records, "patient", "any", "cast", "cast any")) == []
    for record in errors(records):
        assert record["error"].startswith("MessagingTimeout: ")
        assert any(words in record["error"] for words in KNOWN), record["error"]
        assert record["timeout"] - 0.1 < record["ended"] - record["began"] < record["timeout"] + LATE
    # Those whose time ran out within the partition had no chance; what is for any server goes to the other one meanwhile.
    inside = [r for r in of(records, "impatient") if cut_off < r["began"] and r["began"] + r["timeout"] < healing]
    assert inside
    assert len(errors(inside)) == len(inside)
    meanwhile = {r["value"] for r in of(records, "any") if noticed < r["began"] and r["ended"] < healing}
    assert len(meanwhile) > 10
    assert {entry.server for entry in read(bench.ledger) if entry.value in meanwhile} == {"other"}
    figures(f"partition, {direction}", model, notice=notice, recover=recover, **found)


@pytest.mark.parametrize("model", MODELS)
def test_who_cannot_be_reached_holds_up_nobody(bench: Bench, figures: Figures, model: str) -> None:
    """As long as another can take it: with one caller, for whom each server has its turn; also one that knows nobody yet."""
    networks = bench.networks
    _, here, cut, other = networks.lan(3)
    bench.serve(cut, model, url(3, **SHORT), "cut")
    bench.serve(other, following(model), url(4, **SHORT), "other")
    line = {"name": "any", "timeout": 4}
    bench.load(networks.start(here, model), url(**SHORT), line)
    wait_until(lambda: bench.count("connections open") == 2)
    began = time.monotonic()
    networks.lose(here, source=f"{LAN}.3")
    notice = bench.notices(began)
    noticed = time.monotonic()
    fresh = Bench(networks, bench.ledger, f"{bench.topic}-fresh")
    for each, number, server in ((cut, 3, "cut"), (other, 4, "other")):
        fresh.serve(each, "threads", url(number, **SHORT), server)
    fresh.load(networks.start(here, following(model)), url(**SHORT), line)
    rest(7)
    healed = time.monotonic()
    networks.heal(here)
    # It is found to be back without any message for it.
    wait_until(lambda: bench.count("connections open") == fresh.count("connections open") == 2, 30)
    recover = time.monotonic() - healed
    records, late = bench.stop(), fresh.stop()
    assert errors([record for record in records if record["began"] > noticed] + late) == []
    fresh.check(late)
    figures(
        "one of two servers not reached, one caller",
        model,
        notice=notice,
        recover=recover,
        **bench.check(records),
        slowest_s=max(r["ended"] - r["began"] for r in records if r["began"] > noticed),
        slowest_of_new_client_s=max(r["ended"] - r["began"] for r in late),
    )


def test_partition_with_default_options(bench: Bench, figures: Figures) -> None:
    """Of processes of all models at once."""
    networks = bench.networks
    _, here, cut = networks.lan(2)
    benches = {}
    for model in MODELS:
        benches[model] = one = Bench(networks, bench.ledger, f"{bench.topic}-{model}")
        one.pair(here, cut, model, {}, {**CALLS, "timeout": 60}, CASTS)
    began = time.monotonic()
    networks.lose(cut, source=f"{LAN}.2")
    networks.lose(here, source=f"{LAN}.3")
    notices = {model: one.notices(began, 60) for model, one in benches.items()}
    networks.heal(cut)
    networks.heal(here)
    healed = time.monotonic()
    for model, one in benches.items():
        recover = one.recovers(healed)
        found, _ = one.all_went_well()
        figures("partition, default options", model, notice=notices[model], recover=recover, **found)


@pytest.mark.parametrize("model", MODELS)
def test_connections_are_reset(bench: Bench, figures: Figures, model: str) -> None:
    networks = bench.networks
    _, here, there = networks.lan(2)
    bench.pair(here, there, model, SHORT, CALLS, CASTS, {"name": "long", "count": 3, "seconds": [0.5]})
    notice = recover = 0.0
    for space, source in ((there, 2), (here, 3), (there, 2)):
        before = bench.count("connections lost")
        began = time.monotonic()
        networks.reset(space, f"{LAN}.{source}")
        notice = max(notice, bench.notices(began, lost=before + 1))
        networks.heal(space)
        recover = max(recover, bench.recovers(time.monotonic()))
    found, _ = bench.all_went_well()
    figures("connection reset", model, notice=notice, recover=recover, **found)


@pytest.mark.parametrize("model", MODELS)
def test_client_disappears(bench: Bench, figures: Figures, model: str) -> None:
    """Its host does: its server is told nothing, forgets it, and goes on serving others."""
    networks = bench.networks
    _, here, there, elsewhere = networks.lan(3)
    server = bench.serve(there, model, url(3, **SHORT), "server")
    bench.load(networks.start(elsewhere, model), url(**SHORT), {"name": "call", "count": 2})
    before = server.run("resources")["descriptors"]
    gone = Bench(networks, bench.ledger, bench.topic)
    lines = [{"name": "call gone", "count": 3}, {"name": "long gone", "count": 3, "seconds": [3]}]
    gone.load(networks.start(here, following(model)), url(**SHORT), *lines)
    assert server.run("resources")["descriptors"] > before
    began = time.monotonic()
    networks.unplug(here)
    gone.client.kill()
    wait_until(lambda: server.run("resources")["descriptors"] <= before, 30, "the connection to be given up")
    notice = time.monotonic() - began
    bench.recovers(time.monotonic())
    found, _ = bench.all_went_well()
    figures("half-open connection: the client's host is gone", model, notice=notice, **found)


# The directory.


@pytest.mark.parametrize("model", MODELS)
def test_directory_is_cut_off(bench: Bench, figures: Figures, model: str) -> None:
    """Longer than records live. Known peers go on, even if their connection is reset meanwhile."""
    networks = bench.networks
    _, here, there = networks.lan(2)
    options = {**SHORT, "zmq_target_expire": 3, "zmq_target_update": 1, "redis_timeout": 1}
    bench.pair(here, there, model, options, CALLS, CASTS)
    for space in (here, there):
        networks.lose(space, source=DIRECTORY)
    rest(4)
    assert bench.recovers(time.monotonic()) < LATE
    networks.reset(there, f"{LAN}.2", besides=DIRECTORY)
    began = time.monotonic()
    notice = bench.notices(began)
    networks.lose(there, source=DIRECTORY)
    again = bench.recovers(time.monotonic())
    for space in (here, there):
        networks.heal(space)
    recover = bench.recovers(time.monotonic())
    found, _ = bench.all_went_well()
    figures("directory cut off, connection reset", model, notice=notice, recover=recover, reconnected_s=again, **found)


@pytest.mark.parametrize("model", MODELS)
def test_server_is_cut_off_from_all_for_longer_than_its_record_lives(bench: Bench, figures: Figures, model: str) -> None:
    """It counts as gone. Its calls end with that; what was not written waits for it. It comes back as who it is."""
    networks = bench.networks
    _, here, cut = networks.lan(2)
    bench.pair(here, cut, model, BRIEF, CALLS, CASTS)
    held = bench.hold()
    began = time.monotonic()
    networks.lose(cut)
    ends_as_gone(held)
    notice = time.monotonic() - began
    networks.heal(cut)
    recover = bench.recovers(time.monotonic())
    records = bench.stop()
    assert {record["error"].split(":")[0] for record in errors(records)} <= {"ServerGone"}
    figures("server cut off until its record expired", model, notice=notice, recover=recover, **bench.check(records))


# Loss of packets.


@pytest.mark.parametrize("percent", [5, 20])
@pytest.mark.parametrize("model", MODELS)
def test_packets_are_lost(bench: Bench, figures: Figures, model: str, percent: int) -> None:
    networks = bench.networks
    _, here, there = networks.lan(2)
    networks.lose(there, percent, source=f"{LAN}.2")
    networks.lose(here, percent, source=f"{LAN}.3")
    calls = {"name": "call", "count": 8, "timeout": 60}
    bench.pair(here, there, model, {"heartbeat_interval": 2}, calls, CASTS, {"name": "1 MiB", "timeout": 60, "size": 1 << 20})
    began = time.monotonic()
    rest(4)
    seconds = time.monotonic() - began
    found, records = bench.all_went_well()
    times = sorted((r["ended"] - r["began"]) * 1000 for r in of(records, "call") if r["began"] > began)
    large = sorted((r["ended"] - r["began"]) * 1000 for r in of(records, "1 MiB"))
    figures(
        f"{percent} % packet loss",
        model,
        **found,
        p50_ms=times[len(times) // 2],
        p99_ms=times[len(times) * 99 // 100],
        calls_per_s=len(times) / seconds,
        p50_of_1_MiB_ms=large[len(large) // 2],
        worst_of_1_MiB_ms=large[-1],
        connections_lost=bench.count("connections lost"),
    )


# Somebody else at the address.


@pytest.mark.parametrize("how", ["killed", "disappeared"])
@pytest.mark.parametrize("model", MODELS)
def test_server_is_replaced_at_its_address(bench: Bench, figures: Figures, model: str, how: str) -> None:
    """By the same service, started anew, while the directory still has the former: the new one refuses what is for that."""
    networks = bench.networks
    switch, here, there = networks.lan(2)
    lines = [{"name": "call", "server": "server", "count": 3}, {"name": "cast", "kind": "cast", "server": "server"}]
    old = bench.pair(here, there, model, SHORT, *lines, at=at_port)
    held = bench.hold()
    began = time.monotonic()
    if how == "disappeared":
        networks.unplug(there)  # so that nobody is told
    old.kill()
    notice = bench.notices(began)
    if how == "disappeared":
        networks.plug(switch, there, f"{LAN}.3")
    new = bench.serve(there, model, at_port(3, **SHORT), "server")
    back = time.monotonic()
    assert f"(pid {old.process.pid}, tcp://{LAN}.3:{PORT})" in (ends_as_gone(held).server or "")
    recover = bench.recovers(back)
    assert bench.count("answers wrong_instance") >= 1
    assert new.run("counts", url=at_port(3, **SHORT))["requests for another instance"] >= 1
    records = bench.stop()
    for record in errors(records):
        assert record["error"].startswith("ServerGone: ")
        assert f"pid {old.process.pid}" in record["error"]
    figures(f"server {how}, restarted on its port", model, notice=notice, recover=recover, **bench.check(records))


@pytest.mark.parametrize("model", MODELS)
def test_another_service_takes_the_port(bench: Bench, figures: Figures, model: str) -> None:
    networks = bench.networks
    _, here, there = networks.lan(2)
    old = bench.pair(here, there, model, SHORT, CALLS, CASTS, NAMED, at=at_port)
    # It must be there before the record of the one that is killed expires.
    next_one = bench.ready(there, model)
    began = time.monotonic()
    old.kill()
    notice = bench.notices(began)
    stranger = bench.serve(there, model, at_port(3, **SHORT), "stranger", f"{bench.topic}-other", next_one)
    bench.serve(there, following(model), url(3, **SHORT), "server")
    recover = bench.recovers(time.monotonic())
    assert bench.count("answers wrong_instance") >= 1
    assert stranger.run("counts", url=at_port(3, **SHORT))["requests for another instance"] >= 1
    records = bench.stop()
    assert {record["error"].split(":")[0] for record in errors(records)} <= {"ServerGone"}
    assert {entry.server for entry in read(bench.ledger)} == {"server"}
    figures("another service on its port", model, notice=notice, recover=recover, **bench.check(records))


FOREIGN = """
import os, socket, sys, threading
def serve(client):
    if sys.argv[2] == "garbage":
        client.sendall(os.urandom(4096))
    elif sys.argv[2] == "http":
        client.recv(4096)
        client.sendall(b"HTTP/1.1 400 Bad Request\\r\\nContent-Length: 0\\r\\n\\r\\n")
        client.close()
        return
    while client.recv(4096):
        pass
    client.close()
with socket.create_server(("0.0.0.0", int(sys.argv[1]))) as listening:
    print("listens", flush=True)
    while True:
        threading.Thread(target=serve, args=[listening.accept()[0]], daemon=True).start()
"""


@pytest.fixture
def foreign() -> Iterator[Callable[[str, str], None]]:
    """A program of others, listening at the port in a namespace."""
    started = []

    def start(space: str, kind: str) -> None:
        command = ["ip", "netns", "exec", space, sys.executable, "-c", FOREIGN, str(PORT), kind]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == b"listens\n"

    yield start
    for process in started:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize(("model", "kind"), list(zip(MODELS, ["silent", "garbage", "http"], strict=True)))
def test_a_foreign_program_takes_the_port(
    bench: Bench, figures: Figures, foreign: Callable[[str, str], None], model: str, kind: str
) -> None:
    networks = bench.networks
    _, here, there = networks.lan(2)
    old = bench.pair(here, there, model, BRIEF, CALLS, CASTS, NAMED, at=at_port)
    held = bench.hold()
    began = time.monotonic()
    old.kill()
    foreign(there, kind)
    notice = bench.notices(began)
    bench.serve(there, following(model), url(3, **BRIEF), "server")
    back = time.monotonic()
    fresh = Bench(networks, bench.ledger, bench.topic)
    fresh.load(networks.start(here, following(model)), url(**BRIEF), {"name": "fresh", "timeout": 4})
    # Nobody says at that address that the former is gone, so those that it had wait until its record has expired.
    assert f"pid {old.process.pid}" in str(ends_as_gone(held))
    recover = bench.recovers(back)
    late = fresh.stop()
    assert errors(late) == []
    fresh.check(late)
    records = bench.stop()
    assert {record["error"].split(":")[0] for record in errors(records)} <= {"ServerGone"}
    figures(f"a foreign program on its port: {kind}", model, notice=notice, recover=recover, **bench.check(records))
