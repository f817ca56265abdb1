# SPDX-License-Identifier: Apache-2.0
"""In a worker: what scenarios need of the concurrency model, patched or not."""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

name = "threads"
sleep: Callable[[float], None] = time.sleep


def load(model: str) -> None:
    global name, sleep
    name = model
    if model == "eventlet":
        import eventlet

        sleep = eventlet.sleep
    elif model == "gevent":
        import gevent

        sleep = gevent.sleep
        # It listens for the ends of children from its first fork on, only after that: if that child ends before, it is
        # never told (gevent.os.fork_and_watch; seen with 26.9).
        gevent.get_hub().loop.install_sigchld()


def spawn(fn: Callable[..., Any], *args: Any) -> Any:
    """Run in a thread of the model; its own thread object, which green models can kill."""
    if name == "eventlet":
        import eventlet

        return eventlet.spawn(fn, *args)
    if name == "gevent":
        import gevent

        return gevent.spawn(fn, *args)
    thread = threading.Thread(target=fn, args=args, daemon=True)
    thread.start()
    return thread


def spawn_native(fn: Callable[[], Any]) -> None:
    """Run in an operating system thread, whatever is patched."""
    if name == "eventlet":
        from eventlet import patcher

        patcher.original("threading").Thread(target=fn, daemon=True).start()
    elif name == "gevent":
        import gevent.monkey

        gevent.monkey.get_original("_thread", "start_new_thread")(fn, ())
    else:
        threading.Thread(target=fn, daemon=True).start()


def wait_until(condition: Callable[[], Any], limit: float = 20, what: str = "") -> Any:
    """The condition's value, once it is true."""
    end = time.monotonic() + limit
    while not (value := condition()):
        if time.monotonic() > end:
            print(f"waited {limit} s in vain {what}", *stacks(), sep="\n\n", file=sys.stderr, flush=True)
            raise AssertionError(f"waited {limit} s in vain {what}")
        sleep(0.005)
    return value


def stacks() -> list[str]:
    """Where the threads of this process are, native or green, and how many are there."""
    frames = list(sys._current_frames().values())
    greenlets = sys.modules.get("greenlet")
    if greenlets is not None:
        green = [each for each in gc.get_objects() if isinstance(each, greenlets.greenlet)]
        frames += [each.gr_frame for each in green if each.gr_frame is not None]
    found = Counter("".join(traceback.format_stack(frame, limit=8)) for frame in frames)
    return [f"{count} times\n{stack}" for stack, count in found.items()]


class Outcome:
    """What has become of a function that was run elsewhere."""

    def __init__(self, fn: Callable[[], Any]) -> None:
        self._fn = fn
        self.over = False
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value = self._fn()
        except BaseException as error:
            self.error = error
        self.over = True

    def result(self, limit: float = 60) -> Any:
        wait_until(lambda: self.over, limit)
        if self.error is not None:
            raise self.error
        return self.value


def parallel(functions: Iterable[Callable[[], Any]], *, native: bool = False) -> list[Outcome]:
    """Run each in a thread of its own."""
    outcomes = [Outcome(fn) for fn in functions]
    for outcome in outcomes:
        if native:
            spawn_native(outcome.run)
        else:
            spawn(outcome.run)
    return outcomes
