# SPDX-License-Identifier: Apache-2.0
"""In a worker: a transport in a process that forks."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import oslo_messaging

from tests.contract import models, scenarios
from tests.contract.models import parallel, wait_until
from tests.contract.scenarios import transport
from tests.faults import ledger

TAG = "forked"
# Green or native threads that call at the same time in a process, and what each sends.
_CALLERS, _MESSAGES = 8, 25


def child(fn: Callable[[], None]) -> int:
    """Fork, and run it in the child; its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        fn()
        status = 0
    except BaseException:
        logging.exception("in a forked child")
    finally:
        os._exit(status)


def wait_for(pids: list[int], limit: float = 60) -> list[int]:
    """The exit codes."""
    codes: dict[int, int] = {}
    end = time.monotonic() + limit
    while len(codes) < len(pids) and time.monotonic() < end:
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        models.sleep(0.01)
    for pid in set(pids) - set(codes):
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        codes[pid] = -9
    return list(codes.values())


def _client(url: str, topic: str) -> Any:
    return oslo_messaging.get_rpc_client(transport(url, TAG), oslo_messaging.Target(topic=topic), timeout=60)


def _values(name: str) -> list[str]:
    return [f"{name}-{caller}-{i}" for caller in range(_CALLERS) for i in range(_MESSAGES)]


def _send(url: str, topic: str, name: str) -> None:
    """Calls and casts, from several threads at once."""
    client = _client(url, topic)

    def send(values: list[str]) -> None:
        for i, value in enumerate(values):
            if i % 2:
                client.cast({}, "note", value=value)
            else:
                assert client.call({}, "note", value=value) == value

    values = _values(name)
    parts = [values[i : i + _MESSAGES] for i in range(0, len(values), _MESSAGES)]
    for outcome in parallel([functools.partial(send, part) for part in parts]):
        outcome.result()


def _send_in_child(url: str, topic: str, name: str) -> int:
    """The first child has a child of its own as soon as it has sent something; the pid."""

    def work() -> None:
        _send(url, topic, name)
        if name == "child-0":
            assert wait_for([child(functools.partial(_send, url, topic, "grandchild"))]) == [0]

    return child(work)


def fork_before_use(url: str, topic: str, children: int) -> dict[str, Any]:
    """A master makes the transport, its children and itself use it at the same time."""
    transport(url, TAG)
    names = [f"child-{i}" for i in range(children)]
    pids = [_send_in_child(url, topic, name) for name in names]
    _send(url, topic, "parent")
    sent = [value for name in [*names, "grandchild", "parent"] for value in _values(name)]
    return {"codes": wait_for(pids), "sent": sent}


def fork_after_use(url: str, topic: str, children: int, begun: str) -> dict[str, Any]:
    """The same, but the parent has calls under way before, while and after it forks: sent, being run, and waiting.

    :param begun: the file in which the calls that are being run are written down.
    """
    parent = os.getpid()
    sent = _values("before")
    state = {"stop": False}
    client = _client(url, topic)

    def keep_sending(name: str) -> int:
        number = 0
        # Where green threads survive in a child, those of the parent are not to go on there.
        while not state["stop"] and os.getpid() == parent:
            value = f"{name}-{number}"
            sent.append(value)
            if number % 4 == 3:
                client.cast({}, "note", value=value)
            else:
                assert client.call({}, "note", value=value) == value
            number += 1
        return number

    def more() -> None:
        before = len(sent)
        wait_until(lambda: len(sent) > before + 50, 60)

    _send(url, topic, "before")
    holder = client.prepare(server="server-0")
    held = [f"held-{i}" for i in range(4)]
    holding = parallel([functools.partial(holder.call, {}, "hold", value=value) for value in held])
    wait_until(lambda: set(held) <= ledger.written(begun))
    outcomes = parallel([functools.partial(keep_sending, f"meanwhile-{i}") for i in range(4)])
    more()
    names = [f"child-{i}" for i in range(children)]
    pids = []
    for name in names:
        pids.append(_send_in_child(url, topic, name))
        more()
    codes = wait_for(pids)
    more()
    holder.call({}, "free")
    assert [outcome.result() for outcome in holding] == held
    state["stop"] = True
    for outcome in outcomes:
        outcome.result()
    return {"codes": codes, "sent": [*sent, *held, *(v for name in [*names, "grandchild"] for v in _values(name))]}


def serve_in_children(url: str, topic: str, children: int, calls: int, path: str) -> dict[str, Any]:
    """A master that has used its transport, as a server too, forks workers that listen; the master then calls them."""
    ledger.serve(url, f"{topic}-warm", "warm", path, tag=TAG)
    assert scenarios.call(url, f"{topic}-warm", "who", tag=TAG) == "warm"
    sent = [f"served-{i}" for i in range(calls)]

    def work(number: int) -> None:
        scenarios._servers.clear()  # the parent's
        ledger.serve(url, topic, f"child-{number}", path, tag=TAG)
        wait_until(lambda: set(sent) <= ledger.written(path), 60)
        scenarios.end(f"child-{number}")
        transport(url, TAG).cleanup()  # which waits for the last replies to be sent

    pids = [child(functools.partial(work, number)) for number in range(children)]
    client = _client(url, topic)
    outcomes = parallel([functools.partial(client.call, {}, "note", value=value) for value in sent])
    assert [outcome.result() for outcome in outcomes] == sent
    codes = wait_for(pids)
    assert scenarios.call(url, f"{topic}-warm", "who", tag=TAG) == "warm"
    scenarios.end("warm")
    return {"codes": codes, "sent": sent}
