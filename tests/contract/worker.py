# SPDX-License-Identifier: Apache-2.0
"""A process of one concurrency model that runs what the tests tell it: ``python -m tests.contract.worker MODEL``.

Commands are lines of JSON on stdin, ``{"id": ..., "run": name of a scenario, "args": {...}}``; each runs in a thread of the
model, so several at a time. Answers are lines on stdout, ``{"id": ..., "ok": value}`` or ``{"id": ..., "error": {...}}``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any


def patch(model: str) -> None:
    """Before anything else is imported, as services do it."""
    if model == "eventlet":
        import eventlet

        eventlet.monkey_patch()
    elif model == "gevent":
        import gevent.monkey

        gevent.monkey.patch_all()


def read_stdin(model: str) -> Callable[[], bytes]:
    """A read that lets other green threads run, also where nothing is patched."""
    if model == "threads":
        return lambda: os.read(0, 1 << 16)
    os.set_blocking(0, False)
    if model == "eventlet":
        from eventlet.green import os as green_os

        return lambda: green_os.read(0, 1 << 16)
    from gevent.os import nb_read

    return lambda: nb_read(0, 1 << 16)


def lines(read: Callable[[], bytes]) -> Iterator[bytes]:
    rest = b""
    while data := read():
        *whole, rest = (rest + data).split(b"\n")
        yield from whole


def describe(error: BaseException) -> dict[str, Any]:
    """An exception for the other process."""
    return {
        "names": [cls.__name__ for cls in type(error).__mro__],
        "module": type(error).__module__,
        "text": str(error),
        "exc_type": getattr(error, "exc_type", None),
        "server": getattr(error, "server", None),
        "traceback": "".join(traceback.format_exception(error)),
    }


def main(model: str, *, patched: bool) -> None:
    # The original: eventlet's lets no two green threads wait for one pipe.
    answers, write = os.dup(1), os.write
    os.dup2(2, 1)
    if patched:
        patch(model)
    models = importlib.import_module("tests.contract.models")
    models.load(model)
    importlib.import_module("tests.contract.scenarios")
    turn = importlib.import_module("threading").Lock()

    def run(command: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"id": command["id"]}
        try:
            # A scenario's name, behind that of its module if that is not the first one, and of its folder if it is another.
            module, _, name = command["run"].rpartition(".")
            folder = "tests" if "." in module else "tests.contract"
            scenarios = importlib.import_module(f"{folder}.{module or 'scenarios'}")
            answer["ok"] = getattr(scenarios, name)(**command["args"])
        except BaseException as error:
            answer["error"] = describe(error)
        data = memoryview(json.dumps(answer).encode() + b"\n")
        with turn:  # a pipe takes what is large in pieces
            while data:
                data = data[write(answers, data) :]

    for line in lines(read_stdin(model)):
        models.spawn(run, json.loads(line))
    # Servers that a test left running would keep a clean exit waiting.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], patched="--unpatched" not in sys.argv)
