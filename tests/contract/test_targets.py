# SPDX-License-Identifier: Apache-2.0
"""Who gets a message."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.contract.harness import Directory, Worker

NAMES = [
    "host@backend",
    "host@backend#pool",
    "with spaces",
    "a/b",
    "a:1",
    "10.0.0.1",
    "x.y.z",
    "Größe-世界",
    "0.0.0.0",
    "%41?&=+",
]


def test_idle_servers_take_turns_strictly(client: Worker, server: Worker, other: Worker, url: str, topic: str) -> None:
    # A client that listens as well is one of them.
    for worker, name in ((server, "a"), (other, "b"), (client, "c")):
        worker.run("serve", url=url, topic=topic, server=name)
    answers = client.run("calls", url=url, topic=topic, method="who", count=12)
    assert sorted(answers[:3]) == ["a", "b", "c"]
    assert answers == answers[:3] * 4


def test_a_message_for_a_server_goes_to_that_one(client: Worker, server: Worker, other: Worker, url: str, topic: str) -> None:
    for worker, name in ((server, "a"), (other, "b")):
        worker.run("serve", url=url, topic=topic, server=name)
    for name in ("a", "b"):
        assert client.run("calls", url=url, topic=topic, method="who", count=4, server=name) == [name] * 4


@pytest.mark.rotated
def test_any_text_is_a_server_name(client: Worker, server: Worker, other: Worker, url: str, topic: str) -> None:
    for i, name in enumerate(NAMES):
        (server, other)[i % 2].run("serve", url=url, topic=topic, server=name)
    for name in NAMES:
        assert client.run("call", url=url, topic=topic, method="who", server=name) == name
    assert sorted(client.run("calls", url=url, topic=topic, method="who", count=40)).count("a/b") >= 1


@pytest.mark.rotated
def test_any_text_is_a_topic_and_an_exchange(client: Worker, server: Worker, url: str, topic: str) -> None:
    for i, name in enumerate(NAMES):
        server.run("serve", url=url, topic=f"{topic} {name}", server="s", label=str(i), exchange=name)
    for i, name in enumerate(NAMES):
        how = {"url": url, "topic": f"{topic} {name}", "exchange": name}
        assert client.run("call", **how, method="who") == str(i)


def test_equal_topics_of_two_exchanges_do_not_meet(client: Worker, server: Worker, other: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic, server="s", label="nova", exchange="nova")
    server.run("serve", url=url, topic=topic, server="s", label="neutron", exchange="neutron")
    other.run("serve", url=url, topic=topic, server="s", label="default")
    for exchange, label in (("nova", "nova"), ("neutron", "neutron"), (None, "default")):
        assert client.run("calls", url=url, topic=topic, exchange=exchange, method="who", count=3) == [label] * 3
        client.run("fanout", url=url, topic=topic, exchange=exchange, method="note", args={"value": label})
    for worker, label in ((server, "nova"), (server, "neutron"), (other, "default")):
        # One more message behind the fanout: what had come before is there.
        exchange = None if label == "default" else label
        client.run("call", url=url, topic=topic, exchange=exchange, method="who")
        assert set(worker.run("seen", label=label)) <= {label}


def test_processes_with_the_same_topic_and_server_name_take_turns(
    client: Worker, server: Worker, other: Worker, url: str, topic: str
) -> None:
    for worker, label in ((server, "a"), (other, "b")):
        worker.run("serve", url=url, topic=topic, server="shared", label=label)
    answers = client.run("calls", url=url, topic=topic, method="who", count=10, server="shared")
    assert sorted(answers[:2]) == ["a", "b"]
    assert answers == answers[:2] * 5


def test_listeners_of_one_process_with_one_name_take_turns(client: Worker, server: Worker, url: str, topic: str) -> None:
    for label in ("a", "b"):
        server.run("serve", url=url, topic=topic, server="shared", label=label)
    for address in ("shared", None):
        answers = client.run("calls", url=url, topic=topic, method="who", count=10, server=address)
        assert Counter(answers) == {"a": 5, "b": 5}


def test_listeners_of_one_process_get_what_is_theirs(client: Worker, server: Worker, url: str, topic: str) -> None:
    targets = [(f"{topic}-{t}", s) for t in ("x", "y") for s in ("one", "two")]
    for t, s in targets:
        server.run("serve", url=url, topic=t, server=s, label=f"{t} {s}")
    for t, s in targets:
        assert client.run("calls", url=url, topic=t, server=s, method="who", count=3) == [f"{t} {s}"] * 3
    answers = client.run("calls", url=url, topic=f"{topic}-x", method="who", count=6)
    assert Counter(answers) == {f"{topic}-x one": 3, f"{topic}-x two": 3}


@pytest.mark.rotated
def test_transports_of_one_process_are_independent(
    client: Worker, server: Worker, directory: Directory, url: str, topic: str
) -> None:
    """Each has a loop and connections of its own, also where their options differ."""
    urls = [directory.url(heartbeat_interval=1), directory.url(rpc_zmq_serialization="msgpack", executor=server.model), url]
    for i, each in enumerate(urls):
        server.run("serve", url=each, topic=topic, server=f"s{i}")
    ports = {server.run("address", url=each)[1] for each in urls}
    assert len(ports) == 3
    for i in range(3):
        assert client.run("call", url=url, topic=topic, server=f"s{i}", method="who") == f"s{i}"
    # From each to each, in one process.
    for each in urls:
        assert sorted(server.run("calls", url=each, topic=topic, method="who", count=3)) == ["s0", "s1", "s2"]
    server.run("end", label="s0")
    server.run("cleanup", url=urls[0])
    for i in (1, 2):
        assert client.run("call", url=url, topic=topic, server=f"s{i}", method="who") == f"s{i}"


def test_the_memory_directory_serves_one_process(client_model: str, client: Worker, topic: str) -> None:
    url = "zmq+memory://"
    client.run("serve", url=url, topic=topic, server="a", tag="one")
    client.run("serve", url=url, topic=topic, server="b", tag="two")
    assert sorted(client.run("calls", url=url, topic=topic, method="who", count=2, tag="three")) == ["a", "b"]
    client.run("fanout", url=url, topic=topic, method="note", args={"value": 1}, tag="three")
    client.run("end", label="a")
    assert client.run("calls", url=url, topic=topic, method="who", count=3, tag="three") == ["b"] * 3
