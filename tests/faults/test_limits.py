# SPDX-License-Identifier: Apache-2.0
"""More than a process can take: floods, large messages, and thousands of topics. Memory stays bounded, and comes back."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contract.harness import Directory, Fleet, Raised, Worker, following, wait_until
from tests.faults.ledger import all_once, read, written

pytestmark = [pytest.mark.slow, pytest.mark.one_directory]

Start = Callable[[str], Worker]
Serve = Callable[..., Worker]
Figures = Callable[..., None]
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def server(fleet: Fleet, client_model: str) -> Worker:
    return fleet.get("server", following(client_model))


@pytest.fixture
def other(fleet: Fleet, client_model: str) -> Worker:
    """A second process that serves or sends, of the third model."""
    return fleet.get("server", following(following(client_model)))


class Memory:
    """The most that a process has used since this was made, beyond what it used then."""

    def __init__(self, worker: Worker) -> None:
        self._process = Path("/proc", str(worker.process.pid))
        worker.run("resources")  # gives back what is unused
        (self._process / "clear_refs").write_text("5")  # the peak begins anew
        self._before = self._read("VmRSS")

    def _read(self, name: str) -> int:
        (line,) = (line for line in (self._process / "status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * KIB

    @property
    def peak(self) -> float:
        """MiB."""
        return (self._read("VmHWM") - self._before) / MIB

    def back(self, worker: Worker) -> float:
        """MiB that it still uses."""
        worker.run("resources")
        return (self._read("VmRSS") - self._before) / MIB


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


@pytest.fixture
def serve(start: Start, client_model: str, topic: str, ledger: Path) -> Serve:
    """Start a process that runs one at a time of what it is sent, and holds it until it is released."""

    def serve(url: str, label: str, model: str = following(client_model), **how: Any) -> Worker:
        worker = start(model)
        how = {"pool": 1, "released": False, **how}
        worker.run("faults.ledger.serve", url=url, topic=topic, server=label, path=str(ledger), **how)
        return worker

    return serve


def idle(worker: Worker, url: str) -> None:
    """Nothing is left of what was sent or taken."""
    wait_until(
        lambda: not any({**worker.run("leftovers", url=url), "reply bytes": 0}.values()),
        what=lambda: worker.run("leftovers", url=url),
    )


# Floods.


def test_casts_that_a_server_is_slow_to_take(
    client: Worker,
    other: Worker,
    serve: Serve,
    client_model: str,
    directory: Directory,
    topic: str,
    ledger: Path,
    figures: Figures,
) -> None:
    """Each sender sends 94 MiB, the server is sent twice as much. What is on its way is less than 2 MiB for each."""
    url = directory.url(listener_window=8, outbox_messages=20, outbox_bytes=2 * MIB)
    senders, server = (client, other), serve(url, "slow", seconds=0.0005, released=True)
    warm = ["warm 0", "warm 1"]
    for sender, value in zip(senders, warm, strict=True):  # what is imported and allocated once
        sender.run("faults.limits.send", url=url, topic=topic, kind="cast", values=[value], callers=1, load=100 * KIB)
    values = {sender: [f"{number} {i}" for i in range(960)] for number, sender in enumerate(senders)}
    memory = {worker: Memory(worker) for worker in (server, *senders)}
    began = time.monotonic()
    how = {"url": url, "topic": topic, "kind": "cast", "callers": 16, "load": 100 * KIB}
    sending = [sender.begin("faults.limits.send", **how, values=values[sender]) for sender in senders]
    for each in sending:
        assert each.result(110)["errors"] == {}
    expected = [*warm, *(value for some in values.values() for value in some)]
    wait_until(lambda: len(read(ledger)) >= len(expected), 60)
    seconds = time.monotonic() - began
    assert server.run("counts", url=url)["requests refused: busy"] > 0
    peaks = [memory[worker].peak for worker in (server, *senders)]
    assert max(peaks) < 32, peaks
    for sender in senders:
        idle(sender, url)
        wait_until(lambda sender=sender: memory[sender].back(sender) < 12)
    wait_until(lambda: memory[server].back(server) < 12)
    figures(
        "casts to a slow server",
        client_model,
        **all_once(ledger, expected),
        flood_MiB=188,
        server_peak_MiB=peaks[0],
        sender_peak_MiB=max(peaks[1:]),
        messages_per_s=len(expected) / seconds,
    )


def test_casts_that_a_server_does_not_take(
    client: Worker, serve: Serve, client_model: str, directory: Directory, topic: str, ledger: Path, figures: Figures
) -> None:
    """Some are accepted, some are kept; the callers of the others are held back, and then get an error."""
    url = directory.url(listener_window=4, outbox_messages=10, cast_grace=0.2)
    server = serve(url, "held")
    values = [str(i) for i in range(40)]
    memory = Memory(client)
    began = time.monotonic()
    result = client.run(
        "faults.limits.send", limit=110, url=url, topic=topic, kind="cast", values=values, callers=40, load=100 * KIB
    )
    notice = time.monotonic() - began
    assert result["seconds"] >= 0.2 * 10
    errors = result["errors"]
    # In the pool of one, in the window, and in the outbox.
    assert 10 + 4 <= len(result["done"]) <= 10 + 4 + 1
    for text in errors.values():
        assert text.startswith("MessageDeliveryFailure: ")
        assert "the outbox is full (10 messages wait for their servers)" in text
        assert "all its servers are busy" in text
    assert memory.peak < 32
    began = time.monotonic()
    server.run("release", label="held")
    wait_until(lambda: len(read(ledger)) >= len(result["done"]))
    recover = time.monotonic() - began
    idle(client, url)
    found = all_once(ledger, result["done"])
    assert not set(errors) & written(ledger)
    figures(
        "casts to a full server",
        client_model,
        notice=notice,
        recover=recover,
        **found,
        callers_with_errors=len(errors),
        sender_peak_MiB=memory.peak,
    )


def test_calls_of_256_callers_to_a_pool_of_one(
    client: Worker, serve: Serve, client_model: str, directory: Directory, topic: str, ledger: Path, figures: Figures
) -> None:
    url = directory.url(listener_window=8)
    server = serve(url, "one")
    how = {"url": url, "topic": topic, "kind": "call", "callers": 256, "load": 100 * KIB}
    in_vain = [f"in vain {i}" for i in range(256)]
    memory = Memory(server)
    began = time.monotonic()
    result = client.run("faults.limits.send", limit=110, **{**how, "load": 10 * KIB}, values=in_vain, timeout=4)
    notice = time.monotonic() - began
    assert result["done"] == {}
    texts = list(result["errors"].values())
    assert all(text.startswith("MessagingTimeout: ") for text in texts)
    assert sum("accepted it and did not reply" in text for text in texts) <= 9
    # "All its servers are busy"; or, of those that are asking once more at that moment, that theirs was before.
    assert sum("busy" in text for text in texts) >= 240, texts
    # The flood ends: those that nobody waits for any more are not begun, new ones are. How long they were on their way the
    # server does not know, and that may be long here: at the most as long as they had.
    until = time.monotonic() + 4
    wait_until(lambda: time.monotonic() > until)
    began = time.monotonic()
    server.run("release", label="one")
    values = [str(i) for i in range(256)]
    result = client.run("faults.limits.send", limit=110, **how, values=values, timeout=100)
    recover = time.monotonic() - began
    assert result["errors"] == {}
    peak = memory.peak
    assert peak < 96, "all that are sent at a time are 25 MiB, in text and as read from the wire"
    found = all_once(ledger, values)
    assert sum(entry.value.startswith("in vain") for entry in read(ledger)) == 1
    idle(client, url)
    wait_until(lambda: memory.back(server) < 16)
    figures(
        "256 callers of a pool of one",
        client_model,
        notice=notice,
        recover=recover,
        **found,
        server_peak_MiB=peak,
    )


def test_a_second_server_takes_what_the_first_refuses(
    client: Worker, serve: Serve, client_model: str, directory: Directory, topic: str, ledger: Path, figures: Figures
) -> None:
    url = directory.url(listener_window=4)
    full, _ = serve(url, "full"), serve(url, "free", client_model, pool=4, seconds=0.002, released=True)
    values = [str(i) for i in range(200)]
    how = {"url": url, "topic": topic, "timeout": 100}
    calls = client.begin("faults.limits.send", **how, kind="call", callers=200, values=values)
    wait_until(lambda: len(read(ledger)) >= 195, 60)
    began = time.monotonic()
    full.run("release", label="full")
    result = calls.result(60)
    recover = time.monotonic() - began
    assert result["errors"] == {}
    by_full = list(result["done"].values()).count("full")
    assert by_full <= 4 + 1 + 4  # what it had, and the last few, which came when it was free
    found = all_once(ledger, values)
    figures("a second server besides a full one", client_model, recover=recover, **found, by_the_full=by_full)


def test_a_client_that_does_not_read_its_replies(
    client_model: str, start: Start, serve: Serve, directory: Directory, topic: str, ledger: Path, figures: Figures
) -> None:
    """It is stopped. Of each call it has one reply coming; once it is taken for lost, only as many as are kept for repeats."""
    url = directory.url(heartbeat_interval=1, listener_window=1000)
    server, other, client = serve(url, "server", pool=4), start(client_model), start(client_model)
    callers, cache = 192, 64
    values = [str(i) for i in range(callers)]
    how = {"url": url, "topic": topic, "kind": "call"}
    memory = Memory(server)
    calls = client.begin("faults.limits.send", **how, callers=callers, values=values, timeout=60, size=MIB)
    wait_until(lambda: sum(server.run("leftovers", url=url)[name] for name in ("unanswered",)) == 0)
    wait_until(lambda: server.run("faults.limits.tables", url=url)["records"] >= callers)
    client.signal(signal.SIGSTOP)
    server.run("release", label="server")
    wait_until(lambda: len(read(ledger)) == callers, 60)
    # Others are served meanwhile.
    answer = other.run("faults.limits.send", **how, callers=1, values=["other"], timeout=30)
    assert answer["done"] == {"other": "server"}
    began = time.monotonic()
    wait_until(lambda: memory.back(server) < cache + 24, 60, what=lambda: memory.back(server))
    notice = time.monotonic() - began
    peak = memory.peak
    assert peak < 2 * callers, "each is there twice at the most: encoded, and as libzmq has it"
    began = time.monotonic()
    client.signal(signal.SIGCONT)
    result = calls.result(100)
    recover = time.monotonic() - began
    for text in result["errors"].values():
        assert text.startswith("MessagingTimeout: ")
        assert "accepted it and no longer knows of it" in text
    assert recover < 40  # and not the time that they had
    assert len(result["done"]) >= cache - 4
    result = client.run("faults.limits.send", **how, callers=16, values=[f"later {i}" for i in range(16)], size=MIB)
    assert result["errors"] == {}
    found = all_once(ledger, values)
    idle(client, url)
    figures(
        "a client that reads no replies",
        client_model,
        notice=notice,
        recover=recover,
        **found,
        replies_MiB=callers,
        server_peak_MiB=peak,
    )


@pytest.mark.parametrize("ttl", [30, 3], ids=["in time", "too late"])
def test_a_fanout_with_a_slow_member(
    client: Worker, serve: Serve, client_model: str, directory: Directory, topic: str, ledger: Path, ttl: int, figures: Figures
) -> None:
    """The others get all at once, it gets all later; what it does not take in time is lost, and the log names it."""
    url = directory.url(listener_window=4, message_ttl=ttl)
    slow, _ = serve(url, "slow"), serve(url, "quick", client_model, released=True)
    values = [str(i) for i in range(40)]

    def run_by(label: str) -> list[str]:
        return sorted((entry.value for entry in read(ledger) if entry.server == label), key=int)

    def lost() -> int:
        return sum(int(line.split()[2]) for line in client.run("logged") if "lost" in line and "fanout" in line)

    memory = Memory(client)
    result = client.run("faults.limits.send", url=url, topic=topic, kind="fanout", callers=1, load=100 * KIB, values=values)
    assert result["errors"] == {}
    began, notice = time.monotonic(), result["seconds"]
    wait_until(lambda: len(run_by("quick")) == 40)
    if ttl == 3:
        wait_until(lambda: lost() >= 34)  # all but what it had accepted
        notice = time.monotonic() - began
        for line in client.run("logged"):
            assert f"pid {slow.process.pid}" in line
            assert "busy" in line or "did not begin it in time" in line
    began = time.monotonic()
    slow.run("release", label="slow")
    # What it had accepted it runs, unless it is too late for that.
    wait_until(lambda: len(run_by("slow")) + lost() >= 40, 30, what=lambda: client.run("logged"))
    recover = time.monotonic() - began
    idle(client, url)
    assert run_by("quick") == values
    run = run_by("slow")
    assert len(run) == len(set(run)) == 40 - lost()
    assert memory.peak < 32
    if ttl == 3:
        figures("fanout with a member that takes none", client_model, notice=notice, lost_and_named=lost(), twice=0)
    else:
        assert run == values
        figures("fanout with a slow member", client_model, notice=notice, recover=recover, lost=0, twice=0)


# Large messages.


def test_64_mib_both_ways(client: Worker, server: Worker, client_model: str, url: str, topic: str, figures: Figures) -> None:
    server.run("serve", url=url, topic=topic)
    size = 64 * MIB
    expected = [size, hashlib.sha256(("ä" + "x" * (size - 1)).encode()).hexdigest()]
    how = {"url": url, "topic": topic, "timeout": 60}
    memories: dict[Worker, Memory] = {}
    for _ in range(2):  # after the first, what is allocated once is there
        memories = {worker: Memory(worker) for worker in (client, server)}
        began = time.monotonic()
        assert client.run("call_fill", **how, method="digest", size=size) == expected
        there = time.monotonic() - began
        began = time.monotonic()
        assert client.run("call_for_length", **how, size=size) == size
        back = time.monotonic() - began
    # The reply is kept until its caller says that it has it.
    client.run("call", **how, method="echo")
    for worker, memory in memories.items():
        wait_until(lambda worker=worker, memory=memory: memory.back(worker) < 16)
    peak = max(memory.peak for memory in memories.values())
    figures("64 MiB both ways", client_model, there_s=there, back_s=back, peak_MiB=peak)


def _raised(client: Worker, scenario: str, **args: Any) -> Raised:
    with pytest.raises(Raised) as caught:
        client.run(scenario, **args)
    return caught.value


SMALL, LARGE = 100_000, 200_000


@pytest.mark.parametrize("limited", ["both", "sender", "receiver"])
def test_a_message_above_the_limit_is_an_error_at_once_and_disturbs_nobody_else(
    client: Worker, server: Worker, client_model: str, directory: Directory, topic: str, limited: str, figures: Figures
) -> None:
    """Requests and replies; the limit is the sender's, the receiver's, or both have it."""
    small, normal = directory.url(max_message_bytes=SMALL), directory.url()
    of_client = normal if limited == "receiver" else small
    of_server = normal if limited == "sender" else small
    server.run("serve", url=of_server, topic=topic)
    how = {"url": of_client, "topic": topic}
    held = client.begin("call", **how, method="hold", args={"value": 7}, timeout=60)
    before = client.run("counts", url=of_client)
    worst = 0.0
    for _ in range(3):
        for scenario, method in (("call_fill", "digest"), ("call_for_length", None), ("cast", "note")):
            args: dict[str, Any] = {"size": LARGE} if scenario != "cast" else {"args": {"value": "x" * LARGE}}
            began = time.monotonic()
            error = _raised(client, scenario, **how, **args, **({"method": method} if method else {}), timeout=30)
            worst = max(worst, time.monotonic() - began)
            assert "MessageTooLarge" in (error.name, error.exc_type)
            assert "max_message_bytes" in error.text
            assert str(SMALL) in error.text
            assert client.run("call", **how, method="echo", args={"value": 5}, timeout=5) == 5
    assert worst < 20  # of the 30 that a call had
    server.run("release", label="server")
    assert held.result(20) == 7
    assert server.run("seen", label="server") == [7]
    assert client.run("call", **how, method="echo", args={"value": "x" * 90_000}) == "x" * 90_000
    assert client.run("counts", url=of_client)["connections lost"] == before.get("connections lost", 0)
    figures(f"message above the limit of {limited}", client_model, notice=worst)


def test_a_fanout_above_the_limit_of_one_member_reaches_the_others(
    client: Worker, server: Worker, other: Worker, client_model: str, directory: Directory, topic: str, figures: Figures
) -> None:
    server.run("serve", url=directory.url(max_message_bytes=SMALL), topic=topic, server="small")
    other.run("serve", url=directory.url(), topic=topic, server="large")
    began = time.monotonic()
    client.run("fanout", url=directory.url(heartbeat_interval=9), topic=topic, method="note", args={"value": "x" * LARGE})
    wait_until(lambda: other.run("seen", label="large"))
    (line,) = wait_until(lambda: [line for line in client.run("logged") if "lost" in line])
    assert "max_message_bytes" in line
    assert f"pid {server.process.pid}" in line
    figures("fanout above the limit of a member", client_model, notice=time.monotonic() - began)


# Topics.


def test_10000_topics_leave_nothing_behind(
    client_model: str, start: Start, directory: Directory, topic: str, figures: Figures
) -> None:
    """500 are served by one process, each is sent one message; to the others, which nobody serves, goes a fanout."""
    url = directory.url(connection_idle_timeout=1)
    client, server = start(client_model), start(following(client_model))
    served, count = 500, 10_000

    def send(number: int, topics: int) -> float:
        of_round = f"{topic}-{number}"
        began = time.monotonic()
        how = {"url": url, "topic": of_round, "served": served, "count": topics, "callers": 32}
        assert client.run("faults.limits.send_to_topics", limit=110, **how) == topics
        return time.monotonic() - began

    server.run("faults.limits.serve_topics", limit=110, url=url, topic=f"{topic}-0", count=served)
    send(0, 2 * served)
    wait_until(lambda: not any(n for name, n in client.run("faults.limits.tables", url=url).items()), 30)
    before, memory = client.run("resources"), Memory(client)
    seconds = send(0, count)
    peak = memory.peak
    began = time.monotonic()
    wait_until(
        lambda: not any(n for name, n in client.run("faults.limits.tables", url=url).items()),
        30,
        what=lambda: client.run("faults.limits.tables", url=url),
    )
    recover = time.monotonic() - began
    wait_until(lambda: client.run("resources")["descriptors"] <= before["descriptors"])
    # Addresses that were encoded are remembered, up to 4096 of them.
    left = memory.back(client)
    assert left < 8
    assert client.run("counts", url=url)["connections open"] == 0
    # The next request that its receiver gets tells it that it can forget all before.
    client.run("call", url=url, topic=f"{topic}-0-0", method="echo")
    assert server.run("faults.limits.tables", url=url)["records"] <= 1
    figures(
        "10,000 topics",
        client_model,
        recover=recover,
        topics_per_s=count / seconds,
        peak_MiB=peak,
        left_MiB=left,
    )
