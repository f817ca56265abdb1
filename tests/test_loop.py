# SPDX-License-Identifier: Apache-2.0
"""The loop of a transport, over native threads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from math import inf

import pytest

from green_zmq import executors
from green_zmq.errors import TransportClosed
from green_zmq.loop import Loop
from tests.contract.models import wait_until

LIMIT = 10.0


class Timer:
    """:ivar ticks: how often its time has come."""

    def __init__(self) -> None:
        self.due = inf
        self.ticks = 0

    def tick(self, _: float) -> None:
        self.due = inf
        self.ticks += 1


@pytest.fixture
def loop() -> Iterator[Loop]:
    model = executors.load("threads")
    loop = Loop(model)
    with model.LOCK:
        loop.start()
    wait_until(lambda: loop._sleeping, LIMIT)
    yield loop
    if not loop._over:
        loop.post(loop.finish)
    loop.join()


def in_a_thread(fn: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=fn, daemon=True)
    thread.start()
    return thread


def test_what_it_posts_or_calls_itself_is_done(loop: Loop) -> None:
    """As a finalizer may, that runs at any time."""
    posted, called = threading.Event(), threading.Event()

    def at_once() -> None:
        loop.post(posted.set)
        loop.call(called.set)

    in_a_thread(lambda: loop.call(at_once)).join(LIMIT)
    assert posted.wait(LIMIT)
    assert called.wait(LIMIT)


def test_no_wake_up_is_lost_among_many(loop: Loop) -> None:
    count = 3000
    waiting = [0]

    def one_after_the_other(hand: Callable[..., None]) -> None:
        for _ in range(count):
            done = threading.Lock()
            done.acquire()
            hand(done.release)
            assert done.acquire(timeout=LIMIT)
        waiting[0] -= 1

    hands = [loop.call, loop.post, loop.call, loop.post]
    waiting[0] = len(hands)
    for thread in [in_a_thread(lambda hand=hand: one_after_the_other(hand)) for hand in hands]:
        thread.join(60)
    assert waiting == [0]


def test_a_time_that_it_sets_is_kept(loop: Loop) -> None:
    timer = Timer()
    loop.timed.append(timer)

    def at_once() -> None:
        timer.due = time.monotonic() + 0.01

    in_a_thread(lambda: loop.call(at_once)).join(LIMIT)
    wait_until(lambda: timer.ticks, LIMIT)


def test_what_it_decides_is_carried_out(loop: Loop) -> None:
    undone = [1]
    loop.is_settled, loop.settle = lambda: not undone, undone.clear
    undone.append(1)
    in_a_thread(lambda: loop.call(lambda: None)).join(LIMIT)
    wait_until(lambda: not undone, LIMIT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_in_it_ends_the_loop(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    reasons: list[str] = []
    loop.on_crash = reasons.append
    with caplog.at_level(logging.CRITICAL):
        in_a_thread(lambda: loop.call(lambda: 1 / 0)).join(LIMIT)
        wait_until(lambda: reasons, LIMIT)
    assert "division by zero" in caplog.text
    loop.join()
    for hand in (loop.post, loop.call):
        with pytest.raises(TransportClosed):
            hand(lambda: None)
