# SPDX-License-Identifier: Apache-2.0
"""Servers: starting, stopping, and what they do meanwhile."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable

import pytest

from tests.contract.harness import MODELS, ROOT, Directory, Fleet, Raised, Worker, following, wait_until


def test_a_server_is_found_from_start_to_stop(client: Worker, server: Worker, url: str, topic: str) -> None:
    how = {"url": url, "topic": topic, "method": "who", "at_least_once": True}
    for i in range(5):
        label = f"s{i}"
        server.run("serve", url=url, topic=topic, server=label)
        assert client.run("call", **how) == label
        server.run("stop", label=label)
        with pytest.raises(Raised, match="MessageUndeliverable"):
            client.run("call", **how)


@pytest.mark.parametrize("ours", [False, True], ids=["their executor", "our executor"])
def test_a_stopped_server_can_be_started_again(client: Worker, server: Worker, url: str, topic: str, ours: bool) -> None:
    server.run("serve", url=url, topic=topic, ours=ours)
    for i in range(3):
        assert client.run("call", url=url, topic=topic, method="echo", args={"value": i}, at_least_once=True) == i
        server.run("stop", label="server")
        server.run("wait", label="server")
        server.run("start_again", label="server")


@pytest.mark.parametrize("ours", [False, True], ids=["their executor", "our executor"])
def test_wait_lets_what_has_begun_end_and_its_replies_arrive(
    client: Worker, server: Worker, url: str, topic: str, ours: bool
) -> None:
    server.run("serve", url=url, topic=topic, ours=ours)
    calls = [client.begin("call", url=url, topic=topic, method="hold", args={"value": i}) for i in range(5)]
    wait_until(lambda: len(server.run("began", label="server")) == 5)
    server.run("stop", label="server")
    waiting = server.begin("wait", label="server")
    assert not any(call.done() for call in calls)
    server.run("release", label="server")
    assert [call.result(10) for call in calls] == list(range(5))
    waiting.result(10)


@pytest.mark.parametrize("ours", [False, True], ids=["their executor", "our executor"])
def test_a_planned_stop_loses_nothing_and_runs_nothing_twice(
    client: Worker, server: Worker, other: Worker, url: str, topic: str, ours: bool
) -> None:
    server.run("serve", url=url, topic=topic, server="a", pool=2, ours=ours)
    other.run("serve", url=url, topic=topic, server="b", pool=2, ours=ours)
    how = {"url": url, "topic": topic, "method": "rest", "args": {"seconds": 0.01}, "timeout": 30}
    calls = client.begin("calls_together", **how, values=list(range(100)))
    casts = client.begin("casts", url=url, topic=topic, method="note", values=list(range(1000, 1100)))
    wait_until(lambda: server.run("seen", label="a"))
    server.run("stop", label="a")
    server.run("wait", label="a")
    assert calls.result(40) == list(range(100))
    casts.result(20)
    expected = Counter([*range(100), *range(1000, 1100)])
    seen = wait_until(
        lambda: len(both := server.run("seen", label="a") + other.run("seen", label="b")) >= len(expected) and both,
        what="all messages",
    )
    assert Counter(seen) == expected
    assert len(other.run("seen", label="b")) > 100


def test_what_the_only_server_gives_back_its_successor_gets(
    client: Worker, server: Worker, other: Worker, url: str, topic: str
) -> None:
    server.run("serve", url=url, topic=topic, server="a", pool=1)
    held = client.begin("call", url=url, topic=topic, method="hold", args={"value": "held"}, timeout=30)
    wait_until(lambda: server.run("began", label="a"))
    client.run("casts", url=url, topic=topic, method="note", values=list(range(20)))
    call = client.begin("call", url=url, topic=topic, method="note", args={"value": "call"}, timeout=30)
    wait_until(lambda: client.run("leftovers", url=url)["open"] >= 2)
    server.run("stop", label="a")
    other.run("serve", url=url, topic=topic, server="b", pool=1)
    assert call.result(20) == "call"
    server.run("release", label="a")
    assert held.result(20) == "held"
    wait_until(lambda: len(other.run("seen", label="b")) == 21)
    assert [value for value in other.run("seen", label="b") if value != "call"] == list(range(20))
    assert server.run("seen", label="a") == ["held"]


def test_stopping_one_listener_leaves_the_others(client: Worker, server: Worker, url: str, topic: str) -> None:
    for name in ("a", "b"):
        server.run("serve", url=url, topic=topic, server=name)
    server.run("end", label="a")
    assert client.run("calls", url=url, topic=topic, method="who", count=4) == ["b"] * 4
    with pytest.raises(Raised, match="MessageUndeliverable"):
        client.run("call", url=url, topic=topic, server="a", method="who", at_least_once=True)


@pytest.mark.rotated
def test_cleanup_can_be_repeated_and_the_transport_used_again(
    client: Worker, server: Worker, directory: Directory, topic: str
) -> None:
    own = directory.url(zmq_linger=1)
    for i in range(3):
        server.run("serve", url=own, topic=topic)
        assert client.run("call", url=own, topic=topic, method="echo", args={"value": i}) == i
        server.run("end", label="server")
        for worker in (client, server):
            worker.run("cleanup", url=own)
            worker.run("cleanup", url=own)


@pytest.mark.rotated
def test_cleanup_ends_calls_that_wait(client: Worker, server: Worker, directory: Directory, topic: str) -> None:
    own = directory.url(zmq_linger=1)
    server.run("serve", url=own, topic=topic)
    calls = [client.begin("call", url=own, topic=topic, method="hold", timeout=60) for _ in range(3)]
    calls += [client.begin("call", url=own, topic=f"{topic}-nobody", method="hold", timeout=60) for _ in range(3)]
    wait_until(lambda: len(server.run("began", label="server")) == 3)
    wait_until(lambda: client.run("leftovers", url=own)["waiting"])
    began = time.monotonic()
    client.run("cleanup", url=own)
    for call in calls:
        with pytest.raises(Raised, match="TransportClosed"):
            call.result(5)
    assert time.monotonic() - began < 5
    server.run("release", label="server")


@pytest.mark.rotated
def test_cleanup_has_the_last_casts_delivered(client: Worker, server: Worker, directory: Directory, topic: str) -> None:
    server.run("serve", url=directory.url(), topic=topic, pool=1)
    own = directory.url(zmq_linger=3)
    client.run("casts", url=own, topic=topic, method="note", values=list(range(20)))
    client.run("fanout", url=own, topic=topic, method="note", args={"value": 20})
    client.run("cleanup", url=own)
    wait_until(lambda: len(server.run("seen", label="server")) == 21, limit=3)


def test_a_server_can_be_stopped_after_its_transport_was_cleaned_up(server: Worker, directory: Directory, topic: str) -> None:
    own = directory.url(zmq_linger=1)
    server.run("serve", url=own, topic=topic)
    server.run("cleanup", url=own)
    server.run("end", label="server", limit=10)


def test_a_thread_that_is_awake_already_is_told_its_end(server: Worker, directory: Directory, topic: str) -> None:
    own = directory.url(zmq_linger=1)
    server.run("serve", url=own, topic=topic)
    server.run("end", label="server")
    server.run("cleanup_slowly", url=own, limit=10)
    assert not any("defect" in line for line in server.run("logged"))


def test_the_ping_endpoint_answers(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic, ping=True)
    assert client.run("call", url=url, topic=topic, method="oslo_rpc_server_ping") == "pong"


@pytest.mark.rotated
def test_a_client_with_metrics_enabled_works(
    client_model: str, start: Callable[[str], Worker], server: Worker, url: str, topic: str
) -> None:
    server.run("serve", url=url, topic=topic)
    client = start(client_model)
    client.run("open_transport", url=url)
    client.run("configure", group="oslo_messaging_metrics", metrics_enabled=True)
    assert client.run("call", url=url, topic=topic, method="echo", args={"value": 1}) == 1
    client.run("cast", url=url, topic=topic, method="note", args={"value": 1})
    with pytest.raises(Raised, match="MessagingTimeout"):
        client.run("call", url=url, topic=f"{topic}-nobody", method="echo", timeout=0.2)


def test_a_batch_listener_gets_full_batches_and_the_rest_in_time(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("listen_in_batches", url=url, topic=topic, label="batch", size=5, timeout=0.5)
    client.run("casts", url=url, topic=topic, method="any", values=list(range(12)))
    wait_until(lambda: sum(map(len, server.run("batches", label="batch"))) == 12)
    assert server.run("batches", label="batch") == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert client.run("calls_together", url=url, topic=topic, method="any", values=[1, 2, 3]) == [1, 2, 3]


def test_a_batch_listener_without_a_timeout_waits_for_full_batches(
    client: Worker, server: Worker, url: str, topic: str
) -> None:
    server.run("listen_in_batches", url=url, topic=topic, label="batch", size=3, timeout=None)
    client.run("casts", url=url, topic=topic, method="any", values=list(range(5)))
    client.run("cast", url=url, topic=topic, method="any", args={"value": 5})
    wait_until(lambda: sum(map(len, server.run("batches", label="batch"))) == 6)
    assert server.run("batches", label="batch") == [[0, 1, 2], [3, 4, 5]]


def test_a_handler_can_call_out_while_its_caller_waits(
    client: Worker, server: Worker, other: Worker, url: str, topic: str
) -> None:
    # client -> a -> b -> a, and back to a server in the caller's own process.
    server.run("serve", url=url, topic=topic, server="a")
    other.run("serve", url=url, topic=topic, server="b")
    client.run("serve", url=url, topic=topic, server="c")
    inner = {"url": url, "topic": topic, "server": "c", "method": "who"}
    for hop in ("a", "b", "a"):
        inner = {"url": url, "topic": topic, "server": hop, "method": "relay", "args": {"how": inner}}
    outer = {**inner, "server": "a"}
    assert client.run("call", **outer) == "c"


@pytest.mark.rotated
def test_a_pool_of_64_runs_64_handlers_at_a_time(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic, pool=64)
    values = list(range(200))
    calls = client.begin("calls_together", url=url, topic=topic, method="hold", values=values, timeout=30)
    wait_until(lambda: len(server.run("began", label="server")) == 64)
    server.run("release", label="server")
    assert calls.result(40) == values


@pytest.mark.rotated
def test_200_calls_that_rest_in_their_handlers_overlap(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic, pool=64)
    began = time.monotonic()
    how = {"url": url, "topic": topic, "method": "rest", "args": {"seconds": 0.2}, "timeout": 30}
    assert client.run("calls_together", **how, values=list(range(200))) == list(range(200))
    assert time.monotonic() - began < 10  # one after the other would take 40


@pytest.mark.rotated
def test_a_full_listener_holds_back_and_loses_nothing(client: Worker, server: Worker, directory: Directory, topic: str) -> None:
    own = directory.url(listener_window=4)
    server.run("serve", url=own, topic=topic, pool=1)
    held = client.begin("call", url=own, topic=topic, method="hold", args={"value": -1}, timeout=30)
    wait_until(lambda: server.run("began", label="server"))
    casts = client.begin("casts", url=own, topic=topic, method="note", values=list(range(8)))
    wait_until(lambda: server.run("counts", url=own).get("requests refused: busy", 0) > 1)
    server.run("release", label="server")
    casts.result(20)
    assert held.result(20) == -1
    wait_until(lambda: len(server.run("seen", label="server")) == 9)
    assert server.run("seen", label="server") == [-1, *range(8)]


def test_a_large_reply_to_a_message_that_is_answered_where_it_is_handed_over(
    client: Worker, server: Worker, url: str, topic: str
) -> None:
    """There is no executor in between, so it is the loop itself that replies: it must not wait for itself."""
    server.run("listen_many", url=url, topic=topic, count=1)
    value = "x" * (1 << 20)
    assert client.run("call", url=url, topic=topic, method="echo", args={"value": value}) == value
    server.run("close_many", topic=topic)


_ENDS = r"""
import sys, time
from tests.contract.worker import patch
model, url, topic, maker = sys.argv[1:]
patch(model)
import oslo_messaging
from oslo_config import cfg
import green_zmq
cfg.CONF([], project="contract")
class Endpoint:
    begun = 0
    def note(self, ctxt, value):
        sys.stdout.write(f"{value}\n")  # print() writes the end of the line by itself
        sys.stdout.flush()
        Endpoint.begun += 1
        time.sleep(0.002)
