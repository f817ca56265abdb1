# SPDX-License-Identifier: Apache-2.0
"""Ways to run a model other than the usual: unpatched, and with another executor of oslo.messaging."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contract.harness import GREEN, Directory, Fleet, Raised, Worker


@pytest.mark.parametrize("model", GREEN)
def test_an_unpatched_green_service_calls_without_blocking_its_hub(
    fleet: Fleet, model: str, directory: Directory, server_model: str, server: Worker, topic: str
) -> None:
    url = directory.url(executor=model)
    client = fleet.get("unpatched", model)
    server.run("serve", url=directory.url(), topic=topic)
    how = {"url": url, "topic": topic, "method": "rest", "args": {"seconds": 1, "value": 1}}
    worst, value = client.run("tick_while", doing="call", **how)
    assert value == 1
    assert worst < 0.8  # a blocked hub would have been for 1 s
    assert client.run("calls_together", url=url, topic=topic, method="echo", values=[*range(20)]) == [*range(20)]
    client.run("cast", url=url, topic=topic, method="note", args={"value": 2})


@pytest.mark.parametrize("model", GREEN)
def test_an_unpatched_green_service_serves(
    fleet: Fleet, model: str, directory: Directory, client_model: str, client: Worker, topic: str
) -> None:
    url = directory.url(executor=model)
    server = fleet.get("unpatched", model)
    server.run("serve", url=url, topic=topic, executor=model)
    how = {"url": directory.url(), "topic": topic, "method": "rest", "args": {"seconds": 0.1}}
    assert client.run("calls_together", **how, values=list(range(40))) == list(range(40))
    # Its own client, in the same hub.
    assert server.run("call", url=url, topic=topic, method="echo", args={"value": 3}) == 3
    server.run("end", label="server", limit=10)


@pytest.mark.parametrize("model", GREEN)
def test_a_patched_service_serves_with_the_threading_executor(
    fleet: Fleet, model: str, client_model: str, client: Worker, url: str, topic: str
) -> None:
    server = fleet.get("server", model)
    server.run("serve", url=url, topic=topic, executor="threading")
    how = {"url": url, "topic": topic, "method": "rest", "args": {"seconds": 0.1}}
    assert client.run("calls_together", **how, values=list(range(40))) == list(range(40))
    server.run("end", label="server", limit=10)


def test_the_executor_that_oslo_messaging_chooses_works(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic, executor="default")
    how = {"url": url, "topic": topic, "method": "rest", "args": {"seconds": 0.05}}
    assert client.run("calls_together", **how, values=list(range(40))) == list(range(40))


@pytest.mark.parametrize(("model", "asked"), [("eventlet", "gevent"), ("gevent", "eventlet"), ("eventlet", "threads")])
def test_a_model_that_cannot_work_is_an_error_that_says_what_to_do(
    fleet: Fleet, directory: Directory, model: str, asked: str
) -> None:
    with pytest.raises(Raised) as caught:
        fleet.get("client", model).run("open_transport", url=directory.url(executor=asked))
    assert "ModelError" in caught.value.names
    assert f"name {model}" in caught.value.text


@pytest.mark.parametrize("model", GREEN)
def test_native_threads_leave_the_lock_of_all_loggers_alone(
    start: Callable[[str], Worker], model: str, directory: Directory, topic: str
) -> None:
    """It is green. One that waits for it in eventlet is never woken, and then nobody can log any more."""
    assert start(model).run("logging_in_native_threads", url=directory.url(), topic=topic) == []
