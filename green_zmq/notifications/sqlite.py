# SPDX-License-Identifier: Apache-2.0
"""The store of one machine: an SQLite file (WAL) that all processes of a user share; in memory, the threads of one process.

What was stored survives the end of any process at once, and that of the machine from the next checkpoint on.

New messages are given to the consumers of a pool in turn, by whichever of them looks first: each has a row in ``taken`` that
says whose it is. What a consumer has no room for is left to the others after a moment. What one gives back after it has tried
it is the next one's turn: else it, which is awake, would always be the first to take it again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import sqlite3
import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from math import inf
from posix import close, read  # those in os may wait for a hub, which native threads do not run
from typing import Final

from green_zmq import executors
from green_zmq.config import Settings
from green_zmq.database import NewerSchema, Use, connect, transaction
from green_zmq.descriptors import Wake
from green_zmq.directory.processes import boot_id, process_id, runs
from green_zmq.errors import StoreError
from green_zmq.notifications.base import Busy, Dead, Pool, State, Taken
from green_zmq.routing import Topic

_SCHEMA: Final = """
create table topics (
    id integer primary key,
    exchange text not null,
    name text not null,
    last integer not null default 0,  -- the number of its latest message
    dropped integer not null default 0,
    unique (exchange, name)
);
create table messages (
    topic integer not null references topics,
    number integer not null,
    stored real not null,  -- seconds since the epoch
    only integer,  -- the pool that it is for, if it was put back for one
    body blob not null,
    primary key (topic, number)
) without rowid;
create table pools (
    id integer primary key,
    topic integer not null references topics,
    name text not null,
    last integer not null,  -- the number of the latest message that was given to one of its consumers
    turn integer not null default 0,  -- whose turn it is
    unique (topic, name)
);
create table consumers (
    pool integer not null references pools,
    consumer blob not null,
    boot text not null,
    process text not null,  -- pid namespace, pid and start time
    expires real not null,  -- by the monotonic clock, which all processes share from one boot to the next
    primary key (consumer, pool)
) without rowid;
create index consumers_of on consumers (pool, consumer);
create table taken (
    pool integer not null references pools,
    number integer not null,
    consumer blob,  -- whose it is; null: whose first comes
    held integer not null,  -- whether it has been fetched
    since real not null,  -- by the monotonic clock
    tries integer not null,
    primary key (pool, number)
) without rowid;
create index taken_by on taken (consumer);
create index not_fetched on taken (pool, number) where not held;
create table dead (
    id integer primary key autoincrement,
    exchange text not null,
    name text not null,
    pool text not null,
    died real not null,  -- seconds since the epoch
    tries integer not null,
    body blob not null
);
"""
_ANY: Final = """
select exists (select 1 from consumers c join pools p on p.id = c.pool join topics t on t.id = p.topic
               where c.consumer = :me and t.last > p.last)
    or exists (select 1 from consumers c join taken t using (pool) where c.consumer = :me and not t.held)
    or not exists (select 1 from consumers where consumer = :me)
