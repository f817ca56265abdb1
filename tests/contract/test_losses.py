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


@pytest.mark.rotated
def test_casts_survive_the_death_of_a_server_that_had_not_begun_them(
    client: Worker, server_model: str, start: Start, server: Worker, url: str, topic: str
) -> None:
    """Nobody is there to take them for a while; the successor gets all that come after the death."""
    victim = start(server_model)
    victim.run("serve", url=url, topic=topic, server="victim")
    assert client.run("call", url=url, topic=topic, method="who") == "victim"
    before = client.run("counts", url=url)["connections lost"]
    victim.kill()
    # What is written before that is noticed may have been run.
    wait_until(lambda: client.run("counts", url=url)["connections lost"] > before)
    client.run("casts", url=url, topic=topic, method="note", values=[0, 1])
    server.run("serve", url=url, topic=topic, pool=1)
    wait_until(lambda: len(server.run("seen", label="server")) == 2)
    assert server.run("seen", label="server") == [0, 1]
