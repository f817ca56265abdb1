# SPDX-License-Identifier: Apache-2.0
"""Notifications that are listened to: each listener has a native thread that takes them out of the store."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from math import inf
from typing import Any, Final

from oslo_messaging._drivers import base

from green_zmq import wire
from green_zmq.batches import Batches
from green_zmq.config import Settings
from green_zmq.descriptors import Wake, shortage
from green_zmq.errors import OutOfDescriptors, StoreError, TransportClosed, WireError
from green_zmq.loop import Loop
from green_zmq.notifications import Consumer, Store, Taken, load, open_store
from green_zmq.notifier import defect, log_dropped
from green_zmq.routing import Topic

LOG = logging.getLogger(__name__)

# Messages that are with a server's workers at once: as many as it has by default; or two batches.
_HANDED: Final = 64
# A store that fails is tried again after so many seconds.
_RETRY: Final = 1.0
# One that was given back is taken again at once the first time, then after a time that grows from this to that, seconds.
_DELAYS: Final = (0.1, 30.0)
_GROWTH: Final = 3.0


def delay(tries: int) -> float:
    """Seconds until a message that was tried so often, and given back each time, is tried again."""
    first, last = _DELAYS
    return 0.0 if tries <= 1 else min(first * _GROWTH ** min(tries - 2, 20), last)


# What became of a message.
_PROCESSED, _REQUEUED, _UNTRIED = range(3)
# A listener that has processed something has what need not be kept any more removed after this time, seconds.
_TRIM: Final = 1.0
# So many windows of messages that wait to be given back are too many to take more.
_MOST: Final = 4
_ASIDE: Final = "put aside notification %s to %s of exchange '%s', pool '%s': %s; see green-zmq notifications"
# Who has just taken something looks again after this time, seconds: by then others have come, or been processed, which together
# cost as much as one alone. The first of many is taken at once.
_PACE: Final = 0.001
# A thread that has nothing to do looks again after this time, seconds.
_LONGEST: Final = 3600.0


def _nothing() -> None: ...


class Notification(base.IncomingMessage):
    """A message on its way through an oslo.messaging server. Its methods are called in that server's workers."""

    def __init__(self, listener: NotificationListener, taken: Taken, ctxt: Any, message: Any) -> None:
        super().__init__(ctxt, message, taken.name)
        self.taken = taken
        self._listener = listener

    def acknowledge(self) -> None:
        """It is processed."""
        self._listener.settle(self, requeue=False)

    def requeue(self) -> None:
        """It is to be processed once more, by whichever listener of its pool comes first."""
        self._listener.settle(self, requeue=True)


class NotificationListener(base.Listener):
    """What one oslo.messaging server listens to: topics, as a member of a pool.

    :ivar batches: what was taken and is not handed over yet.
    """

    def __init__(
        self, subscriber: Subscriber, topics: Collection[Topic], pool: str, batch_size: int, batch_timeout: float | None
    ) -> None:
        super().__init__(batch_size, batch_timeout)
        self.batches: Batches[Notification] = Batches(batch_size, batch_timeout)
        self._subscriber = subscriber
        self._topics = list(dict.fromkeys(topics))
        self._pool = pool
        # Those that are with the server's workers. Whoever takes one out has it: taking a key out of a dict is atomic.
        self._handed: dict[Notification, bool] = {}
        self._share: Share | None = None

    # For all threads.

    def start(self, on_incoming_callback: Callable[[list[Notification]], None]) -> None:
        """What is sent from here on, this listener's pool gets.

        :raises StoreError: the store cannot be used.
        :raises OutOfDescriptors: there is none left for the thread.
        :raises TransportClosed: the transport was closed.
        """
        super().start(on_incoming_callback)
        share = Share(self._subscriber, self, self._topics, self._pool)
        self._share = share  # before it begins: it may take something at once
        try:
            self._subscriber.start(self, share)
        except TransportClosed:  # it never begins, so nobody is to wait for its end
            self._share = None
            raise

    def stop(self) -> None:
        """Take nothing more, and give back what was not handed over. What was is processed, and acknowledged."""
        share = self._share
        if share is not None:
            share.stop()
            with contextlib.suppress(TransportClosed):
                self._subscriber.post(self.hand_over)
        super().stop()

    def cleanup(self) -> None:
        """Leave the pool. What is not processed by now is given back."""
        share, self._share = self._share, None
        if share is not None:
            left = self._subscriber.loop.model.Event()
            share.end(left.set)
            left.wait()

    def settle(self, notification: Notification, *, requeue: bool) -> None:
        share = self._share
        if self._handed.pop(notification, False) and share is not None:
            share.settle(notification.taken, _REQUEUED if requeue else _PROCESSED)
            if self.batches.waiting:
                with contextlib.suppress(TransportClosed):
                    self._subscriber.post(self.hand_over)

    # For the loop's thread.

    def arrived(self, messages: Sequence[Notification], now: float) -> None:
        for message in messages:
            self.batches.add(message, now)
        self.hand_over(now)

    def hand_over(self, now: float) -> None:
        """As much as may be: whole batches, or what there is when the time for a batch has run out."""
        callback, size, share = self.on_incoming_callback, self.batch_size, self._share
        if share is None or share.stopping or callback is None:
            while self.batches.waiting:
                message = self.batches.waiting.popleft()
                if share is not None:
                    share.settle(message.taken, _UNTRIED)
            return
        while len(self._handed) + size <= max(_HANDED, 2 * size):
            batch = self.batches.next(now)
            if not batch:
                return
            self._handed.update(dict.fromkeys(batch, True))
            try:
                callback(batch)
            except RuntimeError as error:  # the executor was shut down, or the process ends
                topics = ", ".join(name for _, name in self._topics)
                LOG.warning("no notification of %s is taken any more, though its server was not stopped: %s", topics, error)
                share.stop()
                for message in batch:
                    if self._handed.pop(message, False):
                        share.settle(message.taken, _UNTRIED)
                self.hand_over(now)
                return


