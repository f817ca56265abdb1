# SPDX-License-Identifier: Apache-2.0
"""Nothing that a transport does keeps the other green threads of its process waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.contract.harness import GREEN, Directory, Worker, following

# The most that a 10 ms ticker may be late, seconds, beyond what the machine itself makes others late by. How late it is on a
# quiet machine is for benchmarks/ticker.py; here it must just not be late by what a whole message takes.
MOST = 0.2
# A string that is received is one piece of memory in the end, so the allocator may have to move it once as it grows: a copy
# of up to 64 MiB in one step, into memory that the machine has to find first.
COPY = 0.2

pytestmark = [pytest.mark.parametrize("model", GREEN), pytest.mark.one_directory]
Start = Callable[[str], Worker]


@contextmanager
def _control() -> Iterator[list[float]]:
    """How late the ticks of this process are meanwhile, which has nothing else to do: so late the machine makes them."""
    late = [0.0]
    end = threading.Event()

    def tick() -> None:
        began = time.monotonic()
        while not end.wait(0.01):
            now = time.monotonic()
            late.append(now - began - 0.01)
            began = now

    ticker = threading.Thread(target=tick)
    ticker.start()
    yield late
    end.set()
    ticker.join()


@pytest.fixture
def client(model: str, start: Start, url: str, topic: str) -> Worker:
    """Warm: importing the driver at its first use is a matter of the process that does it."""
    client = start(model)
    client.run("call_in_vain", url=url, topic=f"{topic}-nobody", method="echo", timeout=0.05)
    return client


def test_connecting_to_a_dead_host(model: str, client: Worker, start: Start, directory: Directory, topic: str) -> None:
    server = start(following(model))
    # An address of the range for documentation: nobody answers.
    url = directory.url(rpc_zmq_host="192.0.2.1", rpc_zmq_bind_address="127.0.0.1")
    server.run("serve", url=url, topic=topic)
    how = {"url": directory.url(), "topic": topic, "method": "echo", "timeout": 1.5}
    with _control() as late:
        worst, error = client.run("tick_while", doing="call_in_vain", **how)
    assert "MessagingTimeout" in error
    assert "no connection to" in error
    assert worst < MOST + max(late)


def test_sending_64_mib(client: Worker, start: Start, url: str, topic: str) -> None:
    start("threads").run("serve", url=url, topic=topic)
    size = 64 << 20
    with _control() as late:
        worst, length = client.run("tick_while_sending", url=url, topic=topic, size=size, timeout=60)
    assert length == size
    assert worst < MOST + max(late)


def test_receiving_64_mib(client: Worker, start: Start, url: str, topic: str) -> None:
    start("threads").run("serve", url=url, topic=topic)
    size = 64 << 20
    with _control() as late:
        worst, length = client.run("tick_while_echoing", url=url, topic=topic, size=size, timeout=60)
    assert length == size
    assert worst < MOST + COPY + max(late)


def test_serving_64_mib(client: Worker, start: Start, url: str, topic: str) -> None:
    server, client = client, start("threads")
    server.run("serve", url=url, topic=topic)
    ticking = server.begin("tick_until_released", label="server")
    size = 64 << 20
    with _control() as late:
        assert client.run("tick_while_echoing", url=url, topic=topic, size=size, timeout=60)[1] == size
        server.run("release", label="server")
        worst = ticking.result(20)
    assert worst < MOST + COPY + max(late)
