# SPDX-License-Identifier: Apache-2.0
"""``green-zmq demo``: a server and a client process of each concurrency model, everybody to everybody."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final
from urllib.parse import quote

from green_zmq.cli.common import (
    OK,
    REMOTE,
    as_failure,
    on_terminal,
    open_transport,
    print_table,
    read_url,
    set_up_logging,
)
from green_zmq.cli.demo_client import CASTS, FANOUTS

_LIBRARIES: Final = {"eventlet": "eventlet", "gevent": "gevent", "threads": "threading"}
# Seconds for everything but the end of the processes, for which there are a few more.
_BUDGET: Final = 20.0
_END: Final = 3.0
# How long casts and fanouts that a server has taken may wait for being run.
_SETTLE: Final = 3.0


@dataclass
class _Child:
    """A process that the demo started.

    :ivar reports: of a client, what it told of each server.
    """

    role: str
    model: str
    process: subprocess.Popen[str]
    errors: IO[str]
    ready: bool = False
    finished: bool = False
    over: bool = False
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.role} {self.model}"

    def last_words(self) -> str:
        """How it ended, and why as far as it said so."""
        self.errors.seek(0)
        text = self.errors.read().strip().splitlines()
        said = f": {text[-1].removeprefix('green-zmq: ')}" if text else ""
        return f"{self} ended early (exit code {self.process.wait()}){said}"


_Event = tuple[_Child, dict[str, Any] | None]
_Show = Callable[[_Child, Mapping[str, Any]], None]


class _Demo:
    """The processes, what they have told, and what went wrong."""

    def __init__(self, models: Sequence[str], topic: str, url: str, calls: int, show: _Show) -> None:
        self.problems: list[str] = []
        self.children: list[_Child] = []
        self._models = models
        self._topic = topic
        self._url = url
        self._calls = calls
        self._show = show
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._until = time.monotonic() + _BUDGET

    def run(self) -> None:
        """Everything up to the check of what arrived."""
        for model in self._models:
            self._start("server", model, ["serve", self._topic, "--server", model, "--with-parent"])
        for model in self._models:
            self._start("client", model, ["demo-client", self._topic, *self._models, "--calls", str(self._calls)])
        if not self._await(lambda: all(child.ready or child.over for child in self.children)):
            self.problems += [f"{child} was not ready in time" for child in self.children if not child.ready]
        # In turn, so that the rates are those of one client, not of how they compete for the processors.
        for client in self.children:
            if client.role != "client" or client.over or not client.ready:
                continue
            assert client.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                client.process.stdin.write("go\n")
                client.process.stdin.flush()
            if not self._await(lambda client=client: client.finished or client.over):  # type: ignore[misc]
                self.problems.append(f"{client} was not done in time")

    def arrived(self) -> dict[str, dict[str, list[int]]]:
        """What each server has counted, asked until it has everything or does not answer."""
        import oslo_messaging as om

        found: dict[str, dict[str, list[int]]] = {}
        until = min(time.monotonic() + _SETTLE, self._until + 1)
        with open_transport(self._url, linger=0) as transport:
            client = om.get_rpc_client(transport, om.Target(topic=self._topic), timeout=1.0)
            for model in [child.model for child in self.children if child.role == "server" and child.ready and not child.over]:
                while True:
                    try:
                        found[model] = client.prepare(server=model).call({}, "inspect")["counted"]
                    except Exception as error:
                        self.problems.append(f"server {model} cannot be inspected: {as_failure(error)}")
                        break
                    if not self.missing(found[model]) or time.monotonic() >= until:
                        break
                    time.sleep(0.05)
        return found

    def missing(self, counted: Mapping[str, Sequence[int]]) -> list[str]:
        """What has not arrived exactly once at a server that has counted this."""
        wrong = []
        for model in self._models:
            for what, times in (("casts", CASTS), ("fanouts", FANOUTS)):
                found = list(counted.get(f"{model} {what}", (0, 0)))
                if found[0] != times:
                    wrong.append(f"{found[0]} of {times} {what} of client {model} arrived")
                elif found[1] != sum(range(times)):
                    wrong.append(f"{times} {what} of client {model} arrived, but some twice and others never")
        return wrong

    def end(self) -> None:
        """End the processes that were started: with a request first, then by force."""
        for child in self.children:
            child.process.terminate()
        until = time.monotonic() + _END
        for child in self.children:
            try:
                child.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
                self.problems.append(f"{child} had to be killed")
            child.errors.close()

    def _start(self, role: str, model: str, words: Sequence[str]) -> None:
        errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - end() closes it
        process = subprocess.Popen(  # noqa: S603 - this very program
            [sys.executable, "-m", "green_zmq.cli", *words, "--executor", model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            env=os.environ | {"PYTHONIOENCODING": "utf-8", "GREEN_ZMQ_URL": self._url},  # not as an argument, for all to see
            start_new_session=True,  # Ctrl-C is for the demo, which then ends them
        )
        child = _Child(role, model, process, errors)
        self.children.append(child)
        threading.Thread(target=self._read, args=(child,), daemon=True).start()

    def _read(self, child: _Child) -> None:
        assert child.process.stdout is not None
        for line in child.process.stdout:
            self._events.put((child, json.loads(line) if child.role == "client" else {"ready": True}))
        self._events.put((child, None))

    def _await(self, done: Callable[[], bool]) -> bool:
        """Take what the processes tell until something is so, or the time is up."""
        while not done():
            try:
                child, words = self._events.get(timeout=max(0.0, self._until - time.monotonic()))
            except queue.Empty:
                return False
            if words is None:
                child.over = True
                if not child.finished:
                    self.problems.append(child.last_words())
                continue
            child.ready |= bool(words.get("ready"))
            child.finished |= bool(words.get("finished"))
            if "problem" in words:
                self.problems.append(f"client {child.model}: {words['problem']}")
            if "server" in words:
                child.reports[words["server"]] = dict(words)
            self._show(child, words)
        return True


def run(args: argparse.Namespace) -> int:
    set_up_logging(logging.CRITICAL)
    if args.url is not None:
        read_url(args.url)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes must not stay behind
    begin = time.monotonic()
    models = [model for model, library in _LIBRARIES.items() if importlib.util.find_spec(library) is not None]
    for model in [model for model in _LIBRARIES if model not in models]:
        print(f"{model} is left out, since it is not installed; install it with: pip install 'green_zmq[{model}]'")
    print(f"A server and a client process of each of {', '.join(models)}; every client calls every server.", flush=True)
    topic = f"green-zmq-demo-{os.urandom(4).hex()}"
    with tempfile.TemporaryDirectory(prefix="green-zmq-demo-") as folder:
        url = f"zmq://?directory_path={quote(folder)}/directory.sqlite" if args.url is None else args.url
        with _showing(models, len(models) * (args.calls + CASTS) + FANOUTS) as show:
            demo = _Demo(models, topic, url, args.calls, show)
            try:
                demo.run()
                arrived = demo.arrived()
            finally:
                demo.end()
    _print_results(demo, models, arrived)
    for model in models:
        demo.problems += [f"server {model}: {text}" for text in demo.missing(arrived.get(model, {}))]
    for client in demo.children:
        if client.role == "client":
            counts = {model: client.reports.get(model, {}).get("calls", 0) for model in models}
            demo.problems += [
                f"server {model}: {count} of {args.calls} calls of {client} were answered"
                for model, count in counts.items()
                if count != args.calls
            ]
    seconds = time.monotonic() - begin
    if demo.problems:
        print(f"Not everything was answered ({seconds:.1f} s):")
        for problem in demo.problems:
            print(f"  {problem}")
        return REMOTE
    print(f"everything answered ({seconds:.1f} s)")
    return OK


def _print_results(demo: _Demo, models: Sequence[str], arrived: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    rows = []
    for client in demo.children:
        if client.role != "client":
            continue
        for server in models:
            report = client.reports.get(server, {})
            counted = arrived.get(server, {})
            rows.append(
                (
                    client.model,
                    server,
                    str(report.get("calls", 0)),
                    f"{report.get('rate', 0.0):.0f}",
                    *("-" if report.get(p) is None else f"{report[p]:.2f}" for p in ("p50", "p99")),
                    f"{counted.get(f'{client.model} casts', (0,))[0]}/{CASTS}",
                    f"{counted.get(f'{client.model} fanouts', (0,))[0]}/{FANOUTS}",
                )
            )
    print_table(("client", "server", "calls", "calls/s", "p50 ms", "p99 ms", "casts", "fanouts"), rows, numbers=6)


@contextlib.contextmanager
def _showing(models: Sequence[str], total: int) -> Iterator[_Show]:
    """What shows the progress: bars on a terminal, else a line at each step that is done."""
    if not on_terminal():
        yield _show_line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[doing]}"))
    with Progress(*columns, TimeElapsedColumn(), transient=True) as progress:
        bars = {
            (role, model): progress.add_task(f"{role} {model}", total=1 if role == "server" else total, doing="starting")
            for role in ("server", "client")
            for model in models
        }

        def show(child: _Child, words: Mapping[str, Any]) -> None:
            bar = bars[child.role, child.model]
            if child.role == "server":
                progress.update(bar, completed=1, doing="listening")
            elif words.get("finished"):
                progress.update(bar, completed=total, doing="done")
            elif words.get("ready"):
                progress.update(bar, doing="waiting for its turn")
            elif "done" in words:
                progress.update(bar, completed=words["done"], doing=words["doing"])

        yield show


def _show_line(child: _Child, words: Mapping[str, Any]) -> None:
    if child.role == "server":
        print(f"{child} is listening", flush=True)
    elif "server" in words:
        print(f"{child}: {words['calls']} calls to {words['server']} answered, {words['rate']:.0f}/s", flush=True)
    elif words.get("finished"):
        print(f"{child} is done", flush=True)