class Share:
    """The native thread of a listener, and what it has taken.

    :ivar stopping: it takes nothing more.
    """

    def __init__(self, subscriber: Subscriber, listener: NotificationListener, topics: Collection[Topic], pool: str) -> None:
        """:raises OutOfDescriptors: there is none left."""
        reason = shortage()
        if reason:
            raise OutOfDescriptors(f"No notifications can be listened to: {reason}.")
        load(subscriber.settings.directory)
        self.stopping = False
        self._ending = False
        self._over = False
        self._at_end: deque[Callable[[], None]] = deque()
        self._subscriber = subscriber
        self._listener = listener
        self._topics = topics
        self._pool = pool
        self._bounds = subscriber.settings.bounds
        self._window = max(subscriber.settings.listener_window, 2 * listener.batch_size)
        self._wake = Wake()
        self._sleeping = False
        # What became of messages, told by other threads.
        self._settled: deque[tuple[Taken, int]] = deque()
        # What the store is to be told yet.
        self._done: list[Taken] = []
        self._aside: list[tuple[Taken, str]] = []  # with the reason
        self._untried: list[Taken] = []
        self._requeued: list[tuple[float, Taken]] = []
        # Messages that are here, in whatever state.
        self._held = 0
        self._trim_at = inf
        self._failing = False

    # For all threads.

    def settle(self, taken: Taken, what: int) -> None:
        self._settled.append((taken, what))
        self._rouse()

    def stop(self) -> None:
        self.stopping = True
        self._rouse()

    def end(self, then: Callable[[], None] = _nothing) -> None:
        """Have it leave its pool, and call that when it has."""
        self._at_end.append(then)
        self.stopping = self._ending = True
        self._rouse()
        if self._over:
            self._tell_end()

    def _rouse(self) -> None:
        if self._sleeping:
            self._sleeping = False
            self._wake()

    def abandon(self) -> None:
        """In a forked child: the thread is the parent's, and so is what it has."""
        self._sleeping = False
        self._over = True

    # For its own. It must not log: a handler's lock may be a green one, of another thread's hub.

    def work(self, began: Callable[[Exception | None], None]) -> None:
        """:param began: called once it listens, or with the reason why it cannot."""
        store: Store | None = None
        try:
            try:
                store = open_store(self._subscriber.settings)
                consumer = store.consume(self._topics, self._pool)
            except Exception as error:
                began(error if isinstance(error, StoreError) else defect(error))
                return
            began(None)
            while not self._ending:
                self._turn(store, consumer)
            with contextlib.suppress(Exception):  # then others take over what is still here
                self._collect(time.monotonic())
                self._tell(consumer, inf)
                consumer.close()
        finally:
            if store is not None:
                store.close()
            self._over = True
            self._tell_end()
            with contextlib.suppress(TransportClosed):
                self._subscriber.post(lambda _: self._subscriber.forget(self))

    def _tell_end(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._at_end.popleft()()

    def _turn(self, store: Store, consumer: Consumer) -> None:
        now = time.monotonic()
        self._collect(now)
        try:
            self._tell(consumer, now)
            taken = self._take(consumer)
            if self._trim_at <= now:
                self._trim_at = inf
                log_dropped(self._subscriber.loop, self._subscriber.counts, store.trim(self._topics))
            self._heard(None)
            if taken and not self._aside:
                self._subscriber.loop.model.native_sleep(_PACE)
                return
            self._sleeping = True
            if not self._settled and not self._aside and not self._ending:
                due = min([self._trim_at, *(due for due, _ in self._requeued)])
                consumer.wait(self._wake.fd, min(max(0.0, due - now), _LONGEST))
            self._sleeping = False
        except Exception as error:
            self._heard(error if isinstance(error, StoreError) else defect(error))
            self._sleeping = False
            self._pause()

    def _collect(self, now: float) -> None:
        while self._settled:
            taken, what = self._settled.popleft()
            if what == _PROCESSED:
                self._done.append(taken)
            elif what == _UNTRIED:
                self._untried.append(taken)
            elif taken.tries < self._bounds.tries:
                self._requeued.append((now + delay(taken.tries), taken))
            else:
                self._aside.append((taken, f"it was tried {taken.tries} times"))

    def _tell(self, consumer: Consumer, now: float) -> None:
        """The store, what became of messages; what it does not take now, it is told again."""
        counts = self._subscriber.counts
        if self._done:
            consumer.acknowledge(self._done)
            counts["notifications processed"] += len(self._done)
            self._held -= len(self._done)
            self._done = []
            self._trim_at = min(self._trim_at, time.monotonic() + _TRIM)
        if self._aside:
            consumer.put_aside([taken for taken, _ in self._aside])
            counts["notifications put aside"] += len(self._aside)
            self._held -= len(self._aside)
            for taken, reason in self._aside:  # whoever reads it in the log finds it
                self._log(logging.ERROR, _ASIDE, taken.name, taken.topic.name, taken.topic.exchange, self._pool, reason)
            self._aside = []
        due = [taken for at, taken in self._requeued if at <= now]
        if due:
            consumer.give_back(due, tried=True)
            counts["notifications requeued"] += len(due)
            self._held -= len(due)
            self._requeued = [(at, taken) for at, taken in self._requeued if at > now]
        if self._untried:
            consumer.give_back(self._untried, tried=False)
            self._held -= len(self._untried)
            self._untried = []

    def _take(self, consumer: Consumer) -> bool:
        # By halves of the window: a few at a time would cost as much each time. What waits to be given back stands in nobody's
        # way, unless that is very much.
        working = self._held - len(self._requeued)
        room = self._window - working if 2 * working <= self._window and self._held <= _MOST * self._window else 0
        taken = consumer.take(0 if self.stopping else room)
        if not taken:
            return False
        self._held += len(taken)
        self._subscriber.counts["notifications taken"] += len(taken)
        messages = []
        for each in taken:
            if each.tries > self._bounds.tries:
                self._aside.append((each, f"its listeners have died of it, or with it, {each.tries - 1} times"))
                continue
            try:
                ctxt, message = wire.decode_stored(each.body, _nothing)
            except (WireError, TypeError, ValueError) as error:
                self._aside.append((each, f"it cannot be made out: {error}"))
            else:
                messages.append(Notification(self._listener, each, ctxt, message))
        with contextlib.suppress(TransportClosed):
            self._subscriber.post(lambda now: self._listener.arrived(messages, now))
        return True

    def _pause(self) -> None:
        """Until the store is tried again, or this is to end."""
        poll = self._subscriber.loop.model.native_poll()
        poll.register(self._wake.fd, select.POLLIN)
        until = time.monotonic() + _RETRY
        while not self._ending and (left := until - time.monotonic()) > 0:
            self._sleeping = True
            if not self._ending:
                poll.poll(left * 1000)
            self._sleeping = False
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake.fd)

    def _heard(self, error: StoreError | None) -> None:
        if (error is not None) != self._failing:
            self._failing = error is not None
            place = self._subscriber.settings.store_place
            text, value = ("%s It is tried again.", error) if error else ("Notifications %s can be taken again.", place)
            self._log(logging.WARNING, text, value)

    def _log(self, level: int, text: str, *values: object) -> None:
        with contextlib.suppress(TransportClosed):
            self._subscriber.post(lambda _: LOG.log(level, text, *values))


