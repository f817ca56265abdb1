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


def call_or_post(loop: Loop) -> Callable[..., object]:
    return lambda *what: loop.call(*what) or loop.post(*what)


def where(loop: Loop, hand: Callable[..., object]) -> int:
    """The thread in which something is done."""
    found: list[int] = []
    hand(lambda: found.append(threading.get_ident()))
    wait_until(lambda: found, LIMIT)
    return found[0]


def test_who_brings_something_to_a_loop_that_rests_does_it(loop: Loop) -> None:
    found: list[bool] = []
    in_a_thread(lambda: found.append(where(loop, loop.call) == threading.get_ident())).join(LIMIT)
    assert found == [True]
    assert loop._sleeping


def test_the_main_thread_posts_it(loop: Loop) -> None:
    """A handler of a signal may come in between, and wait for the loop."""
    assert not loop.call(lambda: None)


def test_what_is_posted_meanwhile_is_done(loop: Loop) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def at_once() -> None:
        begun.set()
        assert go_on.wait(LIMIT)

    thread = in_a_thread(lambda: loop.call(at_once))
    assert begun.wait(LIMIT)
    loop.post(done.set)
    assert not done.is_set()  # the loop does not go on
    go_on.set()
    thread.join(LIMIT)
    assert done.wait(LIMIT)


def test_what_it_posts_or_calls_itself_is_done(loop: Loop) -> None:
    """As a finalizer may, that runs at any time."""
    posted, called = threading.Event(), threading.Event()

    def at_once() -> None:
        loop.post(posted.set)
        assert not loop.call(called.set)
        loop.post(called.set)

    in_a_thread(lambda: loop.call(at_once)).join(LIMIT)
    assert posted.wait(LIMIT)
    assert called.wait(LIMIT)


def test_no_wake_up_is_lost_among_many(loop: Loop) -> None:
    count = 3000
    waiting = [0]

    def one_after_the_other(hand: Callable[..., object]) -> None:
        for _ in range(count):
            done = threading.Lock()
            done.acquire()
            hand(done.release)
            assert done.acquire(timeout=LIMIT)
        waiting[0] -= 1

    hands = [call_or_post(loop), loop.post, call_or_post(loop), loop.post]
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


def test_a_defect_in_what_was_posted_ends_the_loop(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    reasons: list[str] = []
    loop.on_crash = reasons.append
    with caplog.at_level(logging.CRITICAL):
        loop.post(lambda: 1 / 0)
        wait_until(lambda: reasons, LIMIT)
    assert "division by zero" in caplog.text
    loop.join()
    assert not loop.call(lambda: None)
    with pytest.raises(TransportClosed):
        loop.post(lambda: None)


def test_what_raises_at_once_leaves_a_loop_that_goes_on(loop: Loop) -> None:
    raised: list[bool] = []

    def at_once() -> None:
        with pytest.raises(ZeroDivisionError):
            loop.call(lambda: 1 / 0)
        raised.append(True)

    in_a_thread(at_once).join(LIMIT)
    assert raised
    assert where(loop, loop.post) != threading.get_ident()


def test_what_is_done_at_once_or_posted_is_done_alone(loop: Loop) -> None:
    """By four threads at once, of which two do most of it themselves."""
    inside, most, count = [0], [0], 2000
    counts = [0] * 4
    hands = [call_or_post(loop), loop.post] * 2

    def work(number: int) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        counts[number] += 1
        inside[0] -= 1

    def bring(number: int) -> None:
        for _ in range(count):
            hands[number](work, number)

    for thread in [in_a_thread(lambda number=number: bring(number)) for number in range(4)]:
        thread.join(60)
    wait_until(lambda: counts == [count] * 4, LIMIT)
    assert most == [1]
