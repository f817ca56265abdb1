# SPDX-License-Identifier: Apache-2.0
"""One client process of ``green-zmq demo``. It tells the demo what it does in lines of JSON on stdout."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from green_zmq.cli.common import OK, as_failure, open_transport, patch, set_up_logging

CASTS: Final = 100
FANOUTS: Final = 20
_CALLERS: Final = 8
# Of a call, seconds; a server that is stuck must not use up the time of the whole demo.
_TIMEOUT: Final = 3.0
# How long fanouts may take to reach all servers, seconds.
_LINGER: Final = 2.0
# Between two lines about progress, seconds.
_TELL: Final = 0.1


class _Teller:
    """Tells the demo of progress, but not at every step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = 0
        self._next = 0.0

    def tell(self, **words: Any) -> None:
        with self._lock:
            print(json.dumps(words), flush=True)

    def step(self, doing: str) -> None:
        now = time.monotonic()
        with self._lock:
            self._done += 1
            if now < self._next:
                return
            self._next = now + _TELL
            print(json.dumps({"done": self._done, "doing": doing}), flush=True)


def run(args: argparse.Namespace) -> int:
    patch(args.executor)
    set_up_logging(logging.ERROR)
    import oslo_messaging as om

    teller = _Teller()
    with open_transport(args.url, linger=_LINGER) as transport:
        client = om.get_rpc_client(transport, om.Target(topic=args.topic), timeout=_TIMEOUT)
        teller.tell(ready=True)
        if not sys.stdin.readline():  # the demo is gone
            return OK
        for server in args.servers:
            _exercise(client.prepare(server=server), server, args, teller)
        everybody = client.prepare(fanout=True)
        _, problem = _repeat(
            FANOUTS,
            lambda i: everybody.cast({}, "count", key=f"{args.executor} fanouts", number=i),
            lambda: teller.step("fanouts"),
        )
        if problem:
            teller.tell(problem=f"fanouts failed: {problem}")
    # After the cleanup, which waits until all servers have taken the fanouts.
    teller.tell(finished=True)
    return OK


def _exercise(client: Any, server: str, args: argparse.Namespace, teller: _Teller) -> None:
    """Calls and casts to one server."""

    def call(i: int) -> None:
        sent = {"number": i, "text": f"{args.executor} → {server}"}
        answer = client.call({}, "echo", **sent)
        if answer != sent:
            raise RuntimeError(f"{sent} was answered with {answer}")

    begin = time.monotonic()
    latencies, problem = _repeat(args.calls, call, lambda: teller.step(f"calls to {server}"))
    seconds = time.monotonic() - begin
    latencies.sort()
    teller.tell(
        server=server,
        calls=len(latencies),
        rate=len(latencies) / seconds if seconds else 0.0,
        p50=latencies[len(latencies) // 2] * 1000 if latencies else None,
        p99=latencies[len(latencies) * 99 // 100] * 1000 if latencies else None,
    )
    if problem:
        teller.tell(problem=f"calls to {server}: {problem}")
        return  # casts would only wait for it
    _, problem = _repeat(
        CASTS,
        lambda i: client.cast({}, "count", key=f"{args.executor} casts", number=i),
        lambda: teller.step(f"casts to {server}"),
    )
    if problem:
        teller.tell(problem=f"casts to {server}: {problem}")


def _repeat(times: int, fn: Callable[[int], None], step: Callable[[], None]) -> tuple[list[float], str]:
    """Do something many times from several threads, which are green ones where the process is patched.

    Returns how long each took that went well, and what went wrong, at which all end.
    """
    latencies: list[float] = []
    problems: list[str] = []

    def work(first: int) -> None:
        for i in range(first, times, _CALLERS):
            if problems:
                return
            begin = time.perf_counter()
            try:
                fn(i)
            except Exception as error:
                try:
                    problems.append(str(as_failure(error)))
                except Exception:
                    problems.append(repr(error))
                return
            latencies.append(time.perf_counter() - begin)
            step()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(_CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, problems[0] if problems else ""
