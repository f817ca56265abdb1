# SPDX-License-Identifier: Apache-2.0
"""``green-zmq serve``: a service to try things on."""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from typing import Any, Final

from green_zmq.cli.common import OK, as_failure, catch_signals, open_transport, patch, printable, set_up_logging

# Keys that count() remembers.
_KEYS: Final = 1000


class _Endpoint:
    """The methods that can be called."""

    def __init__(self, server: str, model: str, stopping: threading.Event) -> None:
        self._server = server
        self._model = model
        self._stopping = stopping
        self._since = time.monotonic()
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._counted: dict[str, list[int]] = {}

    def echo(self, _ctxt: Any, /, **kwargs: Any) -> dict[str, Any]:
        self._note("echo")
        return kwargs

    def inspect(self, _ctxt: Any, /) -> dict[str, Any]:
        self._note("inspect")
        with self._lock:
            return {
                "server": self._server,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "model": self._model,
                "uptime": round(time.monotonic() - self._since, 3),
                "counts": dict(self._calls),
                "counted": dict(self._counted),
            }

    def sleep(self, _ctxt: Any, /, seconds: float) -> float:
        """How long it slept: less than it was asked to if the server stops."""
        self._note("sleep")
        before = time.monotonic()
        self._stopping.wait(seconds)
        return round(time.monotonic() - before, 3)

    def fail(self, _ctxt: Any, /, message: str = "as asked") -> None:
        self._note("fail")
        raise ValueError(message)

    def count(self, _ctxt: Any, /, key: str, number: int) -> None:
        """For each key, ``inspect`` tells how many numbers came and their sum: what casts arrived, and how often."""
        self._note("count")
        with self._lock:
            times, total = self._counted.pop(key, [0, 0])
            self._counted[key] = [times + 1, total + number]
            if len(self._counted) > _KEYS:
                del self._counted[next(iter(self._counted))]

    def _note(self, method: str) -> None:
        with self._lock:
            self._calls[method] += 1


def run(args: argparse.Namespace) -> int:
    patch(args.executor)
    set_up_logging(logging.WARNING)
    wake = catch_signals()
    import oslo_messaging as om

    from green_zmq import get_rpc_server

    name = args.server or socket.gethostname()
    stopping = threading.Event()
    endpoint = _Endpoint(name, args.executor, stopping)
    # Oslo.messaging logs the traceback of what was not expected to be raised.
    endpoint.fail = om.expected_exceptions(ValueError)(endpoint.fail)  # type: ignore[method-assign]
    target = om.Target(exchange=args.exchange, topic=args.topic, server=name)
    with open_transport(args.url) as transport:
        executor = "threading" if args.executor == "threads" else args.executor
        server = get_rpc_server(transport, target, [endpoint], executor=executor)
        try:
            server.start()
        except om.MessagingException as error:
            raise as_failure(error) from None
        print(
            f"listening on {printable(args.topic)} as {printable(name)} ({args.executor}, pid {os.getpid()})",
            flush=True,
        )
        # Green, where the process is patched: others run meanwhile.
        select.select([wake, sys.stdin] if args.with_parent else [wake], [], [])
        for number in (signal.SIGINT, signal.SIGTERM):  # whoever asks twice does not want to wait
            signal.signal(number, signal.SIG_DFL)
        stopping.set()
        server.stop()
        server.wait()
    return OK
