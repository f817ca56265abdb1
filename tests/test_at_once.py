# SPDX-License-Identifier: Apache-2.0
"""What comes alone is written by the thread that brings it, through the whole driver in native threads."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import oslo_messaging
import pytest
from oslo_config import cfg

import green_zmq
from tests.contract.models import wait_until

LIMIT = 10.0


class Endpoint:
    def echo(self, ctxt: Any, value: Any) -> Any:
        return value


class Cloud:
    """Servers in this process, and one client."""

    def __init__(self, stack: ExitStack) -> None:
        self.conf = cfg.CONF  # oslo.messaging's client works with no other
        self.conf([], project="at once")
        self._stack = stack
        self._client = self._transport()
        self.writers: list[int] = []

    def _transport(self) -> Any:
        transport = oslo_messaging.get_rpc_transport(self.conf, "zmq+memory://")
        self._stack.callback(transport.cleanup)
        return transport

    def serve(self, topic: str) -> None:
        target = oslo_messaging.Target(topic=topic, server="here")
        server = green_zmq.get_rpc_server(self._transport(), target, [Endpoint()], executor="threading")
        server.start()
        self._stack.callback(server.wait)
        self._stack.callback(server.stop)

    def client(self, topic: str, **how: Any) -> Any:
        return oslo_messaging.get_rpc_client(self._client, oslo_messaging.Target(topic=topic, **how), timeout=LIMIT)

    def writes_itself(self, send: Callable[[], Any]) -> bool:
        """Whether all that ``send`` writes is written by the thread that it runs in, while nothing else happens."""
        engine = self._client._driver._engine
        write = engine._sender._send
        writers: list[int] = []

        def note(socket: Any, frames: list[bytes]) -> bool:
            writers.append(threading.get_ident())
            done: bool = write(socket, frames)
            return done

        wait_until(lambda: engine._loop._sleeping and not engine._sender.requests, LIMIT)
        engine._sender._send = note
        thread = threading.Thread(target=send)
        thread.start()
        thread.join()
        engine._sender._send = write
        assert writers
        return set(writers) == {thread.ident}


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with ExitStack() as stack:
        yield Cloud(stack)


@pytest.fixture
def topic() -> str:
    return f"topic-{uuid.uuid4().hex[:8]}"


def test_calls_casts_and_fanouts(cloud: Cloud, topic: str) -> None:
    cloud.serve(topic)
    client = cloud.client(topic)
    assert client.call({}, "echo", value=1) == 1
    wait_until(lambda: cloud.writes_itself(lambda: client.call({}, "echo", value=1)), LIMIT)
    assert cloud.writes_itself(lambda: client.cast({}, "echo", value=1))
    assert cloud.writes_itself(lambda: client.prepare(fanout=True).cast({}, "echo", value=1))


def test_news_of_other_topics_changes_nothing(cloud: Cloud, topic: str) -> None:
    """Whoever is told that something has changed is not told what, and looks into what it sends to."""
    for name in (topic, f"{topic}-2"):
        cloud.serve(name)
        assert cloud.client(name).call({}, "echo", value=1) == 1
    cloud.serve(f"{topic}-3")
    client = cloud.client(topic)
    wait_until(lambda: cloud.writes_itself(lambda: client.call({}, "echo", value=1)), LIMIT)
    assert cloud.writes_itself(lambda: client.cast({}, "echo", value=1))
    assert cloud.writes_itself(lambda: client.prepare(fanout=True).cast({}, "echo", value=1))


def test_news_of_its_own_topic_comes_first(cloud: Cloud, topic: str) -> None:
    cloud.serve(topic)
    client = cloud.client(topic)
    assert client.call({}, "echo", value=1) == 1
    cloud.serve(topic)
    assert not cloud.writes_itself(lambda: client.prepare(fanout=True).cast({}, "echo", value=1))
    assert cloud.writes_itself(lambda: client.prepare(fanout=True).cast({}, "echo", value=1))


def test_large_messages_are_left_to_the_loop(cloud: Cloud, topic: str) -> None:
    cloud.serve(topic)
    client = cloud.client(topic)
    assert client.call({}, "echo", value=1) == 1
    assert not cloud.writes_itself(lambda: client.call({}, "echo", value="x" * (1 << 17)))
