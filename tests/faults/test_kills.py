# SPDX-License-Identifier: Apache-2.0
"""Threads are killed while they wait in a call, ten thousand of each model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contract.harness import GREEN, Worker, following

pytestmark = pytest.mark.slow

Start = Callable[[str], Worker]
COUNT = 10_000


def killed(scenario: str, model: str, start: Start, tmp_path: Path, timeout: float) -> dict[str, Any]:
    """What the scenario said after so many, and what that process had more than after some that came before."""
    url, topic = f"zmq://?directory_path={tmp_path}/directory.sqlite", "topic"
    start(following(model)).run("serve", url=url, topic=topic)
    client = start(model)
    client.run("faults.kills.begin", url=url, topic=topic, silent="silent", timeout=timeout)
    before = client.run(f"faults.kills.{scenario}", count=COUNT // 5, limit=100)
    began = time.monotonic()
    after = client.run(f"faults.kills.{scenario}", count=COUNT, limit=300)
    assert after["resources"]["descriptors"] <= before["resources"]["descriptors"]
    assert after["counts"]["connections opened"] == after["counts"]["connections open"] == 1
    grown = after["resources"]["bytes"] - before["resources"]["bytes"]
    assert grown < 0.05 * before["resources"]["bytes"], (before, after)
    ended = {kind: times - before["ended"].get(kind, 0) for kind, times in after["ended"].items()}
    return {"seconds": time.monotonic() - began, "grown_KiB": grown / 1024, "ended": ended, "counts": after["counts"]}


@pytest.mark.parametrize("model", GREEN)
def test_green_threads(model: str, start: Start, tmp_path: Path, figures: Callable[..., None]) -> None:
    found = killed("kill_green_threads", model, start, tmp_path, timeout=60)
    ended = found.pop("ended")
    assert {"answered", "GreenletExit", "Timeout"} <= set(ended), ended
    assert sum(ended.values()) - ended["answered"] > COUNT / 2
    abandoned = found.pop("counts")["calls abandoned"]
    assert abandoned > COUNT / 4
    figures("thread killed in a call, 10,000 times", model, **found, calls_abandoned=abandoned)


def test_native_threads(start: Start, tmp_path: Path, figures: Callable[..., None]) -> None:
    """Nothing kills a native thread; what comes nearest is an exception that another one raises in it.

    That comes between any two steps of Python's, so in the driver as well, also in places where nothing green can be
    killed. But a thread that waits for a lock goes on waiting: it gets the exception when its call is answered, or when the
    time of that has run out. So half of these calls, which nobody answers, have little time.
    """
    found = killed("kill_native_threads", "threads", start, tmp_path, timeout=0.02)
    ended, counts = found.pop("ended"), found.pop("counts")
    assert ended["Killed"] > COUNT / 4, ended
    figures("thread killed in a call, 10,000 times", "threads", **found, calls_abandoned=counts.get("calls abandoned", 0))


def test_native_threads_at_each_step_of_a_fanout(start: Start, tmp_path: Path, figures: Callable[..., None]) -> None:
    """Which they write themselves, a copy to each server. What was interrupted may reach some; later ones reach all."""
    url = f"zmq://?directory_path={tmp_path}/directory.sqlite&message_ttl=2"
    servers = [start(model) for model in ("eventlet", "gevent")]
    for server in servers:
        server.run("serve", url=url, topic="topic", pool=1)
    client = start("threads")
    client.run("faults.kills.begin", url=url, topic="topic", silent="silent", timeout=0.02)
    found = client.run("faults.kills.kill_at_each_step", limit=200, fanout=True)
    assert found["slowest"] < 4
    assert found["counts"]["messages in the outbox"] == 0
    for server in servers:
        seen = server.run("seen", label="server")
        assert len(seen) == len(set(seen))
        assert found["steps"] in seen, "nobody interrupted the last one"
    figures("thread killed at each step of a fanout", "threads", steps=found["steps"], slowest_call_after_it_s=found["slowest"])


def test_native_threads_at_each_step(start: Start, tmp_path: Path, figures: Callable[..., None]) -> None:
    """The exception comes at each line that a call runs in the driver, so also where by chance it hardly ever does."""
    url, topic = f"zmq://?directory_path={tmp_path}/directory.sqlite", "topic"
    start("eventlet").run("serve", url=url, topic=topic)
    client = start("threads")
    client.run("faults.kills.begin", url=url, topic=topic, silent="silent", timeout=0.02)
    found = client.run("faults.kills.kill_at_each_step", limit=200)
    assert found["ended"] == {"Killed": found["steps"] - 1, "answered": 1}
    # The loop looks after its connections every 5 s: one that was not woken is no better than that.
    assert found["slowest"] < 4
    figures("thread killed at each step of a call", "threads", steps=found["steps"], slowest_call_after_it_s=found["slowest"])
