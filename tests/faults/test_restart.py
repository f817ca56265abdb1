# SPDX-License-Identifier: Apache-2.0
"""All servers of a cluster are killed at once, and others of the same names begin to listen at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.harness import MODELS, Directory, Worker, cpu_shares, following, wait_until
from tests.servers import RedisServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Start = Callable[[str], Worker]
Figures = Callable[..., None]

SERVERS, PROCESSES = 200, 4
# Seconds over which CPU time is measured, and how much more of a core may be used afterwards than before.
SECONDS, CALM = 3.0, 0.15
# Within this time all are found and used again. It takes a few seconds; others may be using the cores.
FOUND, PATIENCE = 10 if "CI" not in os.environ else 30, 60


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield Directory(f"zmq://?directory_path={tmp_path}/directory.sqlite").url(zmq_linger=1)
    else:
        with RedisServer() as server:
            yield Directory(f"zmq+redis://{server.address}/0?rpc_zmq_host=127.0.0.1").url(zmq_linger=1)


@pytest.mark.parametrize("url", ["sqlite", "redis"], indirect=True)
@pytest.mark.parametrize("model", MODELS)
def test_all_servers_are_restarted_at_once(
    start: Start, url: str, topic: str, model: str, tmp_path: Path, figures: Figures, request: pytest.FixtureRequest
) -> None:
    each, sign = SERVERS // PROCESSES, tmp_path / "go"
    client = start(model)
    old, new = ([start(following(model)) for _ in range(PROCESSES)] for _ in range(2))
    places = [{"url": url, "topic": topic, "count": each, "first": part * each} for part in range(PROCESSES)]
    for listening in [worker.begin("listen_many", **place) for worker, place in zip(old, places, strict=True)]:
        listening.result(120)
    assert client.run("call_many", limit=120, url=url, topic=topic, count=SERVERS, timeout=60) == []
    listens = [w.begin("faults.restart.listen_when", **place, sign=str(sign)) for w, place in zip(new, places, strict=True)]
    before = cpu_shares([client, *old], SECONDS)
    assert client.run("connections", url=url) == SERVERS

    names = [str(number) for number in range(SERVERS)]
    client.run("load.start", url=url, topic=topic, callers=8, servers=names, timeout=PATIENCE)
    wait_until(lambda: sum(client.run("load.done", topic=topic).values()) > SERVERS)
    killed = time.monotonic()
    for worker in old:
        worker.process.kill()
    sign.touch()
    # Lost, or closed because the directory has others under their names already.
    wait_until(lambda: client.run("counts", url=url)["connections closed"] >= SERVERS, PATIENCE)
    noticed = time.monotonic() - killed
    errors = client.run("call_many", limit=PATIENCE * 2, url=url, topic=topic, count=SERVERS, timeout=PATIENCE)
    recovered = time.monotonic() - killed
    found = max(listening.result(PATIENCE) for listening in listens)
    result = client.run("load.stop", topic=topic)

    # Calls that the old ones had end at once with what is known, or go to the new ones; none times out.
    assert [error for error in errors if "is gone" not in error] == []
    assert result["wrong"] == 0
    assert [error for error in result["errors"] if not error.startswith("ServerGone")] == []
    assert len(result["errors"]) <= 8
    assert client.run("call_many", limit=120, url=url, topic=topic, count=SERVERS, timeout=PATIENCE) == []
    wait_until(lambda: client.run("connections", url=url) == SERVERS, PATIENCE, "the end of the old connections")
    after = cpu_shares([client, *new], SECONDS)
    assert all(now < then + CALM for then, now in zip(before, after, strict=True)), (before, after)
    assert recovered < FOUND
    counts = client.run("counts", url=url)
    assert counts["connections attempted"] <= SERVERS * 12
    figures(
        f"restart of {SERVERS} servers at once, {request.node.callspec.params['url']}",
        model,
        notice=noticed,
        recover=recovered,
        until_all_listen_s=found,
        calls_ended_with_ServerGone=len(result["errors"]) + len(errors),
        attempts_each=(counts["connections attempted"] - SERVERS) / SERVERS,
        client_cpu_before_percent=before[0] * 100,
        client_cpu_after_percent=after[0] * 100,
        servers_cpu_before_percent=sum(before[1:]) * 100,
        servers_cpu_after_percent=sum(after[1:]) * 100,
    )
