# SPDX-License-Identifier: Apache-2.0
"""SQLite files that all processes of a machine share."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Final

# How long what writes waits for those of other processes, seconds.
PATIENCE: Final = 5.0
# An attempt is made again after this time at first, and after this time at last, seconds. SQLite's own waiting begins with a
# millisecond, in which others could write twenty times.
_NAPS: Final = (0.00005, 0.002)


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
def transaction(database: sqlite3.Connection, sleep: Callable[[float], None]) -> Iterator[None]:
    """All of what is done, or nothing.

    :raises sqlite3.OperationalError: others have written for all of :data:`PATIENCE`.
    """
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
