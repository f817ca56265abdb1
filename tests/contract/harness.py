# SPDX-License-Identifier: Apache-2.0
"""In the tests' own process: the worker processes, and waiting for what they do."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

MODELS = ("threads", "eventlet", "gevent")
GREEN = ("eventlet", "gevent")
# Of the log of a worker, with a test that fails.
_LINES = 400
ROOT = Path(__file__).parent.parent.parent


def following(model: str) -> str:
    """Another model, so that each is paired with each over the tests."""
    return MODELS[(MODELS.index(model) + 1) % len(MODELS)]


class Raised(Exception):
    """A scenario ended with an exception in its worker.

    :ivar names: of its class and the bases of that.
    """

    def __init__(self, worker: str, error: dict[str, Any]) -> None:
        super().__init__(f"in {worker}: {error['names'][0]}: {error['text']}\n{error['traceback']}")
        self.names: list[str] = error["names"]
        self.module: str = error["module"]
        self.text: str = error["text"]
        self.exc_type: str | None = error["exc_type"]
        self.server: str | None = error["server"]

    @property
    def name(self) -> str:
        return self.names[0]


def wait_until(condition: Callable[[], Any], limit: float = 20, what: object = "") -> Any:
    """The condition's value, once it is true."""
    end = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {limit} s in vain for {what or condition}"
        time.sleep(0.005)
    return value


class Worker:
    """A process that runs scenarios."""

    def __init__(
        self, model: str, log: Path, *, patched: bool = True, within: Sequence[str] = (), options: Sequence[str] = ()
    ) -> None:
        """
        :param within: a command that runs another one, as ``ip netns exec NAME`` does.
        :param options: of Python.
        """
        self.model = model
        self.log = log
        self.used = False
        self._ids = itertools.count()
        self._pending: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self.process = subprocess.Popen(
            [*within, sys.executable, *options, "-m", "tests.contract.worker", model, *([] if patched else ["--unpatched"])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("ab"),
            cwd=ROOT,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def __repr__(self) -> str:
        return f"{self.log.stem} (pid {self.process.pid})"

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def begin(self, scenario: str, **args: Any) -> Future[Any]:
        """Run it, without waiting for its end."""
        self.used = True
        future: Future[Any] = Future()
        with self._lock:
            number = next(self._ids)
            self._pending[number] = future
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"id": number, "run": scenario, "args": args}).encode() + b"\n")
            self.process.stdin.flush()
        return future

    def run(self, scenario: str, limit: float = 60, **args: Any) -> Any:
        """Its value.

        :raises Raised: what it raised.
        """
        return self.begin(scenario, **args).result(limit)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.alive:
            self.process.kill()
        self.process.wait(10)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer = json.loads(line)
            future = self._pending.pop(answer["id"])
            if "error" in answer:
                future.set_exception(Raised(repr(self), answer["error"]))
            else:
                future.set_result(answer["ok"])
        while self._pending:
            _, future = self._pending.popitem()
            future.set_exception(EOFError(f"{self!r} has ended; its log: {self.log}"))


def cpu_shares(workers: Sequence[Worker], seconds: float) -> list[float]:
    """Of a core, that each of them uses over so many seconds."""
    before, began = [worker.run("cpu") for worker in workers], time.monotonic()
    wait_until(lambda: time.monotonic() >= began + seconds)
    took = time.monotonic() - began
    return [(worker.run("cpu") - each) / took for worker, each in zip(workers, before, strict=True)]


class Directory:
    """The addresses of one directory that all processes of the tests share."""

    def __init__(self, address: str) -> None:
        self._address = address

    def url(self, **options: object) -> str:
        """A transport URL; with the same options the same transport is meant, within one worker."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"{self._address}{'&' if query else ''}{query}"


# Of this process.
fleets: list[Fleet] = []


class Fleet:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        fleets.append(self)
        self._workers: dict[tuple[str, str], Worker] = {}
        self._lone: list[Worker] = []
        self._ended = 0

    def get(self, role: str, model: str) -> Worker:
        worker = self._workers.get((role, model))
        if worker is None or not worker.alive:
            patched = role != "unpatched"
            worker = self._workers[role, model] = Worker(model, self._folder / f"{role}-{model}.log", patched=patched)
        return worker

    def start(self, model: str, *options: str) -> Worker:
        """A process for one test, which may stop or kill it; with these options of Python."""
        worker = Worker(model, self._folder / f"lone-{len(self._lone)}-{model}.log", options=options)
        self._lone.append(worker)
        return worker

    def logs(self) -> Iterator[tuple[str, str]]:
        """What the workers of this test have logged last, by the name of the log."""
        for worker in [*self._lone[self._ended :], *(worker for worker in self._workers.values() if worker.used)]:
            lines = worker.log.read_text(errors="replace").splitlines()
            if lines:
                yield worker.log.name, "\n".join(lines[-_LINES:])

    def reset(self) -> None:
        """After a test."""
        for worker in self._lone[self._ended :]:
            worker.kill()
        self._ended = len(self._lone)
        for worker in self._workers.values():
            if worker.used and worker.alive:
                try:
                    worker.run("reset", limit=30)
                except BaseException:
                    worker.kill()
                    raise
                worker.used = False

    def end(self) -> None:
        for worker in [*self._lone, *self._workers.values()]:
            worker.kill()
