# SPDX-License-Identifier: Apache-2.0
"""Calls, casts and fanouts between two processes, in all pairings of models."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from tests.contract.harness import Raised, Worker, wait_until

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    2**53 + 1,
    10**30,
    1.5,
    -1e-300,
    "",
    "text",
    "Grüße, 世界 🦓 \u0000 \u2028",
    [],
    {},
    [[], [None, {}], ["a", 1]],
    {"": 0, "ключ": {"nested": [1, 2, {"deep": None}]}},
]


def test_every_json_value_comes_back_as_it_was(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic)
    for value in VALUES:
        assert client.run("call", url=url, topic=topic, method="echo", args={"value": value}) == value
    assert client.run("call", url=url, topic=topic, method="echo") is None


@pytest.mark.parametrize("size", [1 << 17, (1 << 20) + 1])
def test_a_large_value_is_whole_in_both_directions(client: Worker, server: Worker, url: str, topic: str, size: int) -> None:
    server.run("serve", url=url, topic=topic)
    expected = "ä" + "x" * (size - 1)
    answer = client.run("call_fill", url=url, topic=topic, method="digest", size=size)
    assert answer == [size, hashlib.sha256(expected.encode()).hexdigest()]
    assert client.run("call_for_length", url=url, topic=topic, size=size) == size


def test_a_message_encoded_as_msgpack_is_understood(
    client: Worker, server: Worker, directory: Any, url: str, topic: str
) -> None:
    server.run("serve", url=url, topic=topic)
    packed = directory.url(rpc_zmq_serialization="msgpack")
    for value in VALUES:
        if value != 10**30:  # msgpack has no such integers
            assert client.run("call", url=packed, topic=topic, method="echo", args={"value": value}) == value


def test_casts_of_one_caller_arrive_once_and_in_order(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic, pool=1)
    client.run("casts", url=url, topic=topic, method="note", values=list(range(100)))
    wait_until(lambda: len(server.run("seen", label="server")) >= 100)
    assert server.run("seen", label="server") == list(range(100))


def test_a_fanout_reaches_every_server_once(client: Worker, server: Worker, other: Worker, url: str, topic: str) -> None:
    servers = [(server, "one"), (server, "two"), (other, "three")]
    for worker, name in servers:
        worker.run("serve", url=url, topic=topic, server=name)
    for i in range(5):
        client.run("fanout", url=url, topic=topic, method="note", args={"value": i})
    for worker, name in servers:
        wait_until(lambda worker=worker, name=name: len(worker.run("seen", label=name)) >= 5)
        assert sorted(worker.run("seen", label=name)) == [0, 1, 2, 3, 4]


@pytest.mark.rotated
@pytest.mark.no_sentinel
def test_fanouts_that_wait_for_a_server_to_begin_others_go_on_when_it_does(
    client: Worker, server: Worker, url: str, topic: str
) -> None:
    """Which the server's loop has to notice while nothing arrives."""
    server.run("serve", url=url, topic=topic, pool=1)
    notes = list(range(70))
    for _ in range(6):
        client.run("fanout", url=url, topic=topic, method="rest", args={"seconds": 0.3, "value": "rested"})
        client.run("casts", url=url, topic=topic, method="note", values=notes, fanout=True)
    wait_until(lambda: len(server.run("seen", label="server")) == 6 * 71)
    assert server.run("seen", label="server") == ["rested", *notes] * 6
    assert "answers busy" not in client.run("counts", url=url)


def test_a_fanout_reaches_listeners_that_share_a_name_once_each(
    client: Worker, server: Worker, other: Worker, url: str, topic: str
) -> None:
    servers = [(server, "a"), (server, "b"), (other, "c"), (other, "d")]
    for worker, label in servers:
        worker.run("serve", url=url, topic=topic, server="shared", label=label)
    for i in range(3):
        client.run("fanout", url=url, topic=topic, method="note", args={"value": i})
    for worker, label in servers:
        wait_until(lambda worker=worker, label=label: len(worker.run("seen", label=label)) >= 3)
        assert sorted(worker.run("seen", label=label)) == [0, 1, 2]


