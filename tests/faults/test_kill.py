# SPDX-License-Identifier: Apache-2.0
"""Processes are killed: servers, and clients."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest

from tests.contract.harness import ROOT, Raised, Worker, following, wait_until
from tests.faults.ledger import read, written
from tests.servers import RedisServer

pytestmark = pytest.mark.slow

Start = Callable[[str], Worker]
Figures = Callable[..., None]

CALLERS, SERVERS, KILLS = 64, 4, 12
# Characters that are more than fits into buffers on the way.
LARGE = 8 << 20
# When clients are killed, by what they and their server write into the ledger; and what they send and have returned meanwhile.
MOMENTS = [("begins-carry-1", LARGE, 0), ("begins-carry-1", 0, LARGE), ("rest-", 0, 0)]
# Seconds; and what shutting down may take beyond: to withdraw from the directory, to send the last replies, on a busy machine.
LINGER, MORE = 3, 15
# A hub that is blocked for that time would be later with its ticks; one of a busy machine is not.
LATE = 2


class Servers:
    """Processes that a worker has forked, each of which writes into one ledger what it runs."""

    def __init__(self, parent: Worker, url: str, topic: str, ledger: Path) -> None:
        self._parent = parent
        self._how = {"url": url, "topic": topic, "path": str(ledger)}
        self._ledger = ledger
        ledger.touch()
        self.pids: dict[str, int] = {}

    def fork(self, name: str) -> int:
        """It need not serve yet."""
        pid: int = self._parent.run("faults.kill.fork", doing="serve", server=name, **self._how)
        self.pids[name] = pid
        return pid

    def wait_for(self, pid: int) -> None:
        wait_until(lambda: pid in self.ran()["serves"], what=f"process {pid} to serve")

    def ran(self) -> dict[str, list[int]]:
        """By which processes each call was run."""
        found = defaultdict(list)
        for entry in read(self._ledger):
            found[entry.value].append(entry.pid)
        return found


@pytest.fixture
def url(tmp_path: Path) -> str:
    # So few ports that who takes the place of a killed server gets its port as well, every other time.
    first = random.randrange(20_000, 30_000)
    return f"zmq://?directory_path={tmp_path}/directory.sqlite&rpc_zmq_min_port={first}&rpc_zmq_max_port={first + SERVERS + 2}"


def test_servers_are_killed_one_after_the_other_under_many_callers(
    client_model: str, start: Start, url: str, topic: str, tmp_path: Path, figures: Figures
) -> None:
    client = start(client_model)
    servers = Servers(start(following(client_model)), url, topic, tmp_path / "ledger")
    for name in "abcd":
        servers.wait_for(servers.fork(name))
    # Half of the callers call any server, the others each a certain one.
    lines: list[dict[str, Any]] = [{"name": "any", "count": CALLERS // 2}]
    lines += [{"name": name, "server": name, "count": CALLERS // 8} for name in "abcd"]
    # Some calls are acknowledged before they are answered, some are answered at once.
    how = {"timeout": 60, "seconds": [0, 0.01, 0.02, 0.1], "pause": 0}
    client.run("faults.load.start", url=url, topic=topic, lines=[{**line, **how} for line in lines])

    def all_answered(then: float) -> bool:
        latest = client.run("faults.load.latest", topic=topic).values()
        return len(latest) == CALLERS and min(latest) > then

    def answered_since(then: float) -> None:
        wait_until(lambda: all_answered(then), 40, "every caller to have an answer")

    answered_since(time.monotonic())
    killed: dict[int, float] = {}

    def kill(pid: int) -> None:
        killed[pid] = time.monotonic()
        os.kill(pid, signal.SIGKILL)

    recovered, replaced = [], {}
    for number in range(KILLS):
        name = "abcd"[number % 4]
        victim = servers.pids[name]
        kill(victim)
        if number % 2:  # the next one dies while it begins to serve
            stillborn = servers.fork(name)
            time.sleep(random.uniform(0, 0.1))  # the moment of the kill is what is tried; nothing is waited for
            kill(stillborn)
        replaced[victim] = servers.fork(name)
        servers.wait_for(replaced[victim])
        answered_since(killed[victim])
        recovered.append(time.monotonic() - killed[victim])
        answered_since(time.monotonic())
    calls = client.run("faults.load.stop", topic=topic, limit=100)

    ran = servers.ran()
    errors: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for call in calls:
        if call["error"] is None:
            assert ran[call["value"]] == [call["by"]], call
            continue
        assert call["names"][:2] == ["ServerGone", "MessagingTimeout"], call
        (pid,) = [pid for pid in killed if f"(pid {pid}, " in call["server"]]
        assert call["server"] in call["error"]
        assert ran[call["value"]] in ([], [pid]), call
        assert call["ended"] >= killed[pid]
        errors[pid].append(call)
    assert ran.keys() - {"serves"} <= {call["value"] for call in calls}
    # Whoever was told that it is gone, and whoever calls any server, does not meet it again.
    for pid, of_pid in errors.items():
        assert len({call["caller"] for call in of_pid}) == len(of_pid), pid
    assert set(errors) >= set(replaced)
    assert {call.get("by") for call in calls} >= set(replaced.values())
    lost = [call for of_pid in errors.values() for call in of_pid]
    figures(
        "kill -9 of one of 4 servers under 64 callers",
        client_model,
        notice=max(max(call["ended"] for call in errors[pid]) - killed[pid] for pid in errors),
        recover=max(recovered),
        lost=0,
        twice=sum(len(pids) > 1 for value, pids in ran.items() if value != "serves"),
        errors_per_kill=len(lost) / KILLS,
        calls=len(calls),
        kills=len(killed),
    )


def test_a_hundred_clients_are_killed(
    client_model: str, start: Start, url: str, topic: str, tmp_path: Path, figures: Figures
) -> None:
    server, parent = start(following(client_model)), start(client_model)
    ledger = tmp_path / "ledger"
    server.run("faults.kill.return_memory")
    server.run("faults.ledger.serve", url=url, topic=topic, server="server", path=str(ledger))
    clients = 0

    def kill_ten() -> None:
        """Each at some moment: while it sends or gets what is large, while a call of it runs."""
        nonlocal clients
        alive = {}
        for _ in range(10):
            clients += 1
            name = f"client-{clients}"
            moment, sent, returned = random.choice(MOMENTS)
            how = {"topic": topic, "name": name, "path": str(ledger), "sent": sent, "returned": returned}
            alive[f"{name}-{moment}"] = parent.run("faults.kill.fork", url=url, doing="use", **how)

        def killed() -> bool:
            seen = written(ledger)
            for moment in [moment for moment in alive if any(value.startswith(moment) for value in seen)]:
                time.sleep(random.uniform(0, 0.05))  # the moment of the kill, again
                os.kill(alive.pop(moment), signal.SIGKILL)
            return not alive

        wait_until(killed, 60)

    def settled() -> dict[str, int]:
        """What the server holds and uses, once the time of all calls is over."""
        wait_until(lambda: not server.run("faults.kill.held", url=url)["records"], 60, "the server to forget the calls")
        return {**server.run("faults.kill.held", url=url), **server.run("resources")}

    for _ in range(3):  # what is allocated once and kept
        kill_ten()
    before = settled()
    began = time.monotonic()
    for _ in range(10):
        kill_ten()
    killed = time.monotonic()
    after = settled()
    assert after["descriptors"] == before["descriptors"]
    # Less than one of the large messages.
    assert after["bytes"] <= before["bytes"] * 1.05, (before, after)
    # That it has heard of them, without any call, is remembered for FORGET.
    assert after["senders"] <= clients
    assert not any(after[name] for name in ("records", "replies", "reply bytes", "unanswered", "messages"))
    carried = [entry.value for entry in read(ledger) if "-carry-" in entry.value]
    cut_off = 2 * sum("-begins-" in value for value in carried) - len(carried)
    assert cut_off, "no client was killed before the server had all of its request"
    assert server.run("call", url=url, topic=topic, method="run", args={"value": "after"})
    figures(
        "kill -9 of a client, 100 times",
        client_model,
        recover=time.monotonic() - killed,
        kb_per_kill=(after["bytes"] - before["bytes"]) / 1000 / 100,
        descriptors_more=after["descriptors"] - before["descriptors"],
        senders_remembered=after["senders"],
        requests_cut_off=cut_off,
        kills_s=killed - began,
    )


def test_a_large_message_is_not_kept_until_the_next_one(client: Worker, url: str) -> None:
    client.run("call_in_vain", url=url, topic="nobody", method="echo", timeout=0)
    client.run("faults.kill.wait_until_the_last_is_dropped", url=url)


def break_off(worker: Worker, fault: str) -> None:
    """Stop it, or kill it; and wait until it is: on a busy machine some of its threads may run on for a while."""
    if fault == "killed":
        worker.kill()
        return
    worker.signal(signal.SIGSTOP)
    threads = Path(f"/proc/{worker.process.pid}/task")

    def stopped() -> bool:
        with contextlib.suppress(OSError):  # one has just ended
            return {stat.read_text().rpartition(")")[2].split()[0] for stat in threads.glob("*/stat")} == {"T"}
        return False

    wait_until(stopped, what=f"{worker} to stand still")


def losses(worker: Worker) -> int:
    """How many casts are lost according to the log."""
    return sum(int(n) for line in worker.run("logged") for n in re.findall(r"lost (\d+) cast", line))


@pytest.mark.parametrize("fault", ["absent", "stopped", "killed"])
def test_a_client_shuts_down_while_its_server_is(
    fault: str, client: Worker, client_model: str, start: Start, url: str, topic: str, figures: Figures
) -> None:
    url += f"&zmq_linger={LINGER}&cast_grace=0.1"
    calls = []
    if fault != "absent":
        server = start(following(client_model))
        server.run("serve", url=url, topic=topic, pool=1)
        calls = [client.begin("call", url=url, topic=topic, method="hold", timeout=60)]
        wait_until(lambda: server.run("began", label="server"))
        client.run("casts", url=url, topic=topic, method="note", values=list(range(20)))  # it has accepted them
        break_off(server, fault)
        if fault == "killed":
            wait_until(lambda: client.run("counts", url=url).get("servers gone"))
        # Part of it may be written.
        calls.append(client.begin("call_fill", url=url, topic=topic, method="note", size=LARGE, timeout=60))
    calls.append(client.begin("call", url=url, topic=f"{topic}-nobody", method="note", args={"value": -1}, timeout=60))
    client.run("casts_together", url=url, topic=topic, method="note", values=list(range(20, 220)))
    wait_until(lambda: client.run("leftovers", url=url)["waiting"])
    worst, took = client.run("tick_while", doing="cleanup", url=url)
    assert LINGER <= took < LINGER + MORE
    assert worst < LATE
    for call in calls:
        with pytest.raises(Raised) as caught:
            call.result(20)
        assert caught.value.name in ("TransportClosed", "ServerGone")
    lost = {"absent": 200, "stopped": 200, "killed": 220}[fault]
    assert losses(client) == lost
    if fault == "stopped":
        server.signal(signal.SIGCONT)
        server.run("release", label="server")
        server.run("end", label="server")
    figures(
        f"shutdown of a client whose server is {fault}", client_model, recover=took, logged_as_lost=lost, worst_tick_s=worst
    )


@pytest.mark.parametrize("fault", ["stopped", "killed"])
def test_a_server_shuts_down_while_its_clients_are(
    fault: str, server: Worker, server_model: str, start: Start, url: str, topic: str, figures: Figures
) -> None:
    url += f"&zmq_linger={LINGER}"
    client = start(following(server_model))
    server.run("serve", url=url, topic=topic, pool=3)
    alone = server.run("resources")["descriptors"]
    calls = [client.begin("call_fill", url=url, topic=topic, method="hold", size=LARGE, timeout=60) for _ in range(3)]
    wait_until(lambda: len(server.run("began", label="server")) == 3)
    client.run("casts", url=url, topic=topic, method="note", values=list(range(20)))
    break_off(client, fault)
    if fault == "killed":
        wait_until(lambda: server.run("resources")["descriptors"] <= alone)
    began = time.monotonic()
    worst, _ = server.run("tick_while", doing="stop", label="server")
    stopped_in = time.monotonic() - began
    assert stopped_in < MORE
    server.run("release", label="server")  # now there are large replies, which nobody reads
    server.run("wait", label="server")
    # What was not begun is given back; if nobody is there to take it back, it is run after all.
    run_here = [value for value in server.run("seen", label="server") if isinstance(value, int)]
    assert sorted(run_here) == ([] if fault == "stopped" else list(range(20)))
    worst_too, took = server.run("tick_while", doing="cleanup", url=url)
    assert took < LINGER + MORE
    assert max(worst, worst_too) < LATE
    if fault == "stopped":
        client.signal(signal.SIGCONT)
        server.run("serve", url=url, topic=topic, server="next", pool=1)
        wait_until(lambda: len(server.run("seen", label="next")) == 20)
        assert server.run("seen", label="next") == list(range(20))
    assert not wait(calls, 30).not_done
    figures(
        f"shutdown of a server whose clients are {fault}",
        server_model,
        recover=took,
        lost=0,
        twice=0,
        worst_tick_s=max(worst, worst_too),
        stopped_in_s=stopped_in,
    )


def test_shutting_down_while_the_directory_does_not_answer(
    server: Worker, server_model: str, topic: str, figures: Figures
) -> None:
    with RedisServer() as redis:
        url = f"zmq+redis://{redis.address}/0?rpc_zmq_host=127.0.0.1&zmq_linger=0.5&redis_timeout=30"
        server.run("serve", url=url, topic=topic)
        assert redis.process is not None
        redis.process.send_signal(signal.SIGSTOP)
        starting = server.begin("serve", url=url, topic=topic, server="late")
        stopping = server.begin("stop", label="server")
        call = server.begin("call", url=url, topic=f"{topic}-unknown", method="echo", timeout=60)
        wait_until(lambda: server.run("leftovers", url=url)["waiting"])
        worst, took = server.run("tick_while", doing="cleanup", url=url)
        assert took < 0.5 + MORE
        stopping.result(MORE)
        for future in (starting, call):
            with pytest.raises(Raised, match="closed"):
                future.result(MORE)
    figures("shutdown while the directory hangs", server_model, recover=took, worst_tick_s=worst)


def ending(model: str, urls: list[str], topic: str) -> subprocess.Popen[str]:
    """A program that has just called its last function."""
    lines = [
        "from tests.contract import worker",
        f"worker.patch({model!r})",
        "from tests.contract import models",
        f"models.load({model!r})",
        "from tests.faults import kill",
        f"kill.cast_and_end({urls!r}, {topic!r}, 50)",
    ]
    program = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert program.stdout is not None
    assert program.stdout.readline() == "ends\n"
    return program


def test_a_program_ends_with_casts_that_nobody_takes(client_model: str, url: str, topic: str, figures: Figures) -> None:
    """Over several transports, which all linger at the same time."""
    urls = [f"{url}&zmq_linger={LINGER + i / 100}&cast_grace=0.1" for i in range(10)]
    program = ending(client_model, urls, topic)
    began = time.monotonic()
    assert program.wait(60) == 0
    took = time.monotonic() - began
    assert LINGER - 0.5 < took < LINGER + MORE
    figures("end of a program with casts that nobody takes", client_model, recover=took)


def test_a_program_that_ends_has_its_casts_delivered(
    client_model: str, start: Start, url: str, topic: str, figures: Figures
) -> None:
    url += "&zmq_linger=60&cast_grace=0.1"
    server = start(following(client_model))
    server.run("serve", url=url, topic=topic, pool=1)
    break_off(server, "stopped")
    program = ending(client_model, [url], topic)
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(1)
    began = time.monotonic()
    server.signal(signal.SIGCONT)
    assert program.wait(30) == 0
    took = time.monotonic() - began
    wait_until(lambda: len(server.run("seen", label="server")) == 50)
    assert sorted(server.run("seen", label="server")) == list(range(50))
    figures("end of a program whose server was stopped for a while", client_model, recover=took, lost=0, twice=0)
