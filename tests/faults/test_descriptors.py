# SPDX-License-Identifier: Apache-2.0
"""Processes out of descriptors: they say so, serve on where they can, do not spin, and recover."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.harness import MODELS, Raised, Worker, cpu_shares, following, wait_until
from tests.servers import RedisServer

pytestmark = pytest.mark.slow

Start = Callable[[str], Worker]
# Seconds over which the CPU time of a process is measured, and the most of a core that counts as not spinning: what spins
# takes all it can get.
SECONDS, CALM = 2.0, 0.2


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


def raised(worker: Worker, scenario: str, **args: object) -> Raised:
    with pytest.raises(Raised) as caught:
        worker.run(scenario, **args)
    return caught.value


# Of a process that sends.


def test_a_sender_says_so_serves_others_and_recovers(
    client: Worker, server: Worker, client_model: str, url: str, topic: str, figures: Callable[..., None]
) -> None:
    server.run("listen_many", url=url, topic=topic, count=20)
    client.run("call", url=url, topic=topic, server="0", method="echo")
    limit = client.run("leave_descriptors", count=8)  # too few for a connection, enough for files
    calls = client.begin("call_many", url=url, topic=topic, count=20, timeout=SECONDS + 4)
    began = time.monotonic()
    error = raised(client, "cast", url=url, topic=topic, server="1", method="echo", retry=0)
    notice = time.monotonic() - began
    assert error.name == "MessageDeliveryFailure"
    assert f"out of descriptors, of which it may have {limit}" in error.text
    used = cpu_shares([client], SECONDS)[0]
    assert used < CALM
    assert client.run("call", url=url, topic=topic, server="0", method="echo", args={"value": 3}) == 3
    errors = calls.result(30)
    assert len(errors) == 19  # all but the one that was connected already
    for text in errors:
        assert f"out of descriptors, of which it may have {limit}" in text
        assert "ulimit -n" in text
    (complaint,) = [line for line in client.run("logged") if "out of descriptors" in line]
    assert str(limit) in complaint
    client.run("give_descriptors_back")
    began = time.monotonic()
    assert client.run("call_many", url=url, topic=topic, count=20) == []
    figures("sender out of descriptors", client_model, notice=notice, recover=time.monotonic() - began, cpu_percent=100 * used)


def test_no_number_of_descriptors_ends_a_process(
    client: Worker, server: Worker, client_model: str, url: str, topic: str, figures: Callable[..., None]
) -> None:
    """With too few libzmq gives up its process in several places."""
    client.run("serve", url=url, topic=f"{topic}-own", label="own")
    assert client.run("call", url=url, topic=f"{topic}-own", method="who") == "own"
    worst = 0.0
    for left in range(12):
        of_round = f"{topic}-{left}"
        server.run("listen_many", url=url, topic=of_round, count=4)
        client.run("call", url=url, topic=of_round, server="0", method="echo")
        client.run("leave_descriptors", count=left)
        client.run("call_many", url=url, topic=of_round, count=4, timeout=0.2)
        assert client.run("call", url=url, topic=f"{topic}-own", method="who") == "own"
        assert "out of descriptors" in raised(client, "serve", url=url, topic=topic, tag="new").text
        client.run("give_descriptors_back")
        began = time.monotonic()
        assert client.run("call_many", url=url, topic=of_round, count=4) == []
        worst = max(worst, time.monotonic() - began)
    figures("any number of descriptors left", client_model, recover=worst, numbers_tried=12)


@pytest.mark.parametrize("left", [0, 6, 24])
def test_a_transport_that_cannot_begin_says_so_and_can_later(
    client: Worker, server: Worker, client_model: str, url: str, topic: str, left: int, figures: Callable[..., None]
) -> None:
    """There is too little for a context, a poller or the first hub of a thread."""
    server.run("serve", url=url, topic=topic)
    client.run("open_transport", url=url)
    client.run("faults.limits.snatch", seconds=0)  # imports what is needed
    client.run("leave_descriptors", count=left)
    began = time.monotonic()
    to_topic = {"topic": topic, "method": "echo"}
    for scenario, args in (("call", to_topic), ("cast", to_topic), ("faults.limits.begin", {})):
        error = raised(client, scenario, limit=20, url=url, **args)
        assert error.names[:2] == ["OutOfDescriptors", "MessageDeliveryFailure"]
        assert "ulimit -n" in error.text
    notice = (time.monotonic() - began) / 3
    assert not any("defect" in line for line in client.run("logged"))
    client.run("give_descriptors_back")
    began = time.monotonic()
    assert client.run("call", url=url, topic=topic, method="who") == "server"
    recover = time.monotonic() - began
    client.run("serve", url=url, topic=f"{topic}-own", label="own")
    # Nobody's record has suffered by it: who asks for the first time finds both.
    for name, label in ((topic, "server"), (f"{topic}-own", "own")):
        assert server.run("call", url=url, topic=name, method="who", tag="asks anew") == label
    figures("no descriptor for a transport", client_model, notice=notice, recover=recover)


@pytest.mark.parametrize("left", [0, 6])
def test_a_directory_that_cannot_be_opened_is_opened_later(
    client: Worker, server: Worker, client_model: str, url: str, topic: str, left: int, figures: Callable[..., None]
) -> None:
    """They ran out after the transport had begun, and before it asked anybody for anything."""
    server.run("serve", url=url, topic=topic)
    client.run("faults.limits.begin", url=url)
    client.run("leave_descriptors", count=left)
    began = time.monotonic()
    error = raised(client, "call", limit=20, url=url, topic=topic, method="who", timeout=5)
    notice = time.monotonic() - began
    assert error.name == "DirectoryError"
    assert "out of descriptors" in error.text
    cast = client.begin("cast", url=url, topic=topic, method="note", args={"value": 1})
    used = cpu_shares([client], SECONDS)[0]
    assert used < CALM
    client.run("give_descriptors_back")
    began = time.monotonic()
    assert client.run("call", url=url, topic=topic, method="who") == "server"
    cast.result(20)
    wait_until(lambda: server.run("seen", label="server") == [1])
    assert not any("defect" in line for line in client.run("logged"))
    figures(
        "no descriptor for the directory",
        client_model,
        notice=notice,
        recover=time.monotonic() - began,
        lost=0,
        twice=0,
        cpu_percent=100 * used,
    )


@pytest.mark.parametrize("model", MODELS)
def test_the_boot_is_not_unknown_for_ever(start: Start, model: str) -> None:
    """Who takes it for another one removes everybody from the directory."""
    worker, other = start(model), start(model)
    known = other.run("faults.limits.boot")
    worker.run("faults.limits.snatch", seconds=0)  # imports what is needed
    worker.run("leave_descriptors", count=0)
    assert raised(worker, "faults.limits.boot").name == "OSError"
    worker.run("give_descriptors_back")
    assert worker.run("faults.limits.boot") == known


def test_names_are_resolved_again_later(
    client: Worker, server: Worker, client_model: str, url: str, topic: str, figures: Callable[..., None]
) -> None:
    """Enough to begin with resolving, too little to end it: its native threads share what is left."""
    url += "&rpc_zmq_host=localhost&rpc_zmq_bind_address=127.0.0.1"
    server.run("listen_many", url=url, topic=topic, count=20)
    client.run("call", url=url, topic=topic, server="0", method="echo")
    for left in (12, 14, 17, 20):
        client.run("leave_descriptors", count=left)
        client.run("call_many", url=url, topic=topic, count=20, timeout=0.3)
        client.run("give_descriptors_back")
    began = time.monotonic()
    assert client.run("call_many", url=url, topic=topic, count=20) == []
    figures("no descriptor to resolve a name", client_model, recover=time.monotonic() - began)


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


def test_redis_is_connected_to_again_later(
    client: Worker, server: Worker, client_model: str, redis_server: RedisServer, topic: str, figures: Callable[..., None]
) -> None:
    """Its connections are lost while there is no descriptor for new ones."""
    url = f"zmq+redis://{redis_server.address}/0?rpc_zmq_host=127.0.0.1&zmq_linger=1"
    server.run("serve", url=url, topic=topic)
    assert client.run("call", url=url, topic=topic, method="who") == "server"
    client.run("faults.limits.snatch", seconds=0)  # imports what is needed
    client.run("leave_descriptors", count=0)
    snatching = client.begin("faults.limits.snatch", seconds=1)  # the descriptors of the connections that are lost
    with redis_server.client() as looking:
        for each in looking.client_list():
            if each["id"] != str(looking.client_id()):
                looking.client_kill_filter(_id=each["id"])
        snatching.result(20)
        error = raised(client, "call", limit=20, url=url, topic=f"{topic}-other", method="who", timeout=2)
        assert {"DirectoryError", "MessagingTimeout"} & set(error.names)
        assert "directory" in error.text
        used = cpu_shares([client], SECONDS)[0]
        assert used < CALM
        assert client.run("call", url=url, topic=topic, method="who") == "server"
        server.run("serve", url=url, topic=f"{topic}-other", label="other")
        client.run("give_descriptors_back")
        began = time.monotonic()
        assert client.run("call", url=url, topic=f"{topic}-other", method="who", timeout=30) == "other"
    figures("no descriptor for Redis", client_model, recover=time.monotonic() - began, cpu_percent=100 * used)


# Of a process that listens.


def test_a_listener_says_so_serves_on_and_recovers(
    client: Worker, server: Worker, start: Start, client_model: str, url: str, topic: str, figures: Callable[..., None]
) -> None:
    server.run("serve", url=url, topic=topic)
    assert client.run("call", url=url, topic=topic, method="echo", args={"value": 1}) == 1
    server.run("leave_descriptors", count=0)
    late = start(client_model)
    # Many that want to connect, again and again.
    began = time.monotonic()
    calls = [late.begin("call", url=url, topic=topic, method="echo", tag=f"late {i}", timeout=60) for i in range(20)]
    wait_until(lambda: [line for line in server.run("logged") if "can connect to this one any more" in line])
    notice = time.monotonic() - began
    used = cpu_shares([server], SECONDS)[0]
    assert used < CALM
    assert cpu_shares([client], SECONDS)[0] < CALM
    assert client.run("calls", url=url, topic=topic, method="who", count=20) == ["server"] * 20
    assert not any(call.done() for call in calls)
    began = time.monotonic()
    server.run("give_descriptors_back")
    for call in calls:
        call.result(30)
    recover = time.monotonic() - began
    (error,) = [line for line in server.run("logged") if "ERROR" in line]
    assert "raise its limit of open files" in error
    assert client.run("calls", url=url, topic=topic, method="who", count=20) == ["server"] * 20
    assert client.run("counts", url=url)["connections opened"] == 1
    figures("listener out of descriptors", client_model, notice=notice, recover=recover, cpu_percent=100 * used)


def test_a_listener_whose_application_takes_every_free_descriptor_does_not_spin(
    client: Worker, server: Worker, client_model: str, url: str, topic: str, figures: Callable[..., None]
) -> None:
    server.run("serve", url=url, topic=topic)
    assert client.run("call", url=url, topic=topic, method="echo", args={"value": 1}) == 1
    host, port, _ = server.run("address", url=url)
    server.run("faults.limits.snatch", seconds=0)  # imports what is needed
    worst = slowest = 0.0
    for _ in range(2):
        server.run("leave_descriptors", count=0)
        snatching = server.begin("faults.limits.snatch", seconds=1)
        waiting = []
        for _ in range(60):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex((host, port))
        snatching.result(20)
        worst = max(worst, cpu_shares([server], SECONDS)[0])
        assert worst < CALM
        assert client.run("call", url=url, topic=topic, method="echo", args={"value": 2}) == 2
        for each in waiting:
            each.close()
        began = time.monotonic()
        server.run("give_descriptors_back")
        # Somebody new gets in.
        assert server.run("call", url=url, topic=topic, method="who", tag="new", timeout=30) == "server"
        server.run("cleanup", url=url, tag="new")
        slowest = max(slowest, time.monotonic() - began)
    figures("listener whose descriptors are snatched", client_model, recover=slowest, cpu_percent=100 * worst)


def test_a_listener_can_be_closed_while_nobody_can_connect(
    client: Worker, server: Worker, client_model: str, url: str, topic: str, figures: Callable[..., None]
) -> None:
    server.run("serve", url=url, topic=topic, tag="closed")
    assert client.run("call", url=url, topic=topic, method="who") == "server"
    host, port, _ = server.run("address", url=url, tag="closed")
    server.run("leave_descriptors", count=0)
    with socket.socket() as waiting:
        waiting.setblocking(False)
        waiting.connect_ex((host, port))
        wait_until(lambda: [line for line in server.run("logged") if "can connect to this one any more" in line])
        server.run("end", label="server")
        server.run("cleanup", url=url, tag="closed")
    server.run("give_descriptors_back")
    server.run("serve", url=url, topic=topic, tag="closed")
    began = time.monotonic()
    assert client.run("call", url=url, topic=topic, method="who") == "server"
    figures("listener closed while out of descriptors", client_model, recover=time.monotonic() - began)