def test_a_fanout_to_nobody_returns(client: Worker, server: Worker, url: str, topic: str) -> None:
    client.run("fanout", limit=10, url=url, topic=topic, method="note", args={"value": 1})


def _raised(client: Worker, **how: Any) -> Raised:
    with pytest.raises(Raised) as caught:
        client.run("call", **how)
    return caught.value


def test_a_builtin_exception_arrives_as_itself(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic)
    args = {"name": "ValueError", "text": "no gültig value"}
    error = _raised(client, url=url, topic=topic, method="fail", args=args)
    assert error.name == "ValueError"
    assert "no gültig value" in error.text


def test_an_allowed_exception_arrives_as_its_class(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic)
    how = {"url": url, "topic": topic, "exmods": ["tests.contract.endpoints"]}
    error = _raised(client, **how, method="fail", args={"name": "Complaint", "text": "about all"})
    assert error.names[:2] == ["Complaint_Remote", "Complaint"]
    assert error.module == "tests.contract.endpoints_Remote"
    assert "about all" in error.text
    assert _raised(client, **how, method="fail_with_detail").names[:3] == ["Detailed_Remote", "Detailed", "Complaint"]


def test_an_exception_that_is_not_allowed_arrives_as_remote_error(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic)
    error = _raised(client, url=url, topic=topic, method="fail", args={"name": "Complaint", "text": "about all"})
    assert error.name == "RemoteError"
    assert error.exc_type == "Complaint"
    assert "about all" in error.text
    assert "Traceback" in error.text


def test_an_expected_exception_arrives(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic)
    error = _raised(client, url=url, topic=topic, method="fail_as_expected", args={"text": "as foreseen"})
    assert "ValueError" in error.names
    assert "as foreseen" in error.text


def test_namespaces_and_versions_choose_the_endpoint(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic, versions=[["one", "1.5"], ["one", "2.0"], ["two", "1.0"]])
    how = {"url": url, "topic": topic, "method": "where"}
    assert client.run("call", **how, namespace="one", version="1.3") == "one 1.5"
    assert client.run("call", **how, namespace="one", version="2.0") == "one 2.0"
    assert client.run("call", **how, namespace="two", version="1.0") == "two 1.0"
    error = _raised(client, **how, namespace="one", version="1.6")
    assert error.name == "RemoteError"
    assert error.exc_type == "UnsupportedVersion"
    assert _raised(client, **how, namespace="three").exc_type == "UnsupportedVersion"
    assert _raised(client, **{**how, "method": "nothing"}, namespace="two").exc_type == "NoSuchMethod"


@pytest.mark.parametrize("as_object", [False, True], ids=["dict", "object"])
def test_the_context_arrives(client: Worker, server: Worker, url: str, topic: str, as_object: bool) -> None:
    server.run("serve", url=url, topic=topic)
    for context in ({}, {"user": "jörg", "roles": ["a", "b"], "nested": {"x": None}}):
        how = {"url": url, "topic": topic, "method": "context", "ctxt": context, "context_object": as_object}
        assert client.run("call", **how) == context


def test_a_serializer_is_applied_on_both_sides(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic, serializer=True)
    how = {"url": url, "topic": topic, "serializer": True}
    assert client.run("call", **how, method="echo", args={"value": [1]}) == [1]
    assert client.run("call", **how, method="context", ctxt={"a": 1}) == {"a": 1, "passed": True}


@pytest.mark.parametrize(
    ("policy", "allowed"), [("legacy", ["_secret", "echo", "who"]), ("default", ["echo", "who"]), ("explicit", ["who"])]
)
def test_the_access_policy_is_kept(
    client: Worker, server: Worker, url: str, topic: str, policy: str, allowed: list[str]
) -> None:
    server.run("serve", url=url, topic=topic, policy=policy)
    for method in ("_secret", "echo", "who"):
        if method in allowed:
            client.run("call", url=url, topic=topic, method=method)
        else:
            assert _raised(client, url=url, topic=topic, method=method).exc_type == "NoSuchMethod"


def test_many_calls_at_a_time_each_get_their_own_reply(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic)
    values = [f"value {i}" for i in range(100)]
    assert client.run("calls_together", url=url, topic=topic, method="echo", values=values) == values
