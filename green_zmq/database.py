# SPDX-License-Identifier: Apache-2.0
"""SQLite files that all processes of a machine share."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import weakref
from collections.abc import Callable, Iterator
from threading import get_ident
from time import monotonic
from types import TracebackType
from typing import Final

from green_zmq.executors.base import Lock, OwnedLock

# How long what writes waits for those of other processes, seconds.
PATIENCE: Final = 5.0
# An attempt is made again after this time at first, and after this time at last, seconds. SQLite's own waiting begins with a
# millisecond, in which others could write twenty times.
_NAPS: Final = (0.00005, 0.002)


class Use:
    """Is entered by whoever uses SQLite. A fork waits until nobody does, and closes the files.

    SQLite remembers what its process has locked, of each file, and a forked child would rely on that: it would wait for ever
    for what a thread of its parent had locked just then, or lock nothing, and write to files that others take for abandoned
    (https://sqlite.org/howtocorrupt.html, 2.6).

    :ivar files: the connections that a fork closes.
    :ivar forked: whether it has; whoever uses them next must open them again.
    """

    def __init__(self, lock: Lock | OwnedLock) -> None:
        self.files: list[sqlite3.Connection] = []
        self.forked = False
        self.lock = lock
        key = id(self)
        _uses[key] = weakref.ref(self, lambda _: _uses.pop(key, None))

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: TracebackType | BaseException | type[BaseException] | None) -> None:
        self.lock.release()

    def opened(self, *files: sqlite3.Connection) -> None:
        self.files = list(files)
        self.forked = False

    def close(self) -> None:
        """Its lock must be held."""
        self.forked = True
        while self.files:
            with contextlib.suppress(sqlite3.Error):
                self.files.pop().close()


_uses: dict[int, weakref.ref[Use]] = {}
# What those have entered who fork at this moment.
_held: dict[int, list[Use]] = {}


def _before_fork() -> None:
    held = _held[get_ident()] = []
    # While one is waited for, others may begin.
    while more := [use for ref in list(_uses.values()) if (use := ref()) is not None and use not in held]:
        for use in more:
            use.lock.acquire()
            held.append(use)
            use.close()


def _after_fork() -> None:
    for use in _held.pop(get_ident(), ()):
        use.lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


class NewerSchema(Exception):
    """The file was made by a newer release.

    :ivar version: of its schema.
    """

    def __init__(self, version: int) -> None:
        super().__init__(version)
        self.version = version


def connect(
    place: str, schema: str, version: int, sleep: Callable[[float], None], *, setup: str, patience: float = 0
) -> sqlite3.Connection:
    """A connection that commits by itself.

    :param place: the path or, if it begins with ``file:``, the URI of a file; it is made if it is not there.
    :param schema: what makes its tables, of that version.
    :param setup: what each connection is told first.
    :param patience: how long SQLite itself waits for other processes, seconds; :func:`transaction` does in any case.
    :raises NewerSchema: a newer release has made it.
    :raises sqlite3.Error: it cannot be opened.
    """
    uri = place.startswith("file:")
    database = sqlite3.connect(place, timeout=patience, isolation_level=None, check_same_thread=False, uri=uri)
    try:
        # Of processes that open a new file at once, all but one are told that it is locked.
        patiently(lambda: database.execute("pragma journal_mode = wal"), sleep)
        database.executescript(setup)
        (found,) = patiently(lambda: database.execute("pragma user_version").fetchone(), sleep)
        if found > version:
            raise NewerSchema(found)
        if found < version:
            with transaction(database, sleep):
                if database.execute("pragma user_version").fetchone() == (0,):  # else another process was faster
                    for command in schema.split(";\n"):
                        database.execute(command)
                    database.execute(f"pragma user_version = {version}")
    except BaseException:
        database.close()
        raise
    return database


@contextlib.contextmanager
def transaction(database: sqlite3.Connection, sleep: Callable[[float], None] | None) -> Iterator[None]:
    """All of what is done, or nothing.

    :param sleep: None: others are not waited for.
    :raises sqlite3.OperationalError: others write, and have for all of :data:`PATIENCE`.
    """
    if sleep is None:
        database.execute("begin immediate")
    else:
        patiently(lambda: database.execute("begin immediate"), sleep)
    try:
        yield
    except BaseException:
        database.execute("rollback")
        raise
    database.execute("commit")


def patiently(do: Callable[[], sqlite3.Cursor], sleep: Callable[[float], None]) -> sqlite3.Cursor:
    """Do something as soon as others let us."""
    give_up = monotonic() + PATIENCE
    nap, longest = _NAPS
    while True:
        try:
            return do()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or monotonic() > give_up:
                raise
        sleep(nap)
        nap = min(2 * nap, longest)