make = green_zmq.get_rpc_server if maker == "ours" else oslo_messaging.get_rpc_server
target = oslo_messaging.Target(topic=topic, server="ends")
executor = {"threads": "threading"}.get(model, model)
server = make(oslo_messaging.get_rpc_transport(cfg.CONF, url), target, [Endpoint()], executor=executor)
server.start(override_pool_size=2)
while Endpoint.begun < 50:
    time.sleep(0.001)
"""


@pytest.mark.one_directory
@pytest.mark.parametrize(
    ("model", "maker"),
    [(model, maker) for model in MODELS for maker in ("ours", "theirs") if (model, maker) != ("gevent", "theirs")],
)
def test_a_process_that_ends_without_stopping_its_server_runs_what_it_has_begun_and_gives_back_the_rest(
    fleet: Fleet, model: str, maker: str, url: str, topic: str
) -> None:
    """Executors refuse what comes when the interpreter has begun to end, and oslo.messaging knows nothing of that."""
    sender, other = fleet.get("client", following(model)), fleet.get("server", model)
    ends = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _ENDS, model, url, topic, maker],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    how = {"url": url, "topic": topic, "method": "note"}
    casts = [sender.begin("casts", **how, values=list(range(i, 400, 8))) for i in range(8)]
    told, errors = ends.communicate(timeout=30)
    assert ends.returncode == 0, errors
    assert "defect" not in errors
    other.run("serve", url=url, topic=topic)
    for each in casts:
        each.result(30)
    wait_until(lambda: len(other.run("seen", label="server")) + len(told.split()) >= 400)
    assert sorted([*map(int, told.split()), *other.run("seen", label="server")]) == list(range(400))
