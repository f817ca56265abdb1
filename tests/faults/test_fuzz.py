# SPDX-License-Identifier: Apache-2.0
"""Strangers that send anything: it is counted, logged at a bounded rate, and disturbs nobody else.

A run is repeated with the seed that a failed test prints, in GREEN_ZMQ_SEED.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from green_zmq import wire
from tests.contract.harness import GREEN, MODELS, Directory, Raised, Worker, cpu_shares, following, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.one_directory, pytest.mark.timeout(300)]

Start = Callable[..., Worker]
Figures = Callable[..., None]
# Messages to a server of each model and answers to a client of each: a million and more over the three.
REQUESTS, ANSWERS = 280_000, 55_000
# The most that a server may grow by, and a client, bytes. A server remembers some ten thousand senders that were made up; if
# either kept the messages that it drops, it would be more.
GROWTH, GROWTH_OF_CLIENT = 18 << 20, 4 << 20
# The most lines that a process may log: one a minute of each kind of nonsense.
LINES = 12
# What anybody else is to have all the time, on whatever machine: calls that are answered within so many seconds, and so many
# of them in a second.
PATIENCE, PACE = 10, 2

# One without assertions as well: they must not be what protects it.
all_models = pytest.mark.parametrize(
    ("model", "options"), [*((model, ()) for model in MODELS), ("eventlet", ("-O",))], ids=[*MODELS, "optimised"]
)


@pytest.fixture
def seed() -> int:
    seed = int(os.environ.get("GREEN_ZMQ_SEED", random.randrange(1 << 32)))
    print(f"GREEN_ZMQ_SEED={seed}")
    return seed


def assert_quiet(worker: Worker) -> int:
    """It has told of what it got, in few lines, and of nothing worse; how many. Each lost message is told of besides."""
    lines = [line for line in worker.run("logged") if not line.startswith("ERROR lost")]
    assert len(lines) <= LINES, lines
    assert all(line.startswith("WARNING") for line in lines), lines
    log = worker.log.read_text()
    assert "CRITICAL" not in log
    assert "Traceback" not in log
    return len(lines)


_NOT_RUN = (
    *("for another instance", "repeated", "closed long ago", "too late", "with a bad body"),
    *("refused: not_here", "refused: busy"),
)


def not_run(counts: dict[str, int]) -> int:
    return sum(counts.get(f"requests {name}", 0) for name in _NOT_RUN)


def counted_requests(server: Worker, url: str, ledger: Path) -> int:
    """Those that were run, but for the 101 of a real client, and those that were not; some may still be in line."""
    return len(ledger.read_text().splitlines()) - 101 + not_run(server.run("counts", url=url))


def assert_counted(counts: dict[str, int], kinds: Counter[str], ran: int, others: int = 0) -> None:
    """What was sent was counted, as what it was. So many others may each have sent one of no, or another, version."""
    versions = sum(n for name, n in counts.items() if name.startswith("requests of wire version")) - kinds["version"]
    strange = counts["requests that are none of ours"] - kinds["none"]
    assert min(versions, strange) >= 0
    assert versions + strange <= others
    assert ran + not_run(counts) == kinds["requests"], counts


def assert_undisturbed(client: Worker, topic: str, seconds: float) -> int:
    """Those who have called for so long went on, and go on, and nothing of theirs went wrong; how many calls they made."""
    before = client.run("load.done", topic=topic)
    assert sum(before.values()) >= PACE * seconds
    wait_until(lambda: all(n > before[caller] for caller, n in client.run("load.done", topic=topic).items()))
    result = client.run("load.stop", topic=topic)
    assert result["errors"] == []
    assert result["wrong"] == 0
    return int(result["calls"])


def assert_idle(worker: Worker) -> None:
    """It has nothing left to do."""
    wait_until(lambda: cpu_shares([worker], 1)[0] < 0.045, 20)


@all_models
def test_a_server_is_sent_anything(
    start: Start,
    directory: Directory,
    topic: str,
    model: str,
    options: tuple[str, ...],
    seed: int,
    tmp_path: Path,
    figures: Figures,
) -> None:
    server, client = start(model, *options), start(following(model), *options)
    stranger, other = start("threads", *options), start("threads", *options)
    url, ledger, good = directory.url(max_message_bytes=2_000_000), tmp_path / "ledger", f"{topic}-good"
    # Few workers: an idle one of oslo.messaging's wakes once a second, and 64 of them, if together, use up to 9 % of a core.
    server.run("serve", limit=200, url=url, topic=good, pool=4)
    server.run("faults.fuzz.listen", url=url, topic=topic, ledger=str(ledger))
    recorded = client.run("faults.fuzz.record", url=directory.url(zmq_linger=1), topic=topic, count=50)
    host, port, instance = server.run("address", url=url)
    where = {"host": host, "port": port}
    wait_until(lambda: len(ledger.read_text().splitlines()) == 101)
    # Once, so that what is allocated only once is there.
    args = {**where, "instance": instance, "topic": topic, "recorded": recorded["frames"]}
    warm = stranger.run("faults.fuzz.attack", count=10_000, seed=seed + 1, **args)
    wait_until(lambda: counted_requests(server, url, ledger) == warm["kinds"]["requests"], what="the last of them was run")
    assert_counted(server.run("counts", url=url), Counter(warm["kinds"]), len(ledger.read_text().splitlines()) - 101)
    before = server.run("resources")["bytes"]
    client.run("load.start", url=directory.url(), topic=good, callers=1, servers=[""], timeout=PATIENCE)
    began = time.monotonic()
    # All that time there are those who speak no ZeroMQ, or speak it wrongly.
    connecting = other.begin("faults.fuzz.attack_tcp", **where, seed=seed)
    told = stranger.run("faults.fuzz.attack", limit=200, count=REQUESTS - 10_000, seed=seed, **args)
    seconds = time.monotonic() - began
    other.run("faults.fuzz.calm")
    connections = connecting.result(60)
    assert connections > 10 * seconds
    calls = assert_undisturbed(client, good, seconds)
    assert_idle(server)
    grown = server.run("resources")["bytes"] - before
    kinds = Counter(told["kinds"]) + Counter(warm["kinds"])
    ran = ledger.read_text().splitlines()
    assert_counted(server.run("counts", url=url), kinds, len(ran) - 101, connections)

    # Nothing ran twice, and what a real client had sent does not run again, however often it is sent again.
    twice = [message for message, n in Counter(ran).items() if n > 1]
    assert twice == []
    mine = [message for message in ran if message.startswith(recorded["sender"])]
    assert len(mine) == 101
    lines = assert_quiet(server)
    assert grown < GROWTH
    assert client.run("call", url=directory.url(zmq_linger=1), topic=topic, method="note", args={"value": 5}) == {"value": 5}

    # Whoever sends in somebody's name takes its messages from it, and from nobody else.
    stranger.run("faults.fuzz.forge", **where, instance=instance, topic=topic, sender=recorded["sender"])
    with pytest.raises(Raised, match="MessagingTimeout"):
        client.run("call", url=directory.url(zmq_linger=1), topic=topic, method="note", args={"value": 6}, timeout=1)
    assert client.run("call", url=directory.url(), topic=topic, method="note", args={"value": 7}) == {"value": 7}
    figures(
        f"garbage, truncated, replayed frames to a server{' (-O)' if options else ''}",
        model,
        lost=0,
        twice=len(twice),
        messages=sum(kinds.values()),
        sent_per_s=told["per second"],
        dealt_with_per_s=(REQUESTS - 10_000) / seconds,
        ran=len(ran),
        log_lines=lines,
        grown_MiB=grown / 2**20,
        undisturbed_calls=calls,
        wrong_connections=connections,
    )


@all_models
def test_a_client_is_answered_anything(
    start: Start, directory: Directory, topic: str, model: str, options: tuple[str, ...], seed: int, figures: Figures
) -> None:
    client, server, fake = start(model, *options), start(following(model), *options), start("threads", *options)
    url, good, timeout = directory.url(zmq_linger=1), f"{topic}-good", 1.5
    server.run("serve", limit=200, url=url, topic=good)
    fake.run("faults.fuzz.answer_wrongly", url=url, topic=topic, seed=seed)

    def answered(count: int) -> dict[str, Any]:
        """Call until there were so many answers; what came of it."""
        stop = f"until-{count}"
        client.run("serve", url=directory.url(), topic=f"{topic}-{stop}", server=stop)
        calling = client.begin("faults.fuzz.call_fake", url=url, topic=topic, callers=24, timeout=timeout, label=stop)

        def enough() -> bool:
            assert not calling.done(), calling.result()
            return int(fake.run("faults.fuzz.answered_wrongly", topic=topic)["answers"]) >= count

        wait_until(enough, 200, "the answers")
        client.run("release", label=stop)
        result: dict[str, Any] = calling.result(60)
        return result

    # Once, so that what is allocated only once is there.
    client.run("load.start", url=url, topic=good, callers=1, servers=[""], timeout=PATIENCE)
    began = time.monotonic()
    answered(10_000)
    before = client.run("resources")["bytes"]
    result = answered(ANSWERS)
    calls = assert_undisturbed(client, good, time.monotonic() - began)
    assert_idle(client)
    grown = client.run("resources")["bytes"] - before
    assert result["strange"] == []
    clear = {"cast", "right", "what it was told", "MessagingTimeout", "ServerGone", "WireError", "RemoteError"}
    assert set(result["outcomes"]) <= clear | {"MessageDeliveryFailure", "ValueError_Remote"}, result
    assert result["outcomes"].get("right", 0) > 50
    assert result["slowest"] < timeout + 5, f"in which it was busy for {result['busy']} s"
    lines = assert_quiet(client)
    counts = client.run("counts", url=url)
    assert counts["answers that are none of ours"] > ANSWERS / 10
    assert counts["answers from a wrong instance"] > ANSWERS / 20
    assert counts["answers nobody waits for"] > ANSWERS / 10
    assert grown < GROWTH_OF_CLIENT
    answers = fake.run("faults.fuzz.answered_wrongly", topic=topic)["answers"]
    fake.kill()
    wait_until(lambda: not any(client.run("leftovers", url=url).values()), 30, client.run("leftovers", url=url))
    figures(
        f"garbage, truncated, replayed answers to a client{' (-O)' if options else ''}",
        model,
        answers=answers,
        log_lines=lines,
        slowest_s=result["slowest"],
        grown_MiB=grown / 2**20,
        undisturbed_calls=calls,
        **{f"ended_{name}".replace(" ", "_"): n for name, n in result["outcomes"].items()},
    )


@pytest.mark.parametrize("model", GREEN)
def test_a_client_is_sent_answers_that_take_long(
    start: Start, directory: Directory, topic: str, model: str, seed: int, figures: Figures
) -> None:
    """However many there are: the timers of a client, its callers and its other green threads have their turn between two."""
    client, fake, url = start(model), start("threads"), directory.url(zmq_linger=1)
    client.run("serve", url=directory.url(), topic=f"{topic}-stop", server="stop")
    client.run("call_in_vain", url=url, topic=f"{topic}-nobody", method="echo", timeout=0.05)
    fake.run("faults.fuzz.answer_wrongly", url=url, topic=topic, seed=seed, at_length=300)

    def read() -> float:
        return float(client.run("counts", url=url).get("answers nobody waits for", 0)) / wire.MOST_IDS

    watching = client.begin("faults.fuzz.cpu_between_turns", label="stop")
    assert "MessagingTimeout" in client.run("call_in_vain", url=url, topic=topic, method="note", timeout=0.5)
    before = wait_until(read, 60, "the first answers")
    # What had come before its connection is lost is read all the same.
    fake.kill()
    wait_until(lambda: client.run("counts", url=url)["connections lost"], 60)
    client.run("release", label="stop")
    worst, used = watching.result(60)
    # Two or three of them at a time, not the hundred that are read of usual ones.
    each = used / read()
    assert worst < 0.2 + 20 * each
    assert before < read()
    figures("answers that take long to be looked at", model, most_cpu_at_a_time_s=worst, each_takes_s=each, answers=read())
