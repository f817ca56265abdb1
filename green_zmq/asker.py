# SPDX-License-Identifier: Apache-2.0
"""Asks the directory, which may block, in a native thread; what it answers is posted to the loop."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from posix import close  # gevent's in os leaves it to a hub, which the native thread does not run
from typing import Any

from green_zmq.config import Settings
from green_zmq.descriptors import shortage
from green_zmq.directory import Directory, open_directory
from green_zmq.errors import DirectoryError, TransportClosed
from green_zmq.loop import Loop

LOG = logging.getLogger(__name__)

Then = Callable[[Any], None]


def _ignore(_: object) -> None: ...


def _closing() -> DirectoryError:
    return DirectoryError("The transport is being closed.")


class Asker:
    """
    :ivar failing: whether the directory failed when it was last asked, or waited for.
    :ivar opened: called with the directory once it is open, for what does not block.
    """

    def __init__(self, loop: Loop, settings: Settings) -> None:
        """The thread begins with the first question."""
        self.failing = False
        self.opened: Callable[[Directory], None] = _ignore
        self._loop = loop
        self._settings = settings
        self._jobs: deque[Callable[[Directory], Any] | None] = deque()
        # Who waits for what the native thread has not answered yet, the oldest job first.
        self._unanswered: deque[Then] = deque()
        # Tells the native thread, once it runs, that there is a job. Each of the two threads closes its own descriptor of it.
        self._wake: int | None = None
        self._ended = False

    def ask(self, job: Callable[[Directory], Any], then: Then) -> None:
        """Have ``job`` called with the directory, in its thread, and ``then`` with its value or DirectoryError, in the loop."""
        if self._ended:
            then(_closing())
            return
        if self._wake is None:
            ours = -1
            try:
                ours = os.eventfd(0, os.EFD_CLOEXEC)
                theirs = os.dup(ours)
            except OSError as error:
                if ours >= 0:
                    close(ours)
                then(DirectoryError(f"The directory {self._settings.directory_place} cannot be asked: {shortage() or error}."))
                return
            self._wake = ours
            self._loop.model.start_native(partial(self._work, theirs))
        self._unanswered.append(then)
        self._put(job)

    def end(self) -> None:
        """End the thread when what was asked is answered."""
        if not self._ended:
            self._ended = True
            self._put(None)

    def close(self) -> None:
        """Wait for no answer any more: a directory that does not answer is not to hold up who closes a transport."""
        self.end()
        while self._unanswered:
            self._unanswered.popleft()(_closing())
        if self._wake is not None:
            close(self._wake)
            self._wake = None

    def _put(self, job: Callable[[Directory], Any] | None) -> None:
        self._jobs.append(job)
        if self._wake is not None:
            os.eventfd_write(self._wake, 1)

    def _work(self, wake: int) -> None:
        """The native thread. It must not log: a handler's lock may be a green one, of another thread's hub."""
        directory: Directory | None = None
        cut_off = False
        with contextlib.suppress(TransportClosed):  # the loop did not wait for the last answers
            while True:
                if not self._jobs:
                    error = self._wait(directory, wake)
                    if error is not None or (cut_off and not self._jobs):  # else it was woken by a job, not by its mending
                        self._loop.post(self._heard, error)
                        cut_off = error is not None
                    continue
                job = self._jobs.popleft()
                if job is None:
                    break
                answer: Any
                try:
                    if directory is None:
                        self._see_to_descriptors()
                        directory = open_directory(self._settings)
                        self._loop.post(self.opened, directory)
                    answer = job(directory)
                except DirectoryError as error:
                    answer = error
                except Exception as error:
                    answer = DirectoryError(f"The directory failed because of a defect: {error!r}")
                self._loop.post(self._answered, answer)
        if directory is not None:
            directory.close()
        close(wake)

    def _see_to_descriptors(self) -> None:
        """:raises DirectoryError: there are too few: libraries do not say that, or end the process."""
        reason = shortage()
        if reason:
            raise DirectoryError(f"The directory {self._settings.directory_place} cannot be opened: {reason}.")

    @staticmethod
    def _wait(directory: Directory | None, wake: int) -> DirectoryError | None:
        """For the next job, or news of the directory."""
        try:
            if directory is None:
                os.eventfd_read(wake)
            else:
                directory.wait(wake)
        except DirectoryError as error:
            return error
        except Exception as error:
            return DirectoryError(f"The directory failed because of a defect: {error!r}")
        return None

    def _answered(self, answer: Any) -> None:
        if self._unanswered:  # else all were told that nobody waits any more
            self._heard(answer)
            self._unanswered.popleft()(answer)

    def _heard(self, answer: Any) -> None:
        failing = isinstance(answer, DirectoryError)
        if failing != self.failing:
            self.failing = failing
            if failing:
                LOG.warning("%s Servers that are known already go on being used.", answer)
            else:
                LOG.warning("The directory %s answers again.", self._settings.directory_place)
