# SPDX-License-Identifier: Apache-2.0
"""In a worker: servers and clients that it forks, to be killed.

Starting a process of Python takes a second of CPU; a fork of one that has imported everything, and opened nothing, does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import weakref
from collections.abc import Callable
from typing import Any

import oslo_messaging

from tests.contract import models, scenarios
from tests.contract.models import parallel
from tests.contract.scenarios import transport
from tests.faults import forks, ledger

# Processes to be killed.


def fork(url: str, doing: str, **args: Any) -> int:
    """Have a process do that until it is killed, or its parent is; its pid."""
    transport(url)  # as services do it: made by the parent, first used by its children
    return forks.child(functools.partial(_in_child, os.getpid(), functools.partial(globals()[doing], url=url, **args)))


def _in_child(parent: int, fn: Callable[[], None]) -> None:
    # Gevent's green threads survive a fork, so also the one that reads commands: they are for the parent.
    os.dup2(os.pipe()[0], 0)
    fn()
    while os.getppid() == parent:
        models.sleep(0.1)


def serve(server: str, **how: Any) -> None:
    """A server whose ledger has a line when it is found."""
    ledger.serve(server=server, **how)
    ledger.Ledger(server, how["path"]).note({}, "serves")


def use(url: str, topic: str, name: str, path: str, sent: int, returned: int) -> None:
    """A client that has two calls under way all the time: one that takes a while, and one with so much to be carried."""
    client = oslo_messaging.get_rpc_client(transport(url), oslo_messaging.Target(topic=topic), timeout=2)
    told = ledger.Ledger(name, path)

    def go_on(what: str, **args: Any) -> None:
        for i in itertools.count():
            told.note({}, f"{name}-begins-{what}-{i}")
            with contextlib.suppress(oslo_messaging.MessagingTimeout):
                client.call({}, "run", value=f"{name}-{what}-{i}", **args)

    rests = functools.partial(go_on, "rest", seconds=1.0)
    parallel([rests, functools.partial(go_on, "carry", body="x" * sent, size=returned)])


# What a server holds.


def return_memory() -> None:
    """Give large pieces back to the system when they are freed; the C library else keeps some, for each of its arenas."""
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)


def held(url: str) -> dict[str, int]:
    """By the receiving side of a transport."""
    engine = transport(url)._driver._engine
    receiver = engine._receiver
    peers = list(receiver._peers.values())
    return {
        "senders": len(peers),
        "records": sum(len(peer.records) for peer in peers),
        "replies": len(receiver._replies),
        "reply bytes": receiver._reply_bytes,
        "unanswered": len(receiver.unanswered),
        "messages": sum(len(each.batches.waiting) + len(each.unbegun) for each in engine.server._all()),
    }


class _Large:
    """Something that is handed to a loop, and can be referred to weakly."""


def wait_until_the_last_is_dropped(url: str) -> None:
    """What a loop was handed last goes as soon as that is done, and not when it is handed something else."""
    engine = transport(url)._driver._engine
    models.wait_until(lambda: not engine._resolver._asked)
    large = _Large()
    reference = weakref.ref(large)
    engine._loop.post(lambda _: None, large)
    del large
    models.wait_until(lambda: reference() is None)


# Casts that are still to be delivered.


def cast_and_end(urls: list[str], topic: str, casts: int) -> None:
    """What a program does last: casts over each of several transports, none of which it cleans up."""
    for url in urls:
        scenarios.casts_together(url, topic, "note", list(range(casts)))
    print("ends", flush=True)
