# SPDX-License-Identifier: Apache-2.0
"""When there is no answer, or no server."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from tests.contract.harness import Directory, Raised, Worker, wait_until


def test_a_call_without_a_server_ends_at_its_deadline_and_says_so(client: Worker, url: str, topic: str) -> None:
    began = time.monotonic()
    with pytest.raises(Raised) as caught:
        client.run("call", url=url, topic=topic, method="echo", timeout=1)
    assert 0.9 < time.monotonic() - began < 5
    assert caught.value.name == "MessagingTimeout"
    assert "no server is registered" in caught.value.text
    assert topic in caught.value.text


@pytest.mark.one_directory
def test_a_call_without_a_reply_ends_at_its_deadline_and_names_who_has_it(
    client: Worker, server: Worker, url: str, topic: str
) -> None:
    server.run("serve", url=url, topic=topic)
    began = time.monotonic()
    with pytest.raises(Raised) as caught:
        client.run("call", url=url, topic=topic, method="hold", timeout=0.5)
    assert 0.4 < time.monotonic() - began < 5
    assert caught.value.name == "MessagingTimeout"
    assert "accepted it and did not reply" in caught.value.text
    assert f"pid {server.process.pid}" in caught.value.text
    server.run("release", label="server")


@pytest.mark.one_directory
def test_a_reply_after_the_deadline_reaches_nobody(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic)
    assert client.run("call", url=url, topic=topic, method="who") == "server"
    with pytest.raises(Raised, match="MessagingTimeout"):
        client.run("call", url=url, topic=topic, method="hold", args={"value": "late"}, timeout=1)
    server.run("release", label="server")
    wait_until(lambda: server.run("seen", label="server") == ["late"])
    values = [f"v{i}" for i in range(10)]
    assert [client.run("call", url=url, topic=topic, method="echo", args={"value": v}) for v in values] == values


def test_a_call_made_before_its_server_listens_is_delivered_when_it_appears(
    client: Worker, server: Worker, url: str, topic: str
) -> None:
    call = client.begin("call", url=url, topic=topic, method="echo", args={"value": 7}, timeout=30)
    directed = client.begin("call", url=url, topic=topic, server="server", method="echo", args={"value": 8}, timeout=30)
    wait_until(lambda: client.run("leftovers", url=url)["waiting"] == 2)
    server.run("serve", url=url, topic=topic)
    assert call.result(1) == 7
    assert directed.result(1) == 8


@pytest.mark.parametrize("retry", [0, 1])
@pytest.mark.parametrize("scenario", ["call", "cast"])
def test_a_number_of_retries_ends_in_an_error(
    client: Worker, directory: Directory, topic: str, scenario: str, retry: int
) -> None:
    url = directory.url(cast_grace=0.2)
    with pytest.raises(Raised) as caught:
        client.run(scenario, limit=10, url=url, topic=topic, method="note", args={"value": 1}, retry=retry, timeout=60)
    assert caught.value.name == "MessageDeliveryFailure"
    assert f"{retry + 1} tries" in caught.value.text
    assert "no server is registered" in caught.value.text


@pytest.mark.rotated
def test_a_cast_without_a_server_returns_and_is_delivered_in_order_later(
    client: Worker, server: Worker, url: str, topic: str
) -> None:
    began = time.monotonic()
    client.run("casts", url=url, topic=topic, method="note", values=[0, 1])
    assert time.monotonic() - began < 10
    assert client.run("leftovers", url=url)["outbox"] == 2
    server.run("serve", url=url, topic=topic, pool=1)
    client.run("casts", url=url, topic=topic, method="note", values=[2, 3])
    wait_until(lambda: len(server.run("seen", label="server")) == 4)
    assert server.run("seen", label="server") == [0, 1, 2, 3]
    wait_until(lambda: client.run("leftovers", url=url)["outbox"] == 0)


@pytest.mark.parametrize("scenario", ["call", "cast"])
def test_at_least_once_fails_at_once_when_nobody_listens(client: Worker, url: str, topic: str, scenario: str) -> None:
    began = time.monotonic()
    with pytest.raises(Raised) as caught:
        client.run(scenario, url=url, topic=topic, method="note", args={"value": 1}, at_least_once=True, timeout=60)
    assert caught.value.name == "MessageUndeliverable"
    assert time.monotonic() - began < 5


@pytest.mark.rotated
def test_mandatory_call(client: Worker, server: Worker, url: str, topic: str) -> None:
    how = {"url": url, "topic": topic, "server": "nobody", "method": "delay"}
    with pytest.raises(Raised, match="MessagingTimeout"):
        client.run("call", **how, timeout=1, at_least_once=False)
    began = time.monotonic()
    with pytest.raises(Raised, match="MessageUndeliverable"):
        client.run("call", **how, timeout=60, at_least_once=True)
    assert time.monotonic() - began < 10
    server.run("serve", url=url, topic=topic, server="somebody")
    for target in ("somebody", None):
        how = {"url": url, "topic": topic, "server": target, "at_least_once": True}
        assert client.run("call", **how, method="echo", args={"value": 1}) == 1


@pytest.mark.one_directory
@pytest.mark.rotated
def test_monitor_long_call(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic)
    how = {"url": url, "topic": topic, "method": "rest", "args": {"seconds": 4}}
    monitored = client.begin("call", **how, timeout=3600, monitor=2)
    with pytest.raises(Raised, match="MessagingTimeout"):
        client.run("call", **how, timeout=1)
    assert monitored.result(30) == 4


@pytest.mark.one_directory
@pytest.mark.rotated
def test_nothing_is_left_of_a_monitored_call_that_finds_no_method(client: Worker, server: Worker, url: str, topic: str) -> None:
    """Oslo.messaging's own watchdog of it would otherwise run for ever."""
    server.run("serve", url=url, topic=topic)
    for _ in range(3):
        with pytest.raises(Raised, match="NoSuchMethod"):
            client.run("call", url=url, topic=topic, method="no_such_method", timeout=20, monitor=2)
    wait_until(lambda: not [name for name in server.run("threads") if "watchdog" in name])


@pytest.mark.one_directory
@pytest.mark.rotated
def test_the_absence_of_heartbeats_ends_a_monitored_call(
    client: Worker, server_model: str, start: Callable[[str], Worker], directory: Directory, topic: str
) -> None:
    server = start(server_model)
    server.run("serve", url=directory.url(), topic=topic)
    call = client.begin("call", url=directory.url(), topic=topic, method="hold", timeout=3600, monitor=2)
    wait_until(lambda: server.run("began", label="server"))
    server.signal(signal.SIGSTOP)
    with pytest.raises(Raised) as caught:
        call.result(20)
    assert "MessagingTimeout" in caught.value.names
    assert "heartbeat" in caught.value.text
