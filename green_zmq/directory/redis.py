# SPDX-License-Identifier: Apache-2.0
"""The directory of a cluster, in Redis or Valkey: ``zmq+redis://``, and with failover ``zmq+sentinel://``.

What is stored, with the prefix of the cloud before each key:

``PREFIX:node:INSTANCE``
    a node's record, in JSON: where it is, and its listeners. It expires. What it says holds.
``PREFIX:members``
    a sorted set, an index: for each listener a member of its topic, instance and server, which begins with the topic, so
    that the listeners of a topic are a range of it. One member more, the last, is the *epoch*, drawn when the set is made.
``PREFIX:kept``
    is there for most of a period after a node has seen to the index, so that of many who would only one does.
``PREFIX:DB:topic:TOPIC``
    a channel. The instance of a node is published when its listeners of that topic have changed.
``PREFIX:DB:kept``
    a channel. The time that the index has to live, in ms, is published whenever a node has seen to it.

A node refreshes its record with one command, which also tells whether the database still has it. Records are written and
removed together with the index by scripts, so no half of a listener is ever visible. The index expires as well, so that
nothing is left if everybody was killed; once in a period any one node, whoever comes first, prolongs its life, removes
from it what is stale, and tells the others that they need not.

If the database has lost everything, which is seen from the epoch, then those that were known go on being told of until
they have registered again, or have had the time to.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Final, NamedTuple, TypeVar

import redis

from green_zmq import executors
from green_zmq.config import Settings
from green_zmq.directory.base import Listing, Stale
from green_zmq.directory.processes import boot_id, process_id, runs
from green_zmq.errors import DirectoryError
from green_zmq.redis import Hosts, decode_topic, encode_topic, explain
from green_zmq.routing import Entry, Node, Topic

# Redis's library makes this logger, if there is none, where the first connection for changes is made: in a native thread. The
# lock that all loggers share is a green one in a patched process, and eventlet's does not work between native threads: whoever
# waits for it there may wait for ever, and with it the whole service at its next message to the log.
logging.getLogger("push_response")

# Seconds between two attempts to be told of changes again.
_RETRY: Final = 1.0
# Records asked for in one command.
_CHUNK: Final = 500
# The index must be kept for another period by somebody when it has less to live than it has then. 0: at every refresh.
_KEPT: Final = 0.75
# No topic begins with it, since no UTF-8 has it: the epoch is behind all of them.
_EPOCH: Final = b"\xff"

# KEYS: index, record, kept. ARGV: time to live (ms), record, epoch if there is none, what to publish, channel to tell on how
# long the index has to live or '', how long nobody else need see to it (ms), number of members, them, number of members to
# remove, them, channels. Returns whether the caller is the one who is to see to the index.
_ANNOUNCE: Final = """
local ttl, n = tonumber(ARGV[1]), tonumber(ARGV[7])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ttl)
if n > 0 then
    if #redis.call('ZRANGEBYLEX', KEYS[1], '[\\255', '+', 'LIMIT', 0, 1) == 0 then
        redis.call('ZADD', KEYS[1], 0, ARGV[3])
    end
    for i = 8, 7 + n do redis.call('ZADD', KEYS[1], 0, ARGV[i]) end
