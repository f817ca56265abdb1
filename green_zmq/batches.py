# SPDX-License-Identifier: Apache-2.0
"""Messages into batches, as oslo.messaging's servers want them. Pure."""

from __future__ import annotations

from collections import deque
from math import inf
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Batches(Generic[_T]):
    """
    :ivar waiting: what is in no batch yet, the oldest first.
    :ivar due: when the next batch is handed over though it is not full.
    """

    def __init__(self, size: int, timeout: float | None) -> None:
        """
        :param size: of a full batch.
        :param timeout: seconds that the first of a batch waits for others; None: as long as it takes.
        """
        self.size = size
        self.waiting: deque[_T] = deque()
        self.due = inf
        self._timeout = timeout

    def add(self, item: _T, now: float) -> None:
        self.waiting.append(item)
        if self.size > 1 and self._timeout is not None and self.due == inf:
            self.due = now + self._timeout

    def next(self, now: float) -> list[_T]:
        """The next batch; empty if there is none yet."""
        waiting, size = self.waiting, self.size
        if not waiting or (len(waiting) < size and now < self.due):
            return []
        batch = [waiting.popleft() for _ in range(min(size, len(waiting)))]
        if size > 1:
            self.due = now + self._timeout if waiting and self._timeout is not None else inf
        return batch
