# SPDX-License-Identifier: Apache-2.0
"""Processes that are killed."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.contract.harness import Raised, Worker, wait_until

Start = Callable[[str], Worker]


def test_a_killed_server_ends_its_calls_at_once_and_others_take_over(
    client: Worker, server_model: str, start: Start, other: Worker, url: str, topic: str
) -> None:
    victim = start(server_model)
    victim.run("serve", url=url, topic=topic, server="victim")
    other.run("serve", url=url, topic=topic, server="other")
    call = client.begin("call", url=url, topic=topic, server="victim", method="hold", timeout=60)
    wait_until(lambda: victim.run("began", label="victim"))
    wait_until(lambda: victim.run("leftovers", url=url)["unanswered"] == 0)  # the client knows that it has it
    began = time.monotonic()
    victim.kill()
    with pytest.raises(Raised) as caught:
        call.result(20)
    assert time.monotonic() - began < 10
    assert caught.value.names[:2] == ["ServerGone", "MessagingTimeout"]
    assert f"pid {victim.process.pid}" in caught.value.text
    assert f"pid {victim.process.pid}" in (caught.value.server or "")
    assert client.run("calls", url=url, topic=topic, method="who", count=4, timeout=20) == ["other"] * 4


def test_calls_made_right_after_a_kill_go_to_another_server(
    client: Worker, server_model: str, start: Start, other: Worker, url: str, topic: str
) -> None:
    victim = start(server_model)
    victim.run("serve", url=url, topic=topic, server="victim")
    other.run("serve", url=url, topic=topic, server="other")
    assert sorted(client.run("calls", url=url, topic=topic, method="who", count=2)) == ["other", "victim"]
    victim.kill()
    # Each is at most written into a connection that nobody reads any more: certain not to have run, it goes to the other.
    answers = client.run("calls", url=url, topic=topic, method="who", count=6, timeout=20)
    assert answers == ["other"] * 6


def test_a_killed_client_leaves_its_server_working(
    client: Worker, server: Worker, client_model: str, start: Start, url: str, topic: str
) -> None:
    server.run("serve", url=url, topic=topic)
    victim = start(client_model)
    victim.begin("call", url=url, topic=topic, method="hold", args={"value": 1}, timeout=60)
    victim.begin("call_fill", url=url, topic=topic, method="hold", size=1 << 22, timeout=60)
    wait_until(lambda: len(server.run("began", label="server")) == 2)
    victim.kill()
    assert client.run("call", url=url, topic=topic, method="echo", args={"value": 2}) == 2
    server.run("release", label="server")
    wait_until(lambda: len(server.run("seen", label="server")) == 2)
    assert client.run("calls", url=url, topic=topic, method="who", count=10) == ["server"] * 10


@pytest.mark.rotated
def test_casts_survive_the_death_of_a_server_that_had_not_begun_them(
    client: Worker, server_model: str, start: Start, server: Worker, url: str, topic: str
) -> None:
    """Nobody is there to take them for a while; the successor gets all that come after the death."""
    victim = start(server_model)
    victim.run("serve", url=url, topic=topic, server="victim")
    assert client.run("call", url=url, topic=topic, method="who") == "victim"
    victim.kill()
    client.run("casts", url=url, topic=topic, method="note", values=[0, 1])
    server.run("serve", url=url, topic=topic, pool=1)
    wait_until(lambda: len(server.run("seen", label="server")) == 2)
    assert server.run("seen", label="server") == [0, 1]
