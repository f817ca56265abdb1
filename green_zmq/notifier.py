# SPDX-License-Identifier: Apache-2.0
"""Notifications that are sent: the thread that sends one stores it, if that is possible at once.

Else a native thread does, all those that wait together, and tries again what has failed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from math import inf
from typing import Final

from green_zmq import wire
from green_zmq.config import Settings
from green_zmq.descriptors import Wake, shortage
from green_zmq.errors import MessageTooLarge, OutOfDescriptors, StoreError, TransportClosed
from green_zmq.executors.base import Event
from green_zmq.loop import Loop
from green_zmq.notifications import Busy, Store, load, open_store
from green_zmq.routing import Topic

LOG = logging.getLogger(__name__)

# Stored at once: messages, and bytes unless one alone has more.
_MOST: Final = 256
_MOST_BYTES: Final = 16 << 20
# A store that fails is tried again after so many seconds at first, and at last.
_AGAIN: Final = (0.1, 5.0)
# After the first message to a topic it is looked whether some of it is to go, since many a process sends no more; then after so
# many.
_TRIM: Final = 100
# Of more topics it is not remembered how many they had.
_TOPICS: Final = 1000


class _Unstored:
    """A message that waits to be stored.

    :ivar left: attempts that are left.
    :ivar due: when the next one is made.
    :ivar event: if there is one, it is set when the message is stored, or given up because of the error.
    """

    __slots__ = ("body", "due", "error", "event", "left", "pause", "topic", "waits")

    def __init__(self, topic: Topic, body: bytes, attempts: float) -> None:
        self.topic = topic
        self.body = body
        self.left = attempts
        self.due = -inf
        self.pause = _AGAIN[0]
        self.event: Event | None = None
        self.error: Exception | None = None
        self.waits = True

    def failed(self, error: Exception, now: float) -> None:
        self.left -= 1
        self.due = now + self.pause
        self.pause = min(2 * self.pause, _AGAIN[1])
        if self.left < 1:
            self.end(error)

    def end(self, error: Exception | None = None) -> None:
        self.error = error
        self.waits = False
        if self.event is not None:
            self.event.set()


class Notifier:
    """:ivar counts: of notifications."""

    def __init__(self, loop: Loop, settings: Settings) -> None:
        """The thread begins with the first message."""
        self.counts: Counter[str] = Counter()
        self._loop = loop
        self._settings = settings
        self._new: deque[_Unstored] = deque()
        self._wake: Wake | None = None
        # Whether the thread waits to be woken.
        self._sleeping = False
        self._closed = False
        # For whoever has this lock: the store, whether it fails, how many messages each topic had since it was trimmed, and the
        # topics that had many.
        self._lock = loop.model.native_lock()
        self._store: Store | None = None
        self._failing = False
        self._since: dict[Topic, int] = {}
        self._full: set[Topic] = set()

    # For all threads.

    def send(self, topic: Topic, value: object, retry: int | None) -> None:
        """Store a notification, and wait until it is safe.

        :param value: anything that can be serialised.
        :param retry: None or -1: as long as it takes; N: N + 1 attempts.
        :raises StoreError: all attempts have failed.
        :raises Unserializable: the value cannot be stored.
        :raises MessageTooLarge: it is larger than ``max_message_bytes``.
        :raises OutOfDescriptors: there is none left for the thread.
        :raises TransportClosed: the transport is being cleaned up.
        """
        model, codec = self._loop.model, self._settings.codec
        body = wire.encode_stored(wire.encode_body(value, codec, model.pause), codec)
        most = self._settings.limits.message_bytes
        if len(body) > most:
            raise MessageTooLarge(f"The notification to {topic.name} has {len(body)} bytes; max_message_bytes allows {most}.")
        message = _Unstored(topic, body, inf if retry is None or retry < 0 else retry + 1)
        if self._store is not None and not self._new:
            self._attempt_at_once(message)
        if message.waits:
            self._pass_on(message)
        elif self._full:
            self._rouse()
        if message.error is not None:
            raise message.error

    def close(self) -> None:
        """What is not stored now never is."""
        self._closed = True
        if self._wake is None:
            self._refuse(_taken_out(self._new))
        else:
            self._wake()

    def _attempt_at_once(self, message: _Unstored) -> None:
        """In the thread that sends it, if nobody else stores or waits: passing it on takes as long as storing it."""
        if not self._lock.acquire(False):
            return
        try:
            if self._store is None or self._failing:
                return
            with contextlib.closing(self._store.append_at_once(message.topic, message.body)) as steps:
                for fd, seconds in steps:
                    self._loop.model.wait_readable(fd, seconds)
        except Busy:
            return
        except Exception as error:
            self._failed([message], error, time.monotonic())
        else:
            self._stored([message])
        finally:
            self._lock.release()

    def _pass_on(self, message: _Unstored) -> None:
        """To the native thread."""
        event = message.event = self._loop.model.Event()
        if self._wake is None:
            self._begin()
        self._new.append(message)
        if self._closed:
            self._refuse(_taken_out(self._new))
        else:
            self._rouse()
        try:
            event.wait()
        except BaseException:  # this thread was killed, or waits no longer: who sent it takes it for not sent
            message.waits = False
            raise

    def _rouse(self) -> None:
        if self._sleeping and self._wake is not None:
            self._sleeping = False
            self._wake()

    def _begin(self) -> None:
        with self._loop.model.LOCK:
            if self._wake is None:
                reason = shortage()
                if reason:
                    raise OutOfDescriptors(f"No notification can be sent: {reason}.")
                load(self._settings.directory)
                self._wake = Wake()
                self._loop.model.start_native(self._work)

    # For the native thread, and whoever has the lock. They must not log: a handler's lock may be a green one, of another hub.

    def _work(self) -> None:
        assert self._wake is not None
        waiting: list[_Unstored] = []
        poll = self._loop.model.native_poll()
        poll.register(self._wake.fd, select.POLLIN)
        while True:
            with self._lock:
                closed, now = self._closed, time.monotonic()
                waiting = [message for message in (*waiting, *_taken_out(self._new)) if message.waits]
                batch = _batch(waiting, inf if closed else now)
                if batch:
                    self._attempt(batch, now)
                    waiting = [message for message in waiting if message.waits]
                if self._full:
                    self._trim()
            if closed:
                break
            if batch:
                continue
            self._sleeping = True
            if not self._new and not self._full and not self._closed:
                due = min((message.due for message in waiting), default=inf)
                poll.poll(None if due == inf else max(0.0, due - time.monotonic()) * 1000)
            self._sleeping = False
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake.fd)
        self._refuse(waiting)
        self._refuse(_taken_out(self._new))
        with self._lock:
            if self._store is not None:
                self._store.close()
                self._store = None

    def _attempt(self, batch: list[_Unstored], now: float) -> None:
        try:
            self._store = store = self._store or self._open()
            store.append([(message.topic, message.body) for message in batch])
        except Exception as error:
            self._failed(batch, error, now)
        else:
            self._stored(batch)

    def _open(self) -> Store:
        reason = shortage()  # libraries do not say that, or end the process
        if reason:
            raise StoreError(f"The notifications {self._settings.store_place} cannot be stored: {reason}.")
        return open_store(self._settings)

    def _stored(self, batch: list[_Unstored]) -> None:
        self.counts["notifications stored"] += len(batch)
        for message in batch:
            self._since[message.topic] = since = self._since.get(message.topic, _TRIM) + 1
            if since >= _TRIM:
                self._full.add(message.topic)
            message.end()
        if self._failing:
            self._failing = False
            self._log(logging.WARNING, "Notifications %s can be stored again.", self._settings.store_place)

    def _failed(self, batch: list[_Unstored], reason: Exception, now: float) -> None:
        error = reason if isinstance(reason, StoreError) else defect(reason)
        for message in batch:
            message.failed(error, now)
        given_up = sum(not message.waits for message in batch)
        self.counts["notifications that could not be stored"] += given_up
        if not self._failing and given_up < len(batch):
            self._failing = True
            self._log(logging.WARNING, "%s Until then, what sends notifications waits.", error)

    def _trim(self) -> None:
        """Look whether something is to go, of topics that had many messages since."""
        topics, self._full = self._full, set()
        if len(self._since) > _TOPICS:
            self._since.clear()
        self._since.update(dict.fromkeys(topics, 0))
        if self._store is not None:
            with contextlib.suppress(StoreError):  # whoever stores the next one is told
                log_dropped(self._loop, self.counts, self._store.trim(topics))

    def _refuse(self, messages: Iterable[_Unstored]) -> None:
        for message in messages:
            if message.waits:
                message.end(
                    TransportClosed(f"The notification to {message.topic.name} was not stored: the transport was closed.")
                )

    def _log(self, level: int, text: str, *values: object) -> None:
        with contextlib.suppress(TransportClosed):
            self._loop.post(LOG.log, level, text, *values)


def defect(error: Exception) -> StoreError:
    return StoreError(f"The store of notifications failed because of a defect: {error!r}")


def log_dropped(loop: Loop, counts: Counter[str], dropped: Mapping[Topic, int]) -> None:
    """Have the loop tell of messages that went because of the bounds."""
    for topic, count in dropped.items():
        counts["notifications dropped"] += count
        with contextlib.suppress(TransportClosed):
            loop.post(_log_dropped, count, *topic)


def _log_dropped(*values: object) -> None:
    text = (
        "dropped %d notifications of exchange '%s' to %s that were not processed, but older than notification_age or too many "
    )
    LOG.error(text + "for notification_messages; green-zmq notifications tells who lags behind", *values)


def _taken_out(messages: deque[_Unstored]) -> Iterator[_Unstored]:
    """All, each of which is for whoever takes it out first: at the end several threads do."""
    with contextlib.suppress(IndexError):
        while True:
            yield messages.popleft()


def _batch(waiting: Iterable[_Unstored], now: float) -> list[_Unstored]:
    """What is stored next, of those whose time has come."""
    batch: list[_Unstored] = []
    size = 0
    for message in waiting:
        if message.due <= now:
            size += len(message.body)
            if batch and (size > _MOST_BYTES or len(batch) == _MOST):
                break
            batch.append(message)
    return batch
