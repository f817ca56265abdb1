# SPDX-License-Identifier: Apache-2.0
"""Processes of a concurrency model that a benchmark tells what to do: they call functions of :mod:`work` by name.

Run as a script it is such a process.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

MODELS = ("threads", "eventlet", "gevent")


class Process:
    """:ivar pid: to attach a profiler to."""

    def __init__(self, model: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Warnings: eventlet's, about itself.
            command = [sys.executable, "-W", "ignore", str(Path(__file__)), model, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self.pid = self._process.pid
        self._channel = ours.makefile("rw")
        ours.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            print(f"process {self.pid} did not end by itself", file=sys.stderr)
            self._process.kill()
            self._process.wait()

    def tell(self, name: str, **arguments: Any) -> None:
        """Have a function begun; :meth:`answer` waits for its result."""
        self._channel.write(json.dumps([name, arguments]) + "\n")
        self._channel.flush()

    def answer(self) -> Any:
        line = self._channel.readline()
        if not line:
            raise RuntimeError(f"process {self.pid} has ended")
        value, error = json.loads(line)
        if error:
            raise RuntimeError(error)
        return value

    def ask(self, name: str, **arguments: Any) -> Any:
        self.tell(name, **arguments)
        return self.answer()


def patch(model: str) -> None:
    if model == "eventlet":
        import eventlet

        eventlet.monkey_patch()
    elif model == "gevent":
        from gevent import monkey

        monkey.patch_all()


def main() -> None:
    patch(sys.argv[1])
    import os
    import traceback

    import work

    # A socket, because waiting for one lets other green threads run, and waiting for a pipe does not.
    with socket.socket(fileno=int(sys.argv[2])) as connection, connection.makefile("rw") as channel:
        for line in channel:
            name, arguments = json.loads(line)
            try:
                answer = getattr(work, name)(**arguments), None
            except Exception:
                answer = None, traceback.format_exc()
            channel.write(json.dumps(answer) + "\n")
            channel.flush()
    work.close()
    # Threads of an executor must not keep a finished process alive.
    os._exit(0)


if __name__ == "__main__":
    main()