"""
# What is in the log is written back to the file itself, which waits for the disk, when it has so many pages of 4 KiB.
_PAGES: Final = 8000
_SETUP: Final = f"pragma synchronous = normal; pragma wal_autocheckpoint = {_PAGES};"
# Of the schema, kept in the file as its user_version.
_VERSION: Final = 1
# Within this time, in seconds, a message is fetched by the consumer whose turn it is; then by any.
_TURN: Final = 0.1
# Of the time until another consumer has what a dead one had: how often each says that it lives and looks whether the others do,
# and how old their word may be.
_RENEW: Final = 0.2
_EXPIRE: Final = 0.6
# Where the kernel does not tell of news, a consumer looks so often, seconds.
_LOOK: Final = 0.04
# Bytes of news that are read, and forgotten, at once.
_NEWS: Final = 1 << 14

# inotify(7). The packages for it need what eventlet and gevent take out of the module select.
_libc = ctypes.CDLL(None, use_errno=True)
_IN_MODIFY, _IN_ATTRIB = 0x2, 0x4


class _Memory:
    """What the stores in memory of a process share: it lasts for as long as the process does.

    :ivar writes: how many there were.
    :ivar news: of those that wait for news, by their descriptors.
    """

    def __init__(self, model_name: str) -> None:
        model = executors.load(model_name)
        self.pid = os.getpid()
        self.use = Use(model.native_lock())
        self.database = connect(":memory:", _SCHEMA, _VERSION, model.native_sleep, setup=_SETUP)
        self.writes = 0
        self.news: dict[int, Wake] = {}

    @staticmethod
    def of_process(model: str) -> _Memory:
        global _memory
        with executors.load(model).LOCK:
            if _memory is None or _memory.pid != os.getpid():  # a parent's messages are not its child's
                _memory = _Memory(model)
            return _memory


_memory: _Memory | None = None


class SqliteStore:
    def __init__(self, settings: Settings) -> None:
        """:raises StoreError: it cannot be opened."""
        self.bounds = settings.bounds
        self._path = None if settings.directory == "memory" else settings.notification_path
        self._place = settings.store_place
        model = executors.load(settings.model)
        self._sleep, self.poll = model.native_sleep, model.native_poll
        self._memory = _Memory.of_process(settings.model) if self._path is None else None
        self._use = Use(model.native_lock()) if self._memory is None else self._memory.use
        self._writes = 0
        self._writes_back = True
        self.opened = 0
        with self._errors("opened"), self._use:
            self.boot = boot_id()
            self._open()

    def append(self, messages: Sequence[tuple[Topic, bytes]]) -> None:
        now = time.time()
        with self.writing():
            for topic, body in messages:
                self._append(topic, now, None, body)

    def append_at_once(self, topic: Topic, body: bytes) -> Generator[tuple[int, float]]:
        if not self._use.lock.acquire(False):
            raise Busy
        try:
            with self._errors("used"):
                if self._is_elsewhere():
                    raise Busy
                self._checkpoints(False)
                try:
                    with transaction(self._database, None):
                        self._append(topic, time.time(), None, body)
                except sqlite3.OperationalError as error:
                    if "locked" in str(error):
                        raise Busy from None
                    raise
            self._count()
        finally:
            self._use.lock.release()
        self._tell()
        yield from ()

    def trim(self, topics: Collection[Topic]) -> Mapping[Topic, int]:
        now = time.time()
        with self.writing() as database:
            self._checkpoints(True)
            # If nothing else is written, the log is not looked at.
            database.execute(f"pragma user_version = {_VERSION}")
            dropped = {topic: self._trim(topic, now) for topic in topics}
            database.execute("delete from dead where died <= ?", (now - self.bounds.age,))
            database.execute("delete from dead where id <= (select max(id) from dead) - ?", (self.bounds.messages,))
        return {topic: count for topic, count in dropped.items() if count}

    def consume(self, topics: Collection[Topic], pool: str) -> SqliteConsumer:
        return SqliteConsumer(self, topics, pool)

    def overview(self) -> Sequence[State]:
        with self.writing() as database:
            self.bury(time.monotonic())
            topics = database.execute("select id, exchange, name, dropped from topics order by exchange, name").fetchall()
            return [self._state(id, Topic(exchange, name), dropped) for id, exchange, name, dropped in topics]

    def dead(self) -> Sequence[Dead]:
        now = time.time()
        with self.writing() as database:
            rows = database.execute("select id, exchange, name, pool, died, tries, body from dead order by id").fetchall()
        return [
            Dead(str(id), Topic(exchange, name), pool, max(0.0, now - died), tries, body)
            for id, exchange, name, pool, died, tries, body in rows
        ]

    def put_back(self, names: Collection[str]) -> int:
        count, now = 0, time.time()
        with self.writing() as database:
            for name in names:
                row = database.execute("select exchange, name, pool, body from dead where id = ?", (name,)).fetchone()
                if row is not None:
                    topic = Topic(*row[:2])
                    self._append(topic, now, self.pool(topic, row[2]), row[3])
                    count += database.execute("delete from dead where id = ?", (name,)).rowcount
        return count

    def since(self, topic: Topic, after: str | None) -> tuple[str, Sequence[bytes]]:
        with self.writing() as database:
            row = database.execute("select id, last from topics where exchange = ? and name = ?", topic).fetchone()
            if row is None:
                return after or "0", ()
            id, last = row
            if after is None:
                return str(last), ()
            rows = database.execute(
                "select body from messages where topic = ? and number > ? and only is null order by number", (id, int(after))
            ).fetchall()
            return str(last), [body for (body,) in rows]

    def close(self) -> None:
        if self._memory is None:
            with self._use:
                self._database.close()

    # For the consumer.

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction."""
        with self._errors("used"), self._use:
            self._follow()
            with transaction(self._database, self._sleep):
                yield self._database
            self._count()
        self._tell()

    def pool(self, topic: Topic, name: str) -> int:
        """Its id; it begins here if it is new."""
        id, last = self._topic(topic)
        database = self._database
        database.execute("insert or ignore into pools (topic, name, last) values (?, ?, ?)", (id, name, last))
        (pool,) = database.execute("select id from pools where topic = ? and name = ?", (id, name)).fetchone()
        return int(pool)

    def bury(self, now: float, but: bytes = b"") -> None:
        """What dead consumers had is for whoever comes first.

        :param but: who is alive, however long it has not said so.
        """
        database = self._database
        rows = database.execute("select distinct consumer, boot, process, expires from consumers").fetchall()
        dead = [
            (consumer,)
            for consumer, boot, process, expires in rows
            if consumer != but and (boot != self.boot or expires <= now or not runs(process))
        ]
        database.executemany("update taken set consumer = null, held = 0 where consumer = ?", dead)
        database.executemany("delete from consumers where consumer = ?", dead)

    # How.

    def _append(self, topic: Topic, now: float, pool: int | None, body: bytes) -> None:
        id, last = self._topic(topic)
        self._database.execute("update topics set last = ? where id = ?", (last + 1, id))
        self._database.execute("insert into messages values (?, ?, ?, ?, ?)", (id, last + 1, now, pool, body))

    def _topic(self, topic: Topic) -> tuple[int, int]:
        """Its id, and the number of its last message; it begins here if it is new, and its default pool with it."""
        database = self._database
        row = database.execute("select id, last from topics where exchange = ? and name = ?", topic).fetchone()
        if row is None:
            id = database.execute("insert into topics (exchange, name) values (?, ?)", topic).lastrowid
            database.execute("insert into pools (topic, name, last) values (?, '', 0)", (id,))
            return int(id or 0), 0
        return row[0], row[1]

    def _trim(self, topic: Topic, now: float) -> int:
        database, bounds = self._database, self.bounds
        id, last = self._topic(topic)
        database.execute(
            "delete from messages where topic = :id and number <= (select min(last) from pools where topic = :id) "
            "and not exists (select 1 from taken t join pools p on p.id = t.pool "
            "where p.topic = :id and t.number = messages.number)",
            {"id": id},
        )
        (young,) = database.execute(
            "select min(number) from messages where topic = ? and stored > ?", (id, now - bounds.age)
        ).fetchone()
        cut = max(last - bounds.messages, last if young is None else young - 1)
        count = database.execute("delete from messages where topic = ? and number <= ?", (id, cut)).rowcount
        if count:
            database.execute("update topics set dropped = dropped + ? where id = ?", (count, id))
            database.execute("update pools set last = ? where topic = ? and last < ?", (cut, id, cut))
            database.execute(
                "delete from taken where number <= ? and pool in (select id from pools where topic = ?)", (cut, id)
            )
        return count

    def _state(self, id: int, topic: Topic, dropped: int) -> State:
        database, now = self._database, time.time()

        def age(query: str, *values: object) -> float | None:
            (stored,) = database.execute(query, values).fetchone()
            return None if stored is None else max(0.0, now - stored)

        (kept,) = database.execute("select count(*) from messages where topic = ?", (id,)).fetchone()
        oldest = age("select min(stored) from messages where topic = ?", id)
        pools = []
        for pool, name, last in database.execute(
            "select id, name, last from pools where topic = ? order by name", (id,)
        ).fetchall():
            new = "from messages where topic = ? and number > ? and (only is null or only = ?)"
            (waiting,) = database.execute(f"select count(*) {new}", (id, last, pool)).fetchone()
            counts = "select count(*), coalesce(sum(held), 0) from taken where pool = ?"
            given, held = database.execute(counts, (pool,)).fetchone()
            (consumers,) = database.execute("select count(*) from consumers where pool = ?", (pool,)).fetchone()
            ages = (
                age(f"select min(stored) {new}", id, last, pool),
                age(
                    "select min(stored) from taken t join messages m on m.topic = ? and m.number = t.number where t.pool = ?",
                    id,
                    pool,
                ),
            )
            unread = max((each for each in ages if each is not None), default=None)
            pools.append(Pool(name, waiting + given - held, held, consumers, unread))
        return State(topic, kept, oldest, dropped, pools)

    def _open(self) -> None:
        if self._path is None:
            assert self._memory is not None
            self._database = self._memory.database
            self.opened = 1
            return
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._database = connect(str(self._path), _SCHEMA, _VERSION, self._sleep, setup=_SETUP)
        except NewerSchema as error:
            raise StoreError(
                f"The notifications {self._place} were stored by a newer release of green_zmq (schema {error.version}, ours "
                f"{_VERSION}); upgrade this one, or set notification_path to another file."
            ) from None
        self._use.opened(self._database)
        self._writes_back = True
        self.opened += 1
        self._file = self._path.stat().st_ino

    def watch(self) -> int:
        """A descriptor that can be read whenever there may be news; -1: the kernel cannot tell.

        :raises StoreError: this process is out of descriptors.
        """
        with self._errors("watched"):
            if self._memory is not None:
                wake = Wake()
                self._memory.news[wake.fd] = wake
                return wake.fd
            news = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if news >= 0 and _libc.inotify_add_watch(news, os.fsencode(f"{self._path}-wal"), _IN_MODIFY | _IN_ATTRIB) < 0:
                close(news)
                news = -1
            return int(news)

    def unwatch(self, news: int) -> None:
        if self._memory is not None:
            self._memory.news.pop(news, None)
        elif news >= 0:
            close(news)

    def version(self) -> object:
        """Differs if anybody else has written; None if that cannot be told."""
        if self._memory is not None:
            return self._memory.writes - self._writes
        try:
            file = self._path and self._path.stat().st_ino
            with self._use:
                return file, self._database.execute("pragma data_version").fetchone()
        except (sqlite3.Error, OSError):
            return None  # whoever uses it now gets the error

    def has_any(self, consumer: bytes) -> bool:
        """Whether there may be something that it can take. Most of what others write is not: that they live, say."""
        try:
            if self._path is None or self._path.stat().st_ino != self._file:
                return True  # in memory, who reads keeps others from writing
            with self._use:
                (found,) = self._database.execute(_ANY, {"me": consumer}).fetchone()
        except (sqlite3.Error, OSError):
            return True  # whoever takes it now waits, or gets the error
        return bool(found)

    def _follow(self) -> None:
        """If somebody removed the file, go on with the one that is there now, as whoever starts does. A fork closes it."""
        if self._is_elsewhere():
            old = self._database
            self._open()
            old.close()

    def _checkpoints(self, on: bool) -> None:
        """Whether transactions of this store that find much in the log write it back to the file."""
        if on != self._writes_back:
            self._database.execute(f"pragma wal_autocheckpoint = {_PAGES if on else 0}")
            self._writes_back = on

    def _is_elsewhere(self) -> bool:
        """Whether the file must be opened first."""
        try:
            return self._path is not None and (self._use.forked or self._path.stat().st_ino != self._file)
        except FileNotFoundError:
            return True

    def _count(self) -> None:
        if self._memory is not None:
            self._writes += 1
            self._memory.writes += 1

    def _tell(self) -> None:
        """From here on others can see what was written. The kernel has told them too early: when it came into the log."""
        if self._memory is not None:
            for wake in list(self._memory.news.values()):
                wake()
        else:
            with contextlib.suppress(OSError):
                os.utime(f"{self._path}-wal")

    @contextlib.contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            advice = "check its folder's permissions and space, or set notification_path to a file that can be written"
            if "not a database" in str(error) or "malformed" in str(error) or "no such" in str(error):
                advice = "it is damaged or none of ours: remove it, or set notification_path to another file"
            raise StoreError(f"The notifications {self._place} cannot be {done} ({error}); {advice}.") from error


