# SPDX-License-Identifier: Apache-2.0
"""The embedded directory of one machine: ``zmq://``. An SQLite file (WAL) that all processes of a user share.

Times are of the monotonic clock, which all processes of a host share from one boot to the next; records of an earlier
boot are dropped. A process whose pid is gone is dead at once; where pids cannot be compared (containers that share the
file), its record expires. One that only stands still is found by nobody once its record has expired, but is not gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from green_zmq import executors
from green_zmq.config import Settings
from green_zmq.database import PATIENCE, NewerSchema, Use, connect, transaction
from green_zmq.directory.base import Listing, Stale
from green_zmq.directory.processes import boot_id, known_to_run, process_id, runs
from green_zmq.errors import DirectoryError
from green_zmq.routing import Entry, Node, Topic

_SCHEMA: Final = """
create table if not exists nodes (
    instance blob primary key,
    record text not null,   -- a map that can grow
    boot text not null,
    process text not null,  -- pid namespace, pid and start time
    expires real not null
) without rowid;
create table if not exists listeners (
    exchange text not null,
    topic text not null,
    server text not null,
    instance blob not null references nodes on delete cascade,
    since real not null,
    primary key (exchange, topic, server, instance)
) without rowid;
create index if not exists listeners_of_a_node on listeners (instance);
"""
# Of the schema, kept in the file as its user_version.
_VERSION: Final = 1
# For each connection. Nothing in the file outlives the machine, so the disk need not be waited for.
_SETUP: Final = "pragma foreign_keys = on; pragma synchronous = off;"

_LIVES: Final = "select instance, process, boot, expires from nodes"
_SELECT: Final = "select n.instance, n.record, n.process, l.{} from nodes n join listeners l using (instance) where {}"


class SqliteDirectory:
    def __init__(self, path: Path, expire: float, model_name: str) -> None:
        self._path = path
        self._expire = expire
        model = executors.load(model_name)
        self._sleep = model.native_sleep
        # The latter is for the one connection that never waits, and whose user must not wait for the others.
        self._use, self._watching = Use(model.native_lock()), Use(model.native_owned_lock())
        self._followed = -expire
        with self._errors("opened"):
            self._boot = boot_id()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.parent.name.startswith("green_zmq") and path.parent.stat().st_uid not in (os.getuid(), 0):
                raise DirectoryError(
                    f"The folder {path.parent} belongs to another user; set directory_path to a file of yours."
                )
            self._open()
        self._seen: Any = None

    def _open(self) -> None:
        self._database = self._connect()
        # Its data_version changes when another connection writes, also the one above. It must never wait.
        with self._watching:
            self._watch = self._connect(patience=0)
            self._watching.opened(self._watch)
        self._use.opened(self._database)
        self._file = self._path.stat().st_ino

    def _connect(self, patience: float = PATIENCE) -> sqlite3.Connection:
        try:
            return connect(str(self._path), _SCHEMA, _VERSION, self._sleep, setup=_SETUP, patience=patience)
        except NewerSchema as error:
            raise DirectoryError(
                f"The directory {self._path} was made by a newer release of green_zmq (schema {error.version}, ours "
                f"{_VERSION}); upgrade this one, or set directory_path to another file."
            ) from None

    def announce(self, node: Node, listeners: Collection[tuple[Topic, str]]) -> None:
        now = time.monotonic()
        record = json.dumps({k: v for k, v in node._asdict().items() if k != "instance"})
        with self._errors("written"), self._writing() as database:
            old = database.execute(f"{_LIVES} where expires <= ? or boot <> ?", (now, self._boot)).fetchall()
            dead = [(instance,) for instance, *life in old if self._is_dead(life, now)]
            database.executemany("delete from nodes where instance = ?", dead)
            database.execute(
                "insert into nodes values (?, ?, ?, ?, ?) on conflict do update set expires = excluded.expires",
                (node.instance, record, self._boot, process_id(node.pid), now + self._expire),
            )
            wanted = {(topic.exchange, topic.name, server) for topic, server in listeners}
            stored = set(database.execute("select exchange, topic, server from listeners where instance = ?", (node.instance,)))
            database.executemany(
                "delete from listeners where exchange = ? and topic = ? and server = ? and instance = ?",
                [(*row, node.instance) for row in stored - wanted],
            )
            database.executemany(
                "insert into listeners values (?, ?, ?, ?, ?)", [(*row, node.instance, now) for row in wanted - stored]
            )

    def withdraw(self, instance: bytes) -> bool:
        with self._errors("written"):
            self._follow()
            return self._database.execute("delete from nodes where instance = ?", (instance,)).rowcount > 0

    def look_up(self, topic: Topic) -> list[Entry]:
        with self._errors("read"):
            self._follow()
            rows = self._database.execute(
                _SELECT.format("server", "l.exchange = ? and l.topic = ? and n.boot = ? and n.expires > ?"),
                (*topic, self._boot, time.monotonic()),
            ).fetchall()
            return [Entry(server, self._node(i, record)) for i, record, process, server in rows if runs(process)]

    def forget(self, topic: Topic) -> None: ...

    def is_alive(self, node: Node) -> bool:
        with self._errors("read"):
            self._follow()
            row = self._database.execute(f"{_LIVES} where instance = ?", (node.instance,)).fetchone()
        if row is None:
            # A file that was made anew is filled within a period: until then only a dead process is known to be gone.
            return self._followed + self._expire > time.monotonic() and bool(process_id(node.pid))
        return not self._is_dead(row[1:], time.monotonic())

    def listings(self) -> Iterable[Listing]:
        now = time.monotonic()
        with self._errors("read"):
            self._follow()
            rows = self._database.execute(
                _SELECT.format("exchange, l.topic, l.server, l.since", "n.boot = ? and n.expires > ?"), (self._boot, now)
            ).fetchall()
            return [
                Listing(exchange, topic, server, self._node(i, record), now - since)
                for i, record, process, exchange, topic, server, since in rows
                if runs(process)
            ]

    def sweep(self, *, dry_run: bool = False) -> list[Stale]:
        now = time.monotonic()
        with self._errors("written"):
            self._follow()
            database = self._database
            rows = database.execute(_LIVES).fetchall()
            dead = [(i,) for i, process, boot, expires in rows if boot != self._boot or expires <= now or not runs(process)]
            if not dead:
                return []
            with transaction(database, self._sleep):
                query = "select exchange, topic, server, instance from listeners where instance = ?"
                stale = [Stale(*row) for instance in dead for row in database.execute(query, instance)]
                if not dry_run:
                    database.executemany("delete from nodes where instance = ?", dead)
        return stale

    def changes(self) -> Collection[Topic] | None:
        try:
            if self._path.stat().st_ino != self._file:
                return None
            version = self._version()
        except (sqlite3.Error, OSError):
            return None  # whoever looks up now gets the error
        seen, self._seen = self._seen, version
        return () if seen == version else None

    def _version(self) -> Any:
        """A native thread may be ended by an exception at any step of it."""
        lock = self._watching.lock
        try:
            lock.acquire()
            version = self._watch.execute("pragma data_version").fetchone()
            lock.release()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # it was not taken yet, or is given back already
                lock.release()
            raise
        return version

    def wait(self, wake: int) -> None:
        os.eventfd_read(wake)

    def close(self) -> None:
        with self._use, self._watching:
            self._database.close()
            self._watch.close()

    def _is_dead(self, life: Sequence[Any], now: float) -> bool:
        process, boot, expires = life
        return boot != self._boot or not (runs(process) if expires > now else known_to_run(process))

    def _follow(self) -> None:
        """If somebody removed the file, go on with the one that is there now, as whoever starts does."""
        same = False
        with contextlib.suppress(FileNotFoundError):
            same = self._path.stat().st_ino == self._file
        if same and not self._use.forked:
            return
        old, watch = self._database, self._watch
        if not same:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._followed = time.monotonic()
        self._open()
        old.close()
        watch.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        self._follow()
        with transaction(self._database, self._sleep):
            yield self._database

    @staticmethod
    def _node(instance: bytes, record: str) -> Node:
        known = {k: v for k, v in json.loads(record).items() if k in Node._fields}
        return Node(instance=instance, **known)

    @contextlib.contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        try:
            with self._use:
                yield
        except (sqlite3.Error, OSError, ValueError, TypeError, AttributeError) as error:
            if (
                "not a database" in str(error)
                or "malformed" in str(error)
                or isinstance(error, ValueError | TypeError | AttributeError)
            ):
                advice = "it is damaged or no directory of ours: remove it, or set directory_path to another file"
            else:
                advice = "check its folder's permissions and space, or set directory_path to a file that can be written"
            raise DirectoryError(f"The directory {self._path} cannot be {done} ({error}); {advice}.") from error


def open_directory(settings: Settings) -> SqliteDirectory:
    return SqliteDirectory(settings.directory_path, settings.expire, settings.model)
