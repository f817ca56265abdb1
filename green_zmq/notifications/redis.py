# SPDX-License-Identifier: Apache-2.0
"""The store of a cluster, in Redis or Valkey: ``zmq+redis://``, and with failover ``zmq+sentinel://``.

What is stored, with ``PREFIX:notifications:`` before each key; entries have the fields ``tries`` and ``body``, in this order:

``stream:TOPIC``
    a stream, with the messages of a topic. Each pool is a consumer group of it, each consumer one of the group's.
``again:TOPICPOOL``
    a stream, with what one pool is to be given again, how often it was tried, and the same group. What is done is deleted.
``looked:TOPICPOOL``
    is there for most of a period after a consumer has looked for dead ones, so that of many who would only one does.
``dropped``
    a hash, by topic: how many messages went because of the bounds before every pool had processed them.
``dead``
    a stream, with what was put aside; it has the fields ``pool`` and ``topic`` as well.

A consumer says that it lives by a command that Redis notes the time of. What a dead one had, what is given back, and what Redis
has sent over a connection that was lost is copied to ``again``, for whoever reads first: bodies do not leave Redis for it.

A topic's members are read by a command that Redis answers as soon as there are messages; it has a connection of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import redis

from green_zmq import executors
from green_zmq.config import Settings
from green_zmq.errors import StoreError
from green_zmq.notifications import scripts
from green_zmq.notifications.base import Busy, Dead, Pool, State, Taken
from green_zmq.redis import Hosts, decode_topic, encode_topic, explain
from green_zmq.routing import Topic

# Of the time until another consumer has what a dead one had: how often each says that it lives, and looks whether others do;
# how long it must have been silent; and how long everybody has, to say so again, after we were connected anew.
_RENEW: Final = 0.2
_SILENT: Final = 0.6
_PATIENCE: Final = 0.4
# Seconds until it is tried again, when it has failed.
_RETRY: Final = 1.0
# Of that many bytes a socket that has sent all before takes any message whole, at once.
_AT_ONCE: Final = 8000
# Messages counted in one command, which keeps others waiting meanwhile.
_CHUNK: Final = 1000

_T = TypeVar("_T")


class RedisStore:
    def __init__(self, settings: Settings) -> None:
        """:raises StoreError: it cannot be reached or used."""
        assert settings.redis is not None
        self._place = settings.store_place
        self._prefix = f"{settings.redis.prefix}:notifications:".encode()
        self._tls = settings.redis.tls
        self._hosts = Hosts(settings.redis, self._connect, self._disconnect)
        self._connection: Any = None
        self._consumer: RedisConsumer | None = None
        self.bounds = settings.bounds
        model = executors.load(settings.model)
        self.poll, self._native_socket = model.native_poll, model.native_socket
        self.connected_at = 0.0
        self.do(lambda: None)

    def append(self, messages: Sequence[tuple[Topic, bytes]]) -> None:
        commands = [self._xadd(topic, body) for topic, body in messages]
        # Closed for its idleness, say: what was sent over it would be in doubt.
        if self._connection is not None and self.can_be_read(self._connection):
            self._hosts.disconnect()
        self.do(lambda: self.ask(*commands) if len(commands) < 2 else self._append(commands), twice=False)

    def append_at_once(self, topic: Topic, body: bytes) -> Generator[tuple[int, float]]:
        connection = self._connection
        if connection is None or self._tls or len(body) > _AT_ONCE or self.can_be_read(connection):
            raise Busy
        done = False
        try:
            with self._errors():
                connection.send_command(*self._xadd(topic, body))
                yield connection._sock.fileno(), connection.socket_timeout
                if not self.can_be_read(connection):
                    raise redis.TimeoutError("it did not answer in time")
                connection.read_response()
            done = True
        finally:
            if not done:  # the answer is still to come, or must not be relied on
                self._hosts.disconnect()

    def trim(self, topics: Collection[Topic]) -> Mapping[Topic, int]:
        bounds = (self.bounds.messages, round(self.bounds.age * 1000))
        commands = [
            ("EVAL", scripts.TRIM, 3, self.key("stream", topic), self._prefix + b"dropped", self.dead_key(),
             *bounds, encode_topic(topic), self.key("again", topic))
            for topic in topics
        ]  # fmt: skip
        dropped = self.do(lambda: self.ask(*commands))
        return {topic: count for topic, count in zip(topics, dropped, strict=True) if count}

    def consume(self, topics: Collection[Topic], pool: str) -> RedisConsumer:
        self._consumer = consumer = RedisConsumer(self, topics, pool)
        consumer.begin()
        return consumer

    def overview(self) -> Sequence[State]:
        return self.do(lambda: [state for topic in self._topics() if (state := self._state(topic)) is not None])

    def dead(self) -> Sequence[Dead]:
        return self.do(self._dead)

    def put_back(self, names: Collection[str]) -> int:
        ids = [name for name in names if re.fullmatch(r"\d{1,18}-\d{1,18}", name, re.ASCII)]
        command = ("EVAL", scripts.PUT_BACK, 1, self.dead_key(), self._prefix + b"again:", *ids)
        return int(self.do(lambda: self.ask(command))[0])

    def since(self, topic: Topic, after: str | None) -> tuple[str, Sequence[bytes]]:
        key = self.key("stream", topic)
        if after is None:
            (found,) = self.do(lambda: self.ask(("XREVRANGE", key, "+", "-", "COUNT", 1)))
            return (found[0][0].decode() if found else "0-0"), ()
        return self.do(lambda: self._since(key, after))

    def close(self) -> None:
        self._hosts.close()

    # For the consumer.

    def key(self, kind: str, topic: Topic, rest: str = "") -> bytes:
        return b"%s%s:%s%s" % (self._prefix, kind.encode(), encode_topic(topic), rest.encode())

    def dead_key(self) -> bytes:
        return self._prefix + b"dead"

    def do(self, job: Callable[[], _T], *, twice: bool = True) -> _T:
        with self._errors():
            return self._hosts.do(job, twice=twice)
        raise AssertionError  # for mypy: the errors are raised again

    def ask(self, *commands: Sequence[object]) -> list[Any]:
        """The answers to commands that are sent at once.

        :raises redis.RedisError: the first of the answers that is an error.
        """
        answers = self.answers(*commands)
        for answer in answers:
            if isinstance(answer, redis.ResponseError):
                raise redis.ReadOnlyError(str(answer)) if "READONLY" in str(answer) else answer
        return answers

    def answers(self, *commands: Sequence[object]) -> list[Any]:
        """As ``ask``, with errors among the answers."""
        connection, answers = self._connection, []
        if commands:
            connection.send_packed_command(connection.pack_commands(commands))
        for _ in commands:
            try:
                answers.append(connection.read_response())
            except redis.ResponseError as error:
                answers.append(error)
        return answers

    def new_connection(self) -> Any:
        """Another one to the server that is in use."""
        pool = self._hosts.client.connection_pool
        connection = pool.connection_class(**pool.connection_kwargs)
        if not self._tls:
            self._make_native(connection)
        connection.connect()
        if self._connection is not None and (connection.host, connection.port) != (
            self._connection.host,
            self._connection.port,
        ):
            connection.disconnect()
            raise redis.ConnectionError("the sentinels have just chosen another master")
        return connection

    def can_be_read(self, connection: Any, seconds: float = 0.0) -> bool:
        """Whether there is an answer, or it is closed; at the latest after that time."""
        poll = self.poll()
        poll.register(connection._sock.fileno(), select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    # How.

    def _xadd(self, topic: Topic, body: bytes) -> Sequence[object]:
        return ("XADD", self.key("stream", topic), "*", "tries", 0, "body", body)

    def _append(self, commands: Sequence[Sequence[object]]) -> None:
        *_, ids = self.ask(("MULTI",), *commands, ("EXEC",))
        errors = [id for id in ids if isinstance(id, Exception)]
        if errors:
            # A transaction of Redis goes on after an error.
            kept = [("XDEL", command[1], id) for command, id in zip(commands, ids, strict=True) if isinstance(id, bytes)]
            self.ask(*kept)
            raise errors[0]

    def _since(self, key: bytes, after: str) -> tuple[str, Sequence[bytes]]:
        (found,) = self.ask(("XRANGE", key, f"({after}", "+"))
        return (found[-1][0].decode() if found else after), [fields[3] for _, fields in found]

    def _dead(self) -> list[Dead]:
        found, (seconds, micros) = self.ask(("XRANGE", self.dead_key(), "-", "+"), ("TIME",))
        now = int(seconds) + int(micros) / 1e6
        return [
            Dead(
                id.decode(),
                decode_topic(fields[7])[0],
                fields[5].decode(),
                max(0.0, now - _ms(id) / 1000),
                int(fields[1]),
                fields[3],
            )
            for id, fields in found
        ]

    def _topics(self) -> list[Topic]:
        begin = self._prefix + b"stream:"
        pattern = re.sub(rb"([\\*?[\]])", rb"\\\1", begin) + b"*"
        found, cursor = set[Topic](), b"0"
        while True:
            ((cursor, keys),) = self.ask(("SCAN", cursor, "MATCH", pattern, "COUNT", _CHUNK))
            found.update(decode_topic(key.removeprefix(begin))[0] for key in keys)
            if cursor == b"0":
                return sorted(found)

    def _state(self, topic: Topic) -> State | None:
        key, silent = self.key("stream", topic), round(self.bounds.takeover * 1000)
        command = (
            "EVAL",
            scripts.STATE,
            2,
            key,
            self._prefix + b"dropped",
            encode_topic(topic),
            self.key("again", topic),
            silent,
        )
        (state,) = self.ask(command)
        if not state:
            return None
        now, kept, first, dropped, groups = state

        def age(*ids: bytes) -> float | None:
            return max((max(0.0, (int(now) - _ms(id)) / 1000) for id in ids if id), default=None)

        pools = [
            Pool(name.decode().removeprefix("pool:"), self._count(key, last) + again, taken, consumers, age(*ids))
            for name, last, taken, again, consumers, *ids in groups
        ]
        if all(pool.name for pool in pools):
            pools.append(Pool("", kept, 0, 0, age(first)))  # nobody has listened yet
        return State(topic, kept, age(first), dropped, sorted(pools))

    def _count(self, key: bytes, after: bytes) -> int:
        count = found = _CHUNK
        total = 0
        while found == count:
            ((found, after),) = self.ask(("EVAL", scripts.COUNT, 1, key, after, count))
            total += found
        return total

    def _make_native(self, connection: Any) -> None:
        """Have a connection that is made in a patched process use a socket that is not: a green one takes twice the time."""
        connect = connection._connect

        def connect_natively() -> Any:
            native = self._native_socket(fileno=connect().detach())
            native.settimeout(connection.socket_timeout)
            return native

        connection._connect = connect_natively

    def _connect(self) -> None:
        self._connection = None
        self._connection = self.new_connection()
        self.connected_at = time.monotonic()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None
        if self._consumer is not None:
            self._consumer.disconnect()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise StoreError(f"The store of notifications {self._place} cannot be used {explain(error)}.") from error


class RedisConsumer:
    def __init__(self, store: RedisStore, topics: Collection[Topic], pool: str) -> None:
        self._store = store
        self._pool = pool
        self._group = f"pool:{pool}"
        self._name = os.urandom(8).hex()
        # Where a pool begins that is new. Later it can only have been lost with the database, and what is there is new to it.
        self._begin = "$" if pool else "0"
        # By topic; first what was there before, for it is older.
        self._again = {topic: store.key("again", topic, pool) for topic in topics}
        self._new = {topic: store.key("stream", topic) for topic in topics}
        self._streams = {key: (topic, "+") for topic, key in self._again.items()}
        self._streams |= {key: (topic, "") for topic, key in self._new.items()}
        # What was read: what is not yet taken, and the names of that and of what is not done with.
        self._hand: deque[Taken] = deque()
        self._known: dict[Topic, set[str]] = {topic: set() for topic in topics}
        # For the command that waits: how many messages of each stream it may bring. 0: it is not under way.
        self._reader: Any = None
        self._reader_id = 0
        self._reading = 0
        # What the last take has left room for. None: it failed.
        self._wanted = False
        self._room: int | None = None
        self._live_at = 0.0

    def begin(self) -> None:
        self._do(self._live)
        self._begin = "0"

    def take(self, most: int) -> Sequence[Taken]:
        self._room = None
        self._do(lambda: self._fill(most))
        taken = [self._hand.popleft() for _ in range(min(most, len(self._hand)))]
        self._wanted, self._room = most > 0, most - len(taken)
        return taken

    def acknowledge(self, messages: Collection[Taken]) -> None:
        commands: list[Sequence[object]] = []
        for topic, names in _by_topic(messages).items():
            new = [name for name in names if not name.startswith("+")]
            again = [name[1:] for name in names if name.startswith("+")]
            commands += [("XACK", self._new[topic], self._group, *new)] if new else []
            commands += (
                [("XACK", self._again[topic], self._group, *again), ("XDEL", self._again[topic], *again)] if again else []
            )
        self._do(lambda: self._store.ask(*commands))
        self._forget(messages)

    def give_back(self, messages: Collection[Taken], *, tried: bool) -> None:
        for topic, names in _by_topic(messages).items():
            self._give(topic, self._again[topic], tried, (), names)
        self._forget(messages)

    def put_aside(self, messages: Collection[Taken]) -> None:
        for topic, names in _by_topic(messages).items():
            fields = ("pool", self._pool, "topic", encode_topic(topic))
            self._give(topic, self._store.dead_key(), True, fields, names)
        self._forget(messages)

    def wait(self, wake: int, seconds: float) -> None:
        poll = self._store.poll()
        poll.register(wake, select.POLLIN)
        if self._room is None:
            seconds = min(seconds, _RETRY)
        elif self._wanted and (self._hand or not self._room):
            seconds = 0.0  # there may be more
        else:
            seconds = min(seconds, max(0.0, self._live_at - time.monotonic()))
            if self._wanted:
                if not self._reading:
                    self._do(self._read)
                poll.register(self._reader._sock.fileno(), select.POLLIN)
        for descriptor, _ in poll.poll(seconds * 1000):
            if descriptor == wake:
                os.eventfd_read(wake)

    def close(self) -> None:
        try:
            self._do(self._leave)
        finally:
            self.disconnect()

    def disconnect(self) -> None:
        """Forget the connection, and with it what Redis may have sent over it; that is put right at the next take."""
        if self._reader is not None:
            self._reader.disconnect()
            self._reader = None
        self._reading = 0
        self._live_at = 0.0

    # How. All of it may be repeated.

    def _do(self, job: Callable[[], _T]) -> _T:
        """Do something with groups that may have been lost with the database."""

        def attempt() -> _T:
            try:
                return job()
            except redis.ResponseError as error:
                if not re.search("NOGROUP|UNBLOCKED", str(error)):
                    raise
            self._join()
            return job()

        return self._store.do(attempt)

    def _join(self) -> None:
        """Make those groups that are not there."""
        create = ("XGROUP", "CREATE")
        commands = [(*create, key, self._group, "0", "MKSTREAM") for key in self._again.values()]
        commands += [(*create, key, self._group, self._begin, "MKSTREAM") for key in self._new.values()]
        for answer in self._store.answers(*commands):
            if isinstance(answer, Exception) and "BUSYGROUP" not in str(answer):
                raise answer

    def _fill(self, most: int) -> None:
        """Have so many messages in hand, if there are."""
        due = time.monotonic() >= self._live_at
        if self._reading and (due or self._reading > most - len(self._hand)):
            self._stop_reading()
        streams: Collection[bytes] = self._streams
        if self._reading:
            streams = self._finish_reading() if self._store.can_be_read(self._reader) else ()
        if due:
            self._live_at = time.monotonic() + _RETRY
            self._live()
            streams = self._streams
        while streams and (room := most - len(self._hand)) > 0:
            count = max(1, room // len(streams))
            (answer,) = self._store.ask(self._command(streams, "COUNT", count))
            streams = self._note(answer, count)

    def _command(self, streams: Collection[bytes], *options: object) -> Sequence[object]:
        return ("XREADGROUP", "GROUP", self._group, self._name, *options, "STREAMS", *streams, *[">"] * len(streams))

    def _note(self, answer: Any, count: int) -> Collection[bytes]:
        """What was read, so many messages at most of each stream; returns those that may have more."""
        for key, entries in answer or ():
            topic, mark = self._streams[key]
            for id, fields in entries:
                message = Taken(topic, mark + id.decode(), fields[3], int(fields[1]) + 1)
                self._known[topic].add(message.name)
                self._hand.append(message)
        return [key for key, entries in answer or () if len(entries) == count]

    def _read(self) -> None:
        """Begin to wait for messages."""
        if self._reader is None:
            self._reader = self._store.new_connection()
            self._reader.send_command("CLIENT", "ID")
            self._reader_id = self._reader.read_response()
        count = max(1, (self._room or 0) // len(self._streams))
        # It ends by itself before we are taken for dead: the server may see a lost connection late, and answer into the void.
        block = round(_RENEW * self._store.bounds.takeover * 1000)
        self._reader.send_command(*self._command(self._streams, "COUNT", count, "BLOCK", block))
        self._reading = count

    def _stop_reading(self) -> None:
        """Have what waits answered; it may not even have arrived yet."""
        while not self._store.can_be_read(self._reader):
            self._store.ask(("CLIENT", "UNBLOCK", self._reader_id))
            self._store.can_be_read(self._reader, 0.005)

    def _finish_reading(self) -> Collection[bytes]:
        count, self._reading = self._reading, 0
        return self._note(self._reader.read_response(), count)

    def _live(self) -> None:
        """Say that this consumer lives, have again what it does not know of, and see who does not live."""
        takeover = self._store.bounds.takeover * 1000
        patient = time.monotonic() < self._store.connected_at + _PATIENCE * takeover / 1000
        self._store.ask(
            *(
                ("EVAL", scripts.LIVE, 3, self._new[topic], self._again[topic], self._store.key("looked", topic, self._pool),
                 self._group, self._name, "" if patient else round(_SILENT * takeover), round(_RENEW * takeover), *known)
                for topic, known in self._known.items()
            )
        )  # fmt: skip
        self._live_at = time.monotonic() + _RENEW * takeover / 1000

    def _give(self, topic: Topic, to: bytes, tried: bool, fields: Sequence[object], names: Sequence[str]) -> None:
        command = (
            "EVAL", scripts.GIVE, 3, self._new[topic], self._again[topic], to,
            self._group, self._name, int(tried), len(fields), *fields, *names,
        )  # fmt: skip
        self._do(lambda: self._store.ask(command))

    def _leave(self) -> None:
        if self._reading:
            self._stop_reading()
            self._finish_reading()
        keys = [(self._new[topic], self._again[topic]) for topic in self._known]
        self._store.ask(*(("EVAL", scripts.LEAVE, 2, *pair, self._group, self._name) for pair in keys))

    def _forget(self, messages: Collection[Taken]) -> None:
        for message in messages:
            self._known[message.topic].discard(message.name)


def _by_topic(messages: Collection[Taken]) -> dict[Topic, list[str]]:
    found: dict[Topic, list[str]] = {}
    for message in messages:
        found.setdefault(message.topic, []).append(message.name)
    return found


def _ms(id: bytes) -> int:
    return int(id.partition(b"-")[0])


def open_store(settings: Settings) -> RedisStore:
    return RedisStore(settings)