end
local m = tonumber(ARGV[8 + n])
for i = 9 + n, 8 + n + m do redis.call('ZREM', KEYS[1], ARGV[i]) end
if redis.call('ZCARD', KEYS[1]) == 1 then redis.call('DEL', KEYS[1], KEYS[3]) end
if redis.call('PTTL', KEYS[1]) < ttl then redis.call('PEXPIRE', KEYS[1], ttl) end
for i = 9 + n + m, #ARGV do redis.call('PUBLISH', ARGV[i], ARGV[4]) end
if ARGV[5] == '' or redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
if not redis.call('SET', KEYS[3], '', 'NX', 'PX', ARGV[6]) then return 0 end
redis.call('PUBLISH', ARGV[5], redis.call('PTTL', KEYS[1]))
return 1
"""

# KEYS: index, record, kept. ARGV: the record as it must be, else nothing is done ('': absent), whether to remove it, what to
# publish, number of members to remove, them, channels.
_REMOVE: Final = """
if (redis.call('GET', KEYS[2]) or '') ~= ARGV[1] then return 0 end
if ARGV[2] == '1' then redis.call('DEL', KEYS[2]) end
local n = tonumber(ARGV[4])
for i = 5, 4 + n do redis.call('ZREM', KEYS[1], ARGV[i]) end
if redis.call('ZCARD', KEYS[1]) == 1 then redis.call('DEL', KEYS[1], KEYS[3]) end
for i = 5 + n, #ARGV do redis.call('PUBLISH', ARGV[i], ARGV[3]) end
return 1
"""

_T = TypeVar("_T")


class _Record(NamedTuple):
    """What is stored of a node.

    :ivar since: its listeners, with the times they began by the wall clock of its host.
    :ivar process: what tells whether it runs, on its own host in the same boot.
    :ivar text: all that, as it is stored.
    """

    node: Node
    since: dict[tuple[Topic, str], float]
    process: tuple[str, str]
    text: bytes

    @property
    def runs(self) -> bool:
        boot, process = self.process
        return boot != boot_id() or runs(process)


def _dump(node: Node, since: dict[tuple[Topic, str], float]) -> _Record:
    fields = {name: value for name, value in node._asdict().items() if name != "instance"}
    listeners = sorted([*topic, server, at] for (topic, server), at in since.items())
    process = (boot_id(), process_id(node.pid))
    text = json.dumps({**fields, "process": process, "listeners": listeners}, separators=(",", ":")).encode()
    return _Record(node, since, process, text)


def _load(instance: bytes, text: bytes | None) -> _Record | None:
    """None also if it is none of ours: of a later release, say. A node is then not found, and left alone."""
    try:
        fields = json.loads(text or b"")
        since = {(Topic(exchange, topic), server): float(at) for exchange, topic, server, at in fields["listeners"]}
        boot, process = fields["process"]
        node = Node(instance=instance, **{name: value for name, value in fields.items() if name in Node._fields})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return _Record(node, since, (boot, process), text or b"")


def _member(instance: bytes, topic: Topic, server: str) -> bytes:
    return b"%s%s%s" % (encode_topic(topic), instance.hex().encode(), server.encode())


def _parse(member: bytes) -> Stale:
    topic, rest = decode_topic(member)
    return Stale(*topic, server=rest[32:].decode(), instance=bytes.fromhex(rest[:32].decode()))


class RedisDirectory:
    def __init__(self, settings: Settings) -> None:
        """:raises DirectoryError: it cannot be reached or used."""
        assert settings.redis is not None
        self._address = address = settings.redis
        self._place = settings.directory_place
        self._expire = settings.expire
        self._update = settings.update
        self._poll = executors.load(settings.model).native_poll
        self._hosts = Hosts(address, self._subscribe, self._unsubscribe)
        self._client: Any = None
        self._pubsub: Any = None
        self._try_at = 0.0
        self._index = f"{address.prefix}:members"
        self._kept = f"{address.prefix}:kept"
        self._channel = f"{address.prefix}:{address.database}:".encode()
        self._kept_until = 0.0
        # What this process wrote itself, with the times its listeners began.
        self._written: dict[bytes, _Record] = {}
        # Topics that may have changed, None for any: put in here in the native thread, taken out by the loop's.
        self._news: deque[Topic | None] = deque([None])
        # What was last found of each topic whose channel is listened to.
        self._known: dict[Topic, list[Entry]] = {}
        self._epoch: bytes | None = None
        # After everything was lost, instances that are known to have written, or removed, their record since then.
        self._healed_at = 0.0
        self._sure: set[bytes] = set()
        self._do(lambda: None)

    # What is asked by one native thread.

    def announce(self, node: Node, listeners: Collection[tuple[Topic, str]]) -> None:
        now = time.time()
        known = self._written.get(node.instance)
        since = {} if known is None else known.since
        record = _dump(node, {listener: since.get(listener, now) for listener in listeners})
        self._do(lambda: self._announce(record, known))
        self._written[node.instance] = record

    def withdraw(self, instance: bytes) -> bool:
        known = self._written.pop(instance, None)
        return self._do(lambda: self._withdraw(instance, known))

    def look_up(self, topic: Topic) -> list[Entry]:
        return self._do(lambda: self._look_up(topic))

    def forget(self, topic: Topic) -> None:
        if self._known.pop(topic, None) is not None and self._pubsub is not None:
            self._do(lambda: self._pubsub.unsubscribe(self._topic_channel(topic)))

    def is_alive(self, node: Node) -> bool:
        return self._do(lambda: self._is_alive(node))

    def listings(self) -> Iterable[Listing]:
        now = time.time()
        records, _ = self._do(self._everything)
        return [
            Listing(*topic, server, record.node, max(0.0, now - since))
            for record in records.values()
            if record is not None and record.runs
            for (topic, server), since in record.since.items()
        ]

    def sweep(self, *, dry_run: bool = False) -> list[Stale]:
        return self._do(lambda: self._sweep(dry_run=dry_run))

    def wait(self, wake: int) -> None:
        """:raises DirectoryError: changes are not told of any more; when this is called again, it tries to mend that."""
        poll = self._poll()
        poll.register(wake, select.POLLIN)
        connection = self._pubsub and self._pubsub.connection
        if connection is not None and connection._sock is not None:
            poll.register(connection._sock.fileno(), select.POLLIN)
        left = None if self._pubsub is not None else max(0.0, self._try_at - time.monotonic()) * 1000
        ready = [fd for fd, _ in poll.poll(left)]
        if wake in ready:
            os.eventfd_read(wake)
        if ready != [wake]:
            self._do(self._take_news)

    def close(self) -> None:
        self._hosts.close()

    # What is asked by the loop's thread.

    def changes(self) -> Collection[Topic] | None:
        if 0.0 < self._healed_at <= time.monotonic():
            self._healed_at = 0.0
            self._news.append(None)
        topics: set[Topic] = set()
        anything = False
        while self._news:
            topic = self._news.popleft()
            if topic is None:
                anything = True
            else:
                topics.add(topic)
        return None if anything else topics

    # How.

    def _announce(self, record: _Record, known: _Record | None) -> None:
        instance = record.node.instance
        key = self._key(instance)
        ttl = round(self._expire * 1000)
        stored = self._client.getex(key, px=ttl)
        now = time.monotonic()
        keep = 0.0 < self._kept_until < now + self._expire - _KEPT * self._update
        if stored == record.text and not keep:
            return
        wanted, old = set(record.since), set()
        for before in (known, _load(instance, stored)):
            old |= set() if before is None else set(before.since)
        members = [_member(instance, *listener) for listener in wanted]
        removed = [_member(instance, *listener) for listener in old - wanted]
        changed = {topic for topic, _ in (old ^ wanted if stored is not None else old | wanted)}
        channels = [self._topic_channel(topic) for topic in changed]
        chosen = self._client.eval(
            _ANNOUNCE, 3, self._index, key, self._kept,
            ttl, record.text, _EPOCH + os.urandom(8).hex().encode(), instance.hex(),
            self._channel + b"kept" if keep else "", round(_KEPT * self._update * 1000),
            len(members), *members, len(removed), *removed, *channels,
        )  # fmt: skip
        self._kept_until = max(self._kept_until, now + self._expire)
        if chosen:
            self._sweep(dry_run=False)

    def _withdraw(self, instance: bytes, known: _Record | None) -> bool:
        key = self._key(instance)
        listeners = set() if known is None else set(known.since)
        while True:
            stored = self._client.get(key)
            if stored is None and not listeners:
                return False
            record = _load(instance, stored)
            listeners |= set() if record is None else set(record.since)
            if self._remove(instance, stored, listeners, whole=True):
                return stored is not None

    def _remove(self, instance: bytes, stored: bytes | None, listeners: Collection[tuple[Topic, str]], *, whole: bool) -> bool:
        """Take listeners from the index, and with the ``whole`` its record too; False if the record is not that any more."""
        members = [_member(instance, *listener) for listener in listeners]
        channels = {self._topic_channel(topic) for topic, _ in listeners}
        done = self._client.eval(
            _REMOVE, 3, self._index, self._key(instance), self._kept,
            stored or "", int(whole), instance.hex(), len(members), *members, *channels,
        )  # fmt: skip
        return bool(done)

    def _look_up(self, topic: Topic) -> list[Entry]:
        if topic not in self._known:
            # First, so that nothing is missed in between.
            channel = self._topic_channel(topic)
            self._pubsub.subscribe(channel)
            self._take_until("subscribe", channel)
            self._known[topic] = []
        entries = self._listeners(topic)
        if self._healing():
            # Who has said something since the loss holds; first everything that was said before we look.
            self._barrier()
            entries = self._listeners(topic)
            self._sure.update(entry.node.instance for entry in entries)
            entries += [entry for entry in self._known[topic] if entry.node.instance not in self._sure]
        self._known[topic] = entries
        return entries

    def _listeners(self, topic: Topic) -> list[Entry]:
        begin = encode_topic(topic)
        found = self._ask("zrangebylex", self._index, b"[" + begin, b"(" + begin + b"\xff")
        instances = dict.fromkeys(_parse(member).instance for member in found)
        return [
            Entry(server, record.node)
            for record in self._records(instances).values()
            if record is not None and record.runs
            for (listened, server) in record.since
            if listened == topic
        ]

    def _is_alive(self, node: Node) -> bool:
        text = self._ask("get", self._key(node.instance))
        if text is None:
            return self._healing() and node.instance not in self._sure
        record = _load(node.instance, text)
        return record is None or record.runs

    def _everything(self) -> tuple[dict[bytes, _Record | None], list[Stale]]:
        """All records, and what the index has beyond them."""
        members = [_parse(m) for m in self._client.zrange(self._index, 0, -1) if not m.startswith(_EPOCH)]
        records = self._records(dict.fromkeys(member.instance for member in members))

        running = {instance: record for instance, record in records.items() if record is not None and record.runs}

        def is_stale(member: Stale) -> bool:
            record = running.get(member.instance)
            return record is None or (Topic(*member[:2]), member.server) not in record.since

        return records, [member for member in members if is_stale(member)]

    def _sweep(self, *, dry_run: bool) -> list[Stale]:
        records, stale = self._everything()
        if not dry_run:
            by_instance: dict[bytes, list[tuple[Topic, str]]] = {}
            for member in stale:
                by_instance.setdefault(member.instance, []).append((Topic(*member[:2]), member.server))
            for instance, listeners in by_instance.items():
                # Unless it has written its record meanwhile.
                record = records[instance]
                if record is None:
                    self._remove(instance, None, listeners, whole=False)
                else:
                    self._remove(instance, record.text, listeners, whole=not record.runs)
        return stale

    def _records(self, instances: Iterable[bytes]) -> dict[bytes, _Record | None]:
        records: dict[bytes, _Record | None] = {}
        wanted = list(instances)
        for i in range(0, len(wanted), _CHUNK):
            chunk = wanted[i : i + _CHUNK]
            texts = self._client.mget([self._key(instance) for instance in chunk])
            records.update({instance: _load(instance, text) for instance, text in zip(chunk, texts, strict=True)})
        return records

    # What is lost with the database.

    def _ask(self, command: str, *arguments: object) -> Any:
        """The answer to a command, with a look at whether the database is still the one that it was."""
        with self._client.pipeline(transaction=False) as pipe:
            getattr(pipe, command)(*arguments)
            pipe.zrangebylex(self._index, b"[" + _EPOCH, b"+")
            answer, epoch = pipe.execute()
        self._note_epoch(epoch)
        return answer

    def _note_epoch(self, found: list[bytes]) -> None:
        epoch = found[0] if found else None
        if epoch != self._epoch and self._epoch is not None:
            self._healed_at = time.monotonic() + self._expire
        elif not self._healing():
            self._sure.clear()
        self._epoch = epoch

    def _healing(self) -> bool:
        return self._healed_at > time.monotonic()

    # What is pushed.

    def _subscribe(self) -> None:
        self._client = self._hosts.client
        self._pubsub = pubsub = self._client.pubsub()
        channels = [self._channel + b"kept", *map(self._topic_channel, self._known)]
        pubsub.subscribe(*channels)
        self._take_until("subscribe", channels[-1])
        self._news.append(None)  # whatever was missed meanwhile

    def _unsubscribe(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            pubsub.close()

    def _barrier(self) -> None:
        """Take everything that was pushed until now."""
        self._pubsub.ping()
        self._take_until("pong", None)

    def _take_until(self, kind: str, channel: bytes | None) -> None:
        until = time.monotonic() + self._address.timeout
        while True:
            message = self._pubsub.get_message(timeout=max(0.0, until - time.monotonic()))
            if message is not None:
                if message["type"] == kind and message["channel"] == channel:
                    return
                self._pushed(message)
            elif time.monotonic() >= until:
                raise redis.TimeoutError("it does not answer on the connection for changes")

    def _take_news(self) -> None:
        while (message := self._pubsub.get_message(timeout=0)) is not None:
            self._pushed(message)

    def _pushed(self, message: dict[str, Any]) -> None:
        if message["type"] != "message":
            return
        about = message["channel"].removeprefix(self._channel)
        if about == b"kept":
            self._kept_until = max(self._kept_until, time.monotonic() + int(message["data"]) / 1000)
            return
        self._sure.add(bytes.fromhex(message["data"].decode()))
        topic, _ = decode_topic(about.removeprefix(b"topic:"))
        self._news.append(topic)

    # The connections.

    def _key(self, instance: bytes) -> str:
        return f"{self._address.prefix}:node:{instance.hex()}"

    def _topic_channel(self, topic: Topic) -> bytes:
        return self._channel + b"topic:" + encode_topic(topic)

    def _do(self, job: Callable[[], _T]) -> _T:
        """Do something with a Redis that tells of changes as well; everything that is done may be repeated."""
        with self._errors():
            return self._hosts.do(job)
        raise AssertionError  # for mypy: the errors are raised again

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._hosts.disconnect()
            self._try_at = time.monotonic() + _RETRY
            raise DirectoryError(f"The directory {self._place} cannot be used {explain(error)}.") from error


def open_directory(settings: Settings) -> RedisDirectory:
    return RedisDirectory(settings)
