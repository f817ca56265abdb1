# SPDX-License-Identifier: Apache-2.0
"""The pool of connections: its limits, its figures, and peers that come and go."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.harness import Worker, cpu_shares, following, wait_until

pytestmark = pytest.mark.slow

Start = Callable[[str], Worker]
# Seconds over which the CPU time of a process is measured, and the most of a core that counts as not spinning: what spins
# takes all it can get.
SECONDS, CALM = 3.0, 0.3


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Of a directory of this test alone; workers close transports with options after each test."""
    return f"zmq://?directory_path={tmp_path}/directory.sqlite&zmq_linger=2"


@pytest.fixture
def client(start: Start, client_model: str) -> Worker:
    """A process of its own: what it holds is looked at."""
    return start(client_model)


@pytest.fixture
def server(start: Start, client_model: str) -> Worker:
    return start(following(client_model))


def figures(worker: Worker, url: str) -> dict[str, int]:
    found: dict[str, int] = worker.run("counts", url=url)
    return found


def test_connections_are_made_at_first_use_reused_and_counted(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("listen_many", url=url, topic=topic, count=3)
    assert client.run("call_many", url=url, topic=topic, count=2) == []
    assert figures(client, url)["connections opened"] == 2
    before = figures(client, url)["connections reused"]
    for _ in range(5):
        assert client.run("call_many", url=url, topic=topic, count=2) == []
    after = figures(client, url)
    assert after["connections reused"] >= before + 10
    assert after["connections opened"] == after["connections open"] == client.run("connections", url=url) == 2
    assert (after["connections closed"], after["connections evicted"], after["connections failed"]) == (0, 0, 0)


def test_connections_are_closed_after_idle_time(client: Worker, server: Worker, url: str, topic: str) -> None:
    url += "&connection_idle_timeout=1"
    server.run("listen_many", url=url, topic=topic, count=5)
    assert client.run("call_many", url=url, topic=topic, count=5) == []
    wait_until(lambda: figures(client, url)["connections open"] == 0)
    assert client.run("connections", url=url) == 0
    assert figures(client, url)["connections closed: idle"] == 5
    assert client.run("call_many", url=url, topic=topic, count=5) == []


def test_the_least_recently_used_connection_makes_room(client: Worker, server: Worker, url: str, topic: str) -> None:
    limited = f"{url}&max_connections=3"
    server.run("listen_many", url=url, topic=topic, count=5)
    server.run("serve", url=url, topic=topic)
    for i in (0, 1, 2, 0, 3):  # 1 is the one used longest ago when 3 comes
        client.run("call", url=limited, topic=topic, server=str(i), method="echo")
    found = figures(client, limited)
    assert (found["connections evicted"], found["connections open"]) == (1, 3)
    for i in (0, 2, 3):
        client.run("call", url=limited, topic=topic, server=str(i), method="echo")
    assert figures(client, limited)["connections opened"] == 4
    client.run("call", url=limited, topic=topic, server="1", method="echo")
    assert figures(client, limited)["connections opened"] == 5


def test_connections_above_the_limit_that_are_needed_are_evicted_once_they_are_not(
    client: Worker, server: Worker, start: Start, client_model: str, url: str, topic: str
) -> None:
    limited = f"{url}&max_connections=1"
    server.run("listen_many", url=url, topic=topic, count=1)
    holder = start(client_model)
    holder.run("serve", url=url, topic=topic, server="holder")
    call = client.begin("call", url=limited, topic=topic, server="holder", method="hold", timeout=60)
    wait_until(lambda: holder.run("began", label="holder"))
    client.run("call", url=limited, topic=topic, server="0", method="echo")
    holder.run("release", label="holder")
    call.result(20)
    wait_until(lambda: figures(client, limited)["connections open"] == 1, 2)
    assert figures(client, limited)["connections evicted"] == 1
    # All are needed at once, although that is more than the limit.
    server.run("listen_many", url=url, topic=topic, count=20, first=1)
    assert client.run("call_many", url=limited, topic=topic, count=21) == []
    wait_until(lambda: figures(client, limited)["connections open"] == 1, 2)


def test_connections_are_dropped_as_soon_as_the_directory_no_longer_lists_their_peers(
    client: Worker, server: Worker, start: Start, client_model: str, url: str, topic: str
) -> None:
    server.run("listen_many", url=url, topic=topic, count=4)
    other = start(client_model)
    other.run("serve", url=url, topic=topic, server="stays")
    assert client.run("call_many", url=url, topic=topic, count=4) == []
    client.run("call", url=url, topic=topic, server="stays", method="echo")
    assert figures(client, url)["connections open"] == 5
    # They listen no more, and live on; whoever sends to the topic next learns of it.
    server.run("stop_many", topic=topic)

    def calls_later() -> bool:
        client.run("call", url=url, topic=topic, server="stays", method="echo")
        return figures(client, url)["connections open"] == 1

    wait_until(calls_later, 2)
    assert figures(client, url)["connections lost"] == 0


def test_a_call_that_is_running_keeps_the_connection_of_a_server_that_stops(
    client: Worker, server: Worker, start: Start, client_model: str, url: str, topic: str
) -> None:
    server.run("serve", url=url, topic=topic, server="leaves")
    other = start(client_model)
    other.run("serve", url=url, topic=topic, server="stays")
    call = client.begin("call", url=url, topic=topic, server="leaves", method="hold", args={"value": 7}, timeout=60)
    wait_until(lambda: server.run("began", label="leaves"))
    server.run("stop", label="leaves")

    def looked_up() -> bool:
        client.run("call", url=url, topic=topic, server="stays", method="echo")
        return bool(figures(client, url)["topics looked up"] > 1)

    wait_until(looked_up)
    assert figures(client, url)["connections open"] == 2
    server.run("release", label="leaves")
    assert call.result(20) == 7
    wait_until(lambda: figures(client, url)["connections open"] == 1)
    assert figures(client, url)["connections lost"] == 0


def test_peers_that_come_back_at_once_are_found_without_a_storm(
    client: Worker, start: Start, client_model: str, url: str, topic: str
) -> None:
    url += "&heartbeat_interval=0.5"
    peers = 60
    servers = [start(following(client_model)) for _ in range(2)]
    for part, each in enumerate(servers):
        each.run("listen_many", url=url, topic=topic, count=peers // 2, first=part * peers // 2)
    assert client.run("call_many", url=url, topic=topic, count=peers) == []
    before = figures(client, url)["connections attempted"]
    for each in servers:
        each.signal(signal.SIGSTOP)
    calls = client.begin("call_many", url=url, topic=topic, count=peers, timeout=60)
    wait_until(lambda: figures(client, url)["connections lost"] == peers)
    assert cpu_shares([client], SECONDS)[0] < CALM
    # Each has one attempt under way, which the other side's system keeps; some may have had a few more.
    assert figures(client, url)["connections attempted"] - before <= peers * 4
    for each in servers:
        each.signal(signal.SIGCONT)
    assert calls.result(60) == []
    found = figures(client, url)
    assert found["connections open"] == peers
    assert found["connections attempted"] - before <= peers * 6


def test_attempts_to_reach_peers_that_do_not_answer_back_off(client: Worker, server: Worker, url: str, topic: str) -> None:
    """Each waits for twice as long as before it, so that there are only so many within a time."""
    # Nobody is there.
    url += "&rpc_zmq_host=127.77.77.77&rpc_zmq_bind_address=127.0.0.1&connection_idle_timeout=6"
    peers = 40
    server.run("listen_many", url=url, topic=topic, count=peers)
    began = time.monotonic()
    errors = client.run("call_many", url=url, topic=topic, count=peers, timeout=4)
    assert len(errors) == peers
    assert all("refuses connections" in error for error in errors)
    # After 0.05, 0.1, 0.2 ... s, or half of that: 7 or 8 within 4 s.
    rounds = 3
    limit = 4.0
    while limit < time.monotonic() - began:
        limit *= 2
        rounds += 1
    found = figures(client, url)
    assert peers * 4 <= found["connections attempted"] <= peers * (rounds + 7)
    assert found["connections failed"] >= peers * 4
    wait_until(lambda: client.run("connections", url=url) == 0, 30)  # nobody sends to that topic any more


def test_a_thousand_peers_come_and_go(client: Worker, server: Worker, url: str, topic: str) -> None:
    def come_and_go(number: int) -> None:
        of_round = f"{topic}-{number}"
        server.run("listen_many", url=url, topic=of_round, count=50)
        assert client.run("call_many", url=url, topic=of_round, count=50) == []
        assert figures(client, url)["connections open"] == 50
        server.run("close_many", topic=of_round)
        wait_until(lambda: client.run("connections", url=url) == 0)

    for number in range(3):  # what is allocated once and kept
        come_and_go(number)
    before = client.run("resources")
    for number in range(3, 23):
        come_and_go(number)
    after = wait_until(
        lambda: (now := client.run("resources"))["descriptors"] <= before["descriptors"] and now, what="its descriptors"
    )
    assert abs(after["bytes"] - before["bytes"]) <= before["bytes"] * 0.05, (before, after)
    assert figures(client, url)["connections opened"] == 23 * 50
