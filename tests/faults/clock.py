# SPDX-License-Identifier: Apache-2.0
"""In a worker whose clock jumps: how long something takes, by the clock that does not."""

from __future__ import annotations

import threading
import time

import oslo_messaging
from oslo_config import cfg

from tests.contract import models, scenarios
from tests.contract.models import wait_until

if models.name == "threads":
    # Under libfaketime time.sleep() fails now and then, when its end has passed before it begins. The driver has none.
    models.sleep = threading.Event().wait  # type: ignore[assignment]


def wall() -> float:
    return time.time()


def call_in_vain(url: str, topic: str, timeout: float) -> float:
    """The seconds that a call takes to end with MessagingTimeout."""
    began = time.monotonic()
    try:
        scenarios.call(url, topic, "echo", timeout=timeout)
    except oslo_messaging.MessagingTimeout:
        return time.monotonic() - began
    raise AssertionError("it was answered")


def cast_in_vain(url: str, topic: str) -> float:
    """The seconds that a cast for which there is no server is kept."""
    began = time.monotonic()
    scenarios.cast(url, topic, "note", {"value": 1})
    sender = scenarios.transport(url)._driver._engine._sender
    wait_until(lambda: not any(request.key.topic == topic for request in list(sender._outbox)), 60)
    return time.monotonic() - began


def call_anew(url: str, topic: str, registered: bool = True) -> float:
    """A call over a transport that was never used before, as if by a new process; the seconds that it took.

    :param registered: it fails at once if no server is registered, else it waits for one.
    """
    opened = oslo_messaging.get_rpc_transport(cfg.CONF, url)
    options = oslo_messaging.TransportOptions(at_least_once=registered)
    client = oslo_messaging.get_rpc_client(opened, oslo_messaging.Target(topic=topic), timeout=30, transport_options=options)
    began = time.monotonic()
    try:
        assert client.call({}, "echo", value=1) == 1
        return time.monotonic() - began
    finally:
        opened.cleanup()
