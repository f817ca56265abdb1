# SPDX-License-Identifier: Apache-2.0
"""Processes of a concurrency model that a benchmark tells what to do: they call functions of a module by name.

Run as a script it is such a process.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

MODELS: Final = ("threads", "eventlet", "gevent")


class Ended(Exception):
    """A process has ended, or what it was told to do has failed."""


class Process:
    """:ivar pid: to attach a profiler to."""

    def __init__(
        self, model: str, work: str = "green_zmq.bench.work", program: str = __name__, folder: Path | None = None
    ) -> None:
        """
        :param work: the name of the module whose functions it calls.
        :param program: the name of the module that it runs: this one, or one that does more with what it is told.
        :param folder: where it runs, if not here.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            # Warnings: eventlet's, about itself.
            command = [sys.executable, "-W", "ignore", "-m", program, model, work, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=folder)  # noqa: S603 (ourselves)
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
        """:raises Ended: there is none."""
        line = self._channel.readline()
        if not line:
            raise Ended(f"process {self.pid} has ended")
        value, error = json.loads(line)
        if error:
            raise Ended(error)
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


def obey(descriptor: int, work: object) -> None:
    """In such a process: call what is asked for, of a module or an object, until nobody asks any more."""
    import traceback

    # A socket, because waiting for one lets other green threads run, and waiting for a pipe does not.
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rw") as channel:
        for line in channel:
            name, arguments = json.loads(line)
            value, error = None, ""
            try:
                value = getattr(work, name)(**arguments)
            except Exception:
                error = traceback.format_exc()
            channel.write(json.dumps([value, error]) + "\n")
            channel.flush()


def main() -> None:
    patch(sys.argv[1])
    import importlib
    import logging
    import os

    # What is under load warns of it: RabbitMQ's driver, of its pool of connections, thousands of times.
    logging.basicConfig(level=logging.ERROR)
    work = importlib.import_module(sys.argv[2])
    obey(int(sys.argv[3]), work)
    work.close()
    # Threads of an executor must not keep a finished process alive.
    os._exit(0)


if __name__ == "__main__":
    main()