class Subscriber:
    """All listeners to notifications of a transport.

    :ivar counts: of notifications.
    """

    def __init__(self, loop: Loop, settings: Settings, now: Callable[[], float]) -> None:
        self.counts: Counter[str] = Counter()
        self.due = inf
        self.loop = loop
        self.settings = settings
        self._now = now
        self._shares: dict[Share, NotificationListener] = {}
        self._closed = False

    # For all threads.

    def start(self, listener: NotificationListener, share: Share) -> None:
        """Returns when it listens, or raises why it cannot."""
        began = self.loop.model.Event()
        errors: list[Exception] = []

        def told(error: Exception | None) -> None:
            if error is not None:
                errors.append(error)
            began.set()

        self.post(lambda _: self._begin(listener, share))
        self.loop.model.start_native(lambda: share.work(told))
        began.wait()
        if errors:
            raise errors[0]

    def post(self, fn: Callable[[float], None]) -> None:
        """Have it called by the loop, with the time.

        :raises TransportClosed: the transport was closed.
        """
        self.loop.post(self._call, fn)

    def abandon(self) -> None:
        """In a forked child."""
        for share in self._shares:
            share.abandon()

    # For the loop's thread.

    def tick(self, now: float) -> None:
        """Batches whose time has run out."""
        for listener in self._shares.values():
            if listener.batches.due <= now:
                listener.hand_over(now)
        self._see_due()

    def close(self) -> None:
        """All leave their pools."""
        self._closed = True
        for share in self._shares:
            share.end()

    @property
    def listening(self) -> bool:
        return bool(self._shares)

    def forget(self, share: Share) -> None:
        self._shares.pop(share, None)

    def _begin(self, listener: NotificationListener, share: Share) -> None:
        self._shares[share] = listener
        if self._closed:
            share.end()

    def _call(self, fn: Callable[[float], None]) -> None:
        fn(self._now())
        self._see_due()

    def _see_due(self) -> None:
        self.due = min((listener.batches.due for listener in self._shares.values()), default=inf)