class SqliteConsumer:
    def __init__(self, store: SqliteStore, topics: Collection[Topic], pool: str) -> None:
        self._store = store
        self._topics = list(dict.fromkeys(topics))
        self._name = pool
        self._id = os.urandom(8)
        self._process = process_id(os.getpid())
        # By the ids of the pools.
        self._pools: dict[int, Topic] = {}
        self._ids: dict[Topic, int] = {}
        self._opened = 0
        self._renew_at = -inf
        self._seen: object = None
        # When a message that is for another consumer may be fetched by this one.
        self._turn_at = inf
        self._wanted = False
        self._news = -1
        with store.writing() as database:
            self._live(database, time.monotonic())

    def take(self, most: int) -> Sequence[Taken]:
        now = time.monotonic()
        self._wanted = most > 0
        self._forget_news()
        seen = self._store.version()
        if not self._is_due(most, now, seen):
            return []
        with self._store.writing() as database:
            now = time.monotonic()  # others may have been waited for
            if self._renew_at <= now or self._opened != self._store.opened:
                self._live(database, now)
            taken = self._fetch(database, most, now) if most else []
        # With as many as were wanted, there may be more.
        self._seen = seen if most and len(taken) < most else None
        return taken

    def acknowledge(self, messages: Collection[Taken]) -> None:
        with self._store.writing() as database:
            self._done(database, messages)

    def give_back(self, messages: Collection[Taken], *, tried: bool) -> None:
        now = time.monotonic()
        with self._store.writing() as database:
            database.executemany(
                "update taken set consumer = iif(:tried, (select consumer from consumers c where c.pool = taken.pool "
                "and consumer <> :me order by consumer < :me, consumer limit 1), null), since = iif(:tried, :now, since), "
                "held = 0, tries = tries - not :tried where pool = :pool and number = :number and consumer = :me",
                [
                    {"tried": tried, "me": self._id, "now": now, "pool": pool, "number": number}
                    for pool, number in map(self._key, messages)
                ],
            )
        self._seen = None

    def put_aside(self, messages: Collection[Taken]) -> None:
        now = time.time()
        with self._store.writing() as database:
            database.executemany(
                "insert into dead (exchange, name, pool, died, tries, body) values (?, ?, ?, ?, ?, ?)",
                [(*message.topic, self._name, now, message.tries, message.body) for message in messages],
            )
            self._done(database, messages)

    def wait(self, wake: int, seconds: float) -> None:
        poll = self._store.poll()
        poll.register(wake, select.POLLIN)
        until = min(time.monotonic() + seconds, self._renew_at)
        if self._wanted:
            until = min(until, self._turn_at)
            if self._news < 0:
                until = min(until, time.monotonic() + _LOOK)
            else:
                poll.register(self._news, select.POLLIN)
        for descriptor, _ in poll.poll(max(0.0, until - time.monotonic()) * 1000):
            if descriptor == wake:
                os.eventfd_read(wake)

    def close(self) -> None:
        self._store.unwatch(self._news)
        self._news = -1
        with self._store.writing() as database:
            database.execute("update taken set consumer = null, tries = tries - held, held = 0 where consumer = ?", (self._id,))
            database.execute("delete from consumers where consumer = ?", (self._id,))

    def _is_due(self, most: int, now: float, seen: object) -> bool:
        """Whether there may be something to do. It seldom is wrong, and keeps nobody from writing."""
        if self._renew_at <= now or (most and self._turn_at <= now):
            return True
        if not most or (seen is not None and seen == self._seen):
            return False
        if self._store.has_any(self._id):
            return True
        self._seen = seen
        return False

    def _live(self, database: sqlite3.Connection, now: float) -> None:
        """Say that this consumer lives, and see who does not."""
        store, takeover = self._store, self._store.bounds.takeover
        if self._opened != store.opened:
            self._ids = {topic: store.pool(topic, self._name) for topic in self._topics}
            self._pools = {id: topic for topic, id in self._ids.items()}
            store.unwatch(self._news)
            self._news = store.watch()
            self._opened = store.opened
        store.bury(now, self._id)
        database.executemany(
            "insert into consumers values (?, ?, ?, ?, ?) on conflict do update set expires = excluded.expires",
            [(pool, self._id, store.boot, self._process, now + _EXPIRE * takeover) for pool in self._pools],
        )
        self._renew_at = now + _RENEW * takeover

    def _fetch(self, database: sqlite3.Connection, most: int, now: float) -> list[Taken]:
        self._give_out(database, most, now)
        rows = database.execute(
            "select t.pool, t.number, m.body, t.tries + 1 from consumers c join taken t using (pool) "
            "join pools p on p.id = t.pool join messages m on m.topic = p.topic and m.number = t.number "
            "where c.consumer = :me and not t.held "
            "and (t.consumer is null or t.consumer = :me or t.since <= :late or t.since > :now) "
            "order by t.since, t.number limit :most",
            {"me": self._id, "late": now - _TURN, "now": now, "most": most},
        ).fetchall()
        database.executemany(
            "update taken set consumer = ?, held = 1, since = ?, tries = tries + 1 where pool = ? and number = ?",
            [(self._id, now, pool, number) for pool, number, *_ in rows],
        )
        (since,) = database.execute(
            "select min(since) from consumers c join taken t using (pool) where c.consumer = ? and not held", (self._id,)
        ).fetchone()
        self._turn_at = inf if since is None else since + _TURN
        return [Taken(self._pools[pool], str(number), body, tries) for pool, number, body, tries in rows]

    def _give_out(self, database: sqlite3.Connection, most: int, now: float) -> None:
        """New messages to all consumers of the pool in turn."""
        news = database.execute(
            "select p.id, p.topic, p.last, p.turn, t.last from consumers c join pools p on p.id = c.pool "
            "join topics t on t.id = p.topic where c.consumer = ? and t.last > p.last",
            (self._id,),
        ).fetchall()
        for pool, topic, last, turn, latest in news:
            consumers = database.execute("select consumer from consumers where pool = ? order by consumer", (pool,)).fetchall()
            count = len(consumers)
            rows = database.execute(
                "select number from messages where topic = ? and number > ? and (only is null or only = ?) "
                "order by number limit ?",
                (topic, last, pool, most * count),
            ).fetchall()
            database.executemany(
                "insert into taken values (?, ?, ?, 0, ?, 0)",
                [(pool, number, *consumers[(turn + i) % count], now) for i, (number,) in enumerate(rows)],
            )
            database.execute(
                "update pools set last = ?, turn = ? where id = ?",
                (rows[-1][0] if len(rows) == most * count else latest, (turn + len(rows)) % count, pool),
            )

    def _done(self, database: sqlite3.Connection, messages: Collection[Taken]) -> None:
        database.executemany("delete from taken where pool = ? and number = ?", [self._key(message) for message in messages])

    def _key(self, message: Taken) -> tuple[int, int]:
        return self._ids[message.topic], int(message.name)

    def _forget_news(self) -> None:
        if self._news >= 0:
            with contextlib.suppress(BlockingIOError):
                read(self._news, _NEWS)


def open_store(settings: Settings) -> SqliteStore:
    return SqliteStore(settings)
