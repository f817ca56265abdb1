# SPDX-License-Identifier: Apache-2.0
"""What the directory in Redis does beyond any other: the database is lost, connections are cut, servers fail over.

Directories are used as the native thread of a transport uses them, one method at a time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from green_zmq.directory import Directory, open_directory
from green_zmq.errors import DirectoryError
from green_zmq.notifications import open_store
from green_zmq.routing import Entry, Node, Topic
from tests.contract.harness import wait_until
from tests.servers import Certificates, Proxy, RedisServer, SentinelCluster
from tests.test_config import read

TOPIC = Topic("openstack", "compute")


def connect(url: str, **options: Any) -> Directory:
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return open_directory(read(f"{url}?{query}"))


def node(port: int = 5000, **fields: Any) -> Node:
    return Node(os.urandom(16), "127.0.0.1", port, "here", os.getpid(), "threads")._replace(**fields)


def take_news(directory: Directory) -> None:
    """What the native thread does while it is asked nothing."""
    wake = os.eventfd(1)
    try:
        directory.wait(wake)
    finally:
        os.close(wake)


def changed(directory: Directory, topic: Topic = TOPIC) -> bool:
    take_news(directory)
    topics = directory.changes()
    return topics is None or topic in topics


def answers(directory: Directory) -> bool:
    with contextlib.suppress(DirectoryError):
        directory.look_up(TOPIC)
        return True
    return False


@pytest.fixture(scope="module")
def lasting() -> Iterator[RedisServer]:
    """For tests that leave it as it was."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis(lasting: RedisServer) -> RedisServer:
    with lasting.client() as client:
        client.flushall()
    return lasting


@pytest.fixture
def fresh() -> Iterator[RedisServer]:
    """For tests that stop it."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def opened() -> Iterator[Callable[..., Directory]]:
    found: list[Directory] = []

    def opener(server: RedisServer | Proxy | str, **options: Any) -> Directory:
        url = server if isinstance(server, str) else f"zmq+redis://{server.address}/0"
        found.append(connect(url, **options))
        return found[-1]

    yield opener
    for directory in found:
        directory.close()


Opener = Callable[..., Directory]


def size(server: RedisServer, database: int = 0) -> int:
    with server.client() as client:
        client.select(database)
        keys = client.dbsize()
        assert isinstance(keys, int)
        return keys


class Counted:
    """The commands that a server carries out inside this."""

    def __init__(self, server: RedisServer) -> None:
        self._client = server.client()
        self.commands = 0

    def _total(self) -> int:
        return int(self._client.info("stats")["total_commands_processed"])

    def __enter__(self) -> Counted:
        self._before = self._total()
        return self

    def __exit__(self, *_: object) -> None:
        self.commands = self._total() - self._before - 1
        self._client.close()


# What is stored.


def test_nothing_is_left_by_who_stops(redis: RedisServer, opened: Opener) -> None:
    directory = opened(redis)
    nodes = [node(port) for port in range(3)]
    for one in nodes:
        directory.announce(one, [(TOPIC, "s"), (TOPIC._replace(name="other"), "s")])
    assert size(redis) == 4
    for one in nodes:
        assert directory.withdraw(one.instance)
    assert size(redis) == 0


def test_nothing_is_left_by_who_stops_when_the_index_is_to_be_kept(redis: RedisServer, opened: Opener) -> None:
    directory = opened(redis, zmq_target_expire=3, zmq_target_update=1)
    one = node()
    directory.announce(one, [(TOPIC, "s")])
    with redis.client() as client:
        wait_until(lambda: client.pttl("green_zmq:members") < 2000)  # a period has gone by
    directory.announce(one, [])
    directory.withdraw(one.instance)
    assert size(redis) == 0


def test_nothing_is_left_by_who_is_killed(redis: RedisServer, opened: Opener) -> None:
    directory = opened(redis, zmq_target_expire=3, zmq_target_update=1)
    directory.announce(node(), [(TOPIC, "s")])
    assert size(redis) == 2
    with redis.client() as client:
        assert all(0 < client.pttl(key) <= 3000 for key in client.scan_iter())
    wait_until(lambda: size(redis) == 0, 6)


def test_who_is_killed_is_swept_by_another(redis: RedisServer, opened: Opener) -> None:
    short = opened(redis, zmq_target_expire=3, zmq_target_update=1)
    stays, goes = node(1), node(2)
    short.announce(goes, [(TOPIC, "goes")])

    def refreshed() -> bool:
        take_news(short)
        short.announce(stays, [(TOPIC, "stays")])
        with redis.client() as client:
            return client.zcard("green_zmq:members") == 2  # a listener, and the epoch

    wait_until(refreshed, 10)
    assert {entry.server for entry in short.look_up(TOPIC)} == {"stays"}
    assert short.sweep() == []


def test_sweep_tells_and_removes(redis: RedisServer, opened: Opener) -> None:
    directory, reader = opened(redis), opened(redis)
    one = node()
    directory.announce(one, [(TOPIC, "a"), (TOPIC, "b")])
    directory.announce(node(2), [(TOPIC, "c")])
    with redis.client() as client:
        client.delete(f"green_zmq:node:{one.instance.hex()}")
    reader.look_up(TOPIC)
    assert {s.server for s in directory.sweep(dry_run=True)} == {"a", "b"}
    assert {s.server for s in directory.sweep(dry_run=True)} == {"a", "b"}
    assert {(s.exchange, s.topic, s.server, s.instance) for s in directory.sweep()} == {
        (*TOPIC, "a", one.instance),
        (*TOPIC, "b", one.instance),
    }
    assert directory.sweep() == []
    assert changed(reader)


def test_who_comes_back_while_swept_is_kept(redis: RedisServer, opened: Opener) -> None:
    """Between what the sweeper has read and what it removes, a node may write its record anew."""
    directory = opened(redis)
    one = node()
    stop = threading.Event()

    def flap() -> None:
        with redis.client() as client:
            while not stop.is_set():
                client.delete(f"green_zmq:node:{one.instance.hex()}")

    directory.announce(one, [(TOPIC, "s")])
    flapper = threading.Thread(target=flap)
    flapper.start()
    sweeper = opened(redis)
    try:
        for _ in range(300):
            directory.announce(one, [(TOPIC, "s")])
            sweeper.sweep()
    finally:
        stop.set()
        flapper.join()
    directory.announce(one, [(TOPIC, "s")])
    sweeper.sweep()
    assert directory.look_up(TOPIC) == [Entry("s", one)]


def test_record_and_index_agree_at_every_moment(redis: RedisServer, opened: Opener) -> None:
    writer, reader = opened(redis), opened(redis)
    one = node()
    pair = [(TOPIC, "a"), (TOPIC, "b")]
    stop = threading.Event()
    seen: list[set[str]] = []

    def read() -> None:
        while not stop.is_set():
            seen.append({entry.server for entry in reader.look_up(TOPIC)})

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(200):
        writer.announce(one, pair)
        writer.withdraw(one.instance)
    stop.set()
    thread.join()
    assert {frozenset(found) for found in seen} <= {frozenset(), frozenset({"a", "b"})}


def test_listener_that_was_stopped_while_redis_was_away_is_not_found(fresh: RedisServer, opened: Opener) -> None:
    """What the index has and the record does not is not found."""
    directory = opened(fresh)
    one = node()
    directory.announce(one, [(TOPIC, "a"), (TOPIC, "b")])
    with fresh.client() as client:
        record = client.get(f"green_zmq:node:{one.instance.hex()}")
        directory.announce(one, [(TOPIC, "a")])
        member = next(m for m in client.zrange("green_zmq:members", 0, -1) if m.endswith(b"a"))
        client.zadd("green_zmq:members", {member[:-1] + b"b": 0})
        assert record is not None
    assert directory.look_up(TOPIC) == [Entry("a", one)]
    assert {s.server for s in directory.sweep()} == {"b"}


def test_clouds_with_prefixes_and_databases_do_not_meet(redis: RedisServer, opened: Opener) -> None:
    urls = [f"zmq+redis://{redis.address}/{database}" for database in (0, 1)]
    found = {(url, prefix): opened(url, redis_prefix=prefix) for url in urls for prefix in ("one", "two")}
    for at, directory in found.items():
        directory.announce(node(), [(TOPIC, str(at))])
    for at, directory in found.items():
        assert [entry.server for entry in directory.look_up(TOPIC)] == [str(at)]
        assert len(list(directory.listings())) == 1


def test_records_that_are_none_of_ours_are_left_alone(redis: RedisServer, opened: Opener) -> None:
    directory = opened(redis)
    one, odd = node(1), node(2)
    directory.announce(one, [(TOPIC, "s")])
    directory.announce(odd, [(TOPIC, "odd")])
    for text in ("no json", "[]", "{}", '{"listeners": 1}', '{"listeners": [["a"]]}', "\xff"):
        with redis.client() as client:
            client.set(f"green_zmq:node:{odd.instance.hex()}", text)
        assert directory.look_up(TOPIC) == [Entry("s", one)]
        assert len(list(directory.listings())) == 1
        directory.sweep()
    with redis.client() as client:
        assert client.exists(f"green_zmq:node:{odd.instance.hex()}")


def test_record_may_have_more_than_we_know(redis: RedisServer, opened: Opener) -> None:
    directory = opened(redis)
    one = node()
    directory.announce(one, [(TOPIC, "s")])
    key = f"green_zmq:node:{one.instance.hex()}"
    with redis.client() as client:
        client.set(key, (client.get(key) or b"").replace(b"{", b'{"zone": "north",', 1))
    assert directory.look_up(TOPIC) == [Entry("s", one)]


def test_keys_of_another_kind_are_an_error_that_says_so(redis: RedisServer, opened: Opener) -> None:
    with redis.client() as client:
        client.set("taken:members", "text")
    directory = opened(redis, redis_prefix="taken")
    with pytest.raises(DirectoryError, match="WRONGTYPE"):
        directory.look_up(TOPIC)
    with pytest.raises(DirectoryError, match="WRONGTYPE"):
        directory.announce(node(), [(TOPIC, "s")])


# What it costs.


def test_refresh_is_one_command(redis: RedisServer, opened: Opener) -> None:
    directory = opened(redis)
    one = node()
    listeners = [(TOPIC, str(i)) for i in range(10)]
    directory.announce(one, listeners)
    with Counted(redis) as counted:
        for _ in range(10):
            directory.announce(one, listeners)
    assert counted.commands == 10


def test_keeping_the_index_is_done_by_one_of_all(redis: RedisServer, opened: Opener) -> None:
    """In a period each node refreshes its record, and one of them the index: 20 nodes, some periods."""
    directories = [opened(redis, zmq_target_expire=3, zmq_target_update=1) for _ in range(20)]
    nodes = [node(port) for port in range(20)]
    for directory, one in zip(directories, nodes, strict=True):
        directory.announce(one, [(TOPIC, "s")])
    periods = 6
    with Counted(redis) as counted:
        begin = time.monotonic()
        for period in range(1, periods + 1):
            wait_until(lambda period=period: time.monotonic() >= begin + period)
            for directory, one in zip(directories, nodes, strict=True):
                take_news(directory)
                directory.announce(one, [(TOPIC, "s")])
    # Seeing to the index takes 13 commands, scripts' own included; if all did it, it would be 260 in a period.
    assert 20 * periods <= counted.commands <= (20 + 40) * periods
    assert len(directories[0].look_up(TOPIC)) == 20


def test_silence_costs_nothing(redis: RedisServer, opened: Opener) -> None:
    writer, reader = opened(redis), opened(redis)
    writer.announce(node(), [(TOPIC, "s")])
    reader.look_up(TOPIC)
    take_news(reader)
    reader.changes()
    with Counted(redis) as counted:
        for _ in range(100):
            take_news(reader)
            assert reader.changes() == set()
    assert counted.commands == 0


def test_what_is_forgotten_is_not_told_any_more(redis: RedisServer, opened: Opener) -> None:
    writer, reader = opened(redis), opened(redis)
    reader.look_up(TOPIC)
    channel = b"green_zmq:0:topic:9:openstack7:compute"
    with redis.client() as client:
        assert dict(client.pubsub_numsub(channel)) == {channel: 1}
        reader.forget(TOPIC)
        wait_until(lambda: dict(client.pubsub_numsub(channel)) == {channel: 0})
        writer.announce(node(1), [(TOPIC, "1")])
        assert len(reader.look_up(TOPIC)) == 1
        writer.announce(node(2), [(TOPIC, "2")])
        wait_until(lambda: changed(reader))
        assert len(reader.look_up(TOPIC)) == 2


# When it is away.


def test_what_is_lost_goes_on_being_known_until_it_is_written_again(redis: RedisServer, opened: Opener) -> None:
    directory, reader = opened(redis), opened(redis)
    one, two = node(1), node(2)
    directory.announce(one, [(TOPIC, "one")])
    directory.announce(two, [(TOPIC, "two")])
    assert len(reader.look_up(TOPIC)) == 2
    with redis.client() as client:
        client.flushall()
    assert {entry.server for entry in reader.look_up(TOPIC)} == {"one", "two"}
    assert reader.is_alive(one)
    directory.announce(one, [(TOPIC, "one")])  # the refresh of this period
    assert {entry.server for entry in reader.look_up(TOPIC)} == {"one", "two"}
    assert reader.is_alive(two)
    # What one says of itself now holds.
    directory.announce(one, [(TOPIC, "uno")])
    wait_until(lambda: changed(reader))
    assert {entry.server for entry in reader.look_up(TOPIC)} == {"uno", "two"}
    directory.withdraw(two.instance)
    assert {entry.server for entry in reader.look_up(TOPIC)} == {"uno"}
    assert not reader.is_alive(two)


def test_what_is_lost_and_not_written_again_is_forgotten(redis: RedisServer, opened: Opener) -> None:
    reader = opened(redis, zmq_target_expire=3, zmq_target_update=1)
    directory = opened(redis)
    one = node()
    directory.announce(one, [(TOPIC, "one")])
    reader.look_up(TOPIC)
    with redis.client() as client:
        client.flushall()
    assert [entry.server for entry in reader.look_up(TOPIC)] == ["one"]
    take_news(reader)
    reader.changes()
    wait_until(lambda: changed(reader), 6)
    assert reader.look_up(TOPIC) == []
    assert not reader.is_alive(one)


def test_last_one_that_stops_is_not_taken_for_a_loss(redis: RedisServer, opened: Opener) -> None:
    directory, reader = opened(redis), opened(redis)
    for _ in range(30):
        one = node()
        directory.announce(one, [(TOPIC, "one")])
        assert len(reader.look_up(TOPIC)) == 1
        directory.withdraw(one.instance)
        assert reader.look_up(TOPIC) == []


def test_restart_with_an_empty_database(fresh: RedisServer, opened: Opener) -> None:
    directory, reader = opened(fresh), opened(fresh)
    one, late = node(1), node(2)
    directory.announce(one, [(TOPIC, "one")])
    reader.look_up(TOPIC)
    assert wait_until(lambda: changed(reader))
    fresh.restart()
    assert size(fresh) == 0
    wait_until(lambda: answers(reader))
    assert [entry.server for entry in reader.look_up(TOPIC)] == ["one"]
    directory.announce(one, [(TOPIC, "one")])
    directory.announce(late, [(TOPIC, "late")])
    assert {entry.server for entry in reader.look_up(TOPIC)} == {"one", "late"}
    with fresh.client() as client:
        assert client.zcard("green_zmq:members") == 3


def test_gap_is_caught_up_with(redis: RedisServer, opened: Opener) -> None:
    """What is pushed while the connection for it is cut off was missed: then anything may have changed."""
    with Proxy(redis) as proxy:
        reader, writer = opened(proxy), opened(redis)
        assert reader.look_up(TOPIC) == []
        take_news(reader)
        reader.changes()
        proxy.refuse()
        proxy.cut()
        with pytest.raises(DirectoryError):
            take_until_lost(reader)
        writer.announce(node(), [(TOPIC, "s")])
        proxy.accept()
        wait_until(lambda: answers(reader))
        assert reader.changes() is None
        assert [entry.server for entry in reader.look_up(TOPIC)] == ["s"]
        writer.announce(node(), [(TOPIC, "t")])
        wait_until(lambda: changed(reader))


def take_until_lost(directory: Directory) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        take_news(directory)
    raise AssertionError("the loss was not noticed")


def test_lost_connection_mends_itself_without_being_asked(fresh: RedisServer, opened: Opener) -> None:
    reader = opened(fresh)
    reader.look_up(TOPIC)
    fresh.kill()
    wake = os.eventfd(0)
    with pytest.raises(DirectoryError, match="Connection"):
        reader.wait(wake)
    with pytest.raises(DirectoryError):
        reader.wait(wake)
    fresh.start()

    def mended() -> bool:
        try:
            reader.wait(wake)
        except DirectoryError:
            return False
        return True

    wait_until(mended, 10)
    os.close(wake)
    writer = opened(fresh)
    writer.announce(node(), [(TOPIC, "s")])
    wait_until(lambda: changed(reader))


def test_idle_connections_may_be_closed_by_redis(redis: RedisServer, opened: Opener) -> None:
    directory = opened(redis)
    directory.announce(node(), [(TOPIC, "s")])
    for _ in range(5):
        with redis.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
            client.client_kill_filter(_type="pubsub", skipme=True)
        assert len(directory.look_up(TOPIC)) == 1


def test_away_is_an_error_at_once(fresh: RedisServer, opened: Opener) -> None:
    directory = opened(fresh)
    one = node()
    directory.announce(one, [(TOPIC, "s")])
    fresh.kill()
    for ask in (
        lambda: directory.look_up(TOPIC),
        lambda: directory.is_alive(one),
        lambda: directory.announce(one, []),
        lambda: directory.withdraw(one.instance),
        lambda: list(directory.listings()),
        directory.sweep,
    ):
        with pytest.raises(DirectoryError) as caught:
            ask()
        assert fresh.address in str(caught.value)
        assert "check that it runs" in str(caught.value)
    assert directory.changes() is None or directory.changes() == set()
    fresh.start()
    directory.announce(one, [(TOPIC, "s")])
    assert directory.look_up(TOPIC) == [Entry("s", one)]


def test_redis_that_hangs_is_an_error_in_time(fresh: RedisServer, opened: Opener) -> None:
    directory = opened(fresh, redis_timeout=0.3)
    fresh.pause()
    try:
        begin = time.monotonic()
        with pytest.raises(DirectoryError, match=r"[Tt]imeout|does not answer"):
            directory.look_up(TOPIC)
        assert time.monotonic() - begin < 5
    finally:
        fresh.resume()
    wait_until(lambda: answers(directory))


@pytest.mark.parametrize("size", [1, 2, 5, 20, 60, 150, 400])
def test_reply_that_is_cut_off_is_not_taken_for_another(redis: RedisServer, opened: Opener, size: int) -> None:
    with Proxy(redis) as proxy:
        directory = opened(proxy)
        one, two = node(1), node(2)
        other = TOPIC._replace(name="other")
        directory.announce(one, [(TOPIC, "one")])
        directory.announce(two, [(other, "two")])
        for _ in range(5):
            proxy.cut_after(size)
            for topic, entry in ((TOPIC, Entry("one", one)), (other, Entry("two", two))) * 2:
                with contextlib.suppress(DirectoryError):
                    assert directory.look_up(topic) == [entry]
                with contextlib.suppress(DirectoryError):
                    assert directory.is_alive(one)
        wait_until(lambda: answers(directory))
        assert directory.look_up(other) == [Entry("two", two)]


def test_late_reply_is_not_taken_for_another(redis: RedisServer, opened: Opener) -> None:
    with Proxy(redis) as proxy:
        directory = opened(proxy, redis_timeout=0.3)
        one, two = node(1), node(2)
        other = TOPIC._replace(name="other")
        directory.announce(one, [(TOPIC, "one")])
        directory.announce(two, [(other, "two")])
        directory.look_up(other)
        proxy.stall(requests=False)
        with pytest.raises(DirectoryError):
            directory.look_up(TOPIC)
        proxy.flow()
        for _ in range(10):
            wait_until(lambda: answers(directory))
            assert directory.look_up(other) == [Entry("two", two)]
            assert directory.look_up(TOPIC) == [Entry("one", one)]


# Who may.


def test_password(opened: Opener) -> None:
    with RedisServer(password="p@ss/w:rd, ü") as server:
        right = opened(f"zmq+redis://:p%40ss%2Fw%3Ard%2C%20%C3%BC@{server.address}/0")
        right.announce(node(), [(TOPIC, "s")])
        for credentials in ("", ":wrong@", "nobody:wrong@"):
            with pytest.raises(DirectoryError, match="user and password") as caught:
                opened(f"zmq+redis://{credentials}{server.address}/0")
            assert "wrong@" not in str(caught.value)


def test_user_that_may_do_just_what_is_needed(opened: Opener) -> None:
    """The rules are those of the deployment guide."""
    rules = "resetkeys resetchannels ~cloud:* &cloud:* -@all +@connection +@pubsub"
    rules += " +eval +getex +get +set +del +exists +mget"
    rules += " +@stream +multi +exec +time +scan +hget +hincrby +hexists"
    rules += " +zadd +zrem +zcard +zrange +zrangebylex +pttl +pexpire"
    with RedisServer(username="green", password="secret", rules=rules) as server:
        directory = opened(f"zmq+redis://green:secret@{server.address}/0", redis_prefix="cloud")
        one = node()
        directory.announce(one, [(TOPIC, "s")])
        directory.announce(one, [(TOPIC, "s"), (TOPIC, "t")])
        assert len(directory.look_up(TOPIC)) == 2
        assert directory.is_alive(one)
        assert directory.sweep() == []
        assert len(list(directory.listings())) == 2
        assert changed(directory)
        assert directory.withdraw(one.instance)
        with pytest.raises(DirectoryError, match="user and password"):
            opened(f"zmq+redis://green:secret@{server.address}/0", redis_prefix="another").look_up(TOPIC)
        use_store(f"zmq+redis://green:secret@{server.address}/0?redis_prefix=cloud&notification_messages=2")


def use_store(url: str) -> None:
    """Everything that a store of notifications does."""
    with contextlib.ExitStack() as stack:
        store, other = (open_store(read(url)) for _ in range(2))
        stack.callback(store.close)
        stack.callback(other.close)
        consumer = store.consume([TOPIC], "")
        place, _ = other.since(TOPIC, None)
        other.append([(TOPIC, b"1"), (TOPIC, b"2")])
        other.append([(TOPIC, b"3")])
        first, second, third = consumer.take(3)
        consumer.acknowledge([first])
        consumer.give_back([second], tried=True)
        consumer.put_aside([third])
        (dead,) = other.dead()
        assert other.put_back([dead.name]) == 1
        assert sorted(each.body for each in consumer.take(3)) == [b"2", b"3"]
        assert len(other.overview()) == 1
        assert other.since(TOPIC, place)[1]
        other.trim([TOPIC])
        consumer.close()


def test_tls(redis: RedisServer, opened: Opener, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    with Proxy(redis, tls=certificates.server()) as proxy:
        directory = opened(proxy, redis_tls="true", redis_ca_file=certificates.authority)
        one = node()
        directory.announce(one, [(TOPIC, "s")])
        assert directory.look_up(TOPIC) == [Entry("s", one)]
        opened(redis).announce(node(), [(TOPIC, "t")])
        wait_until(lambda: changed(directory))
        for options in ({}, {"redis_tls": "true"}):
            with pytest.raises(DirectoryError, match=f"{proxy.address}"):
                opened(proxy, redis_timeout=1, **options)


def test_tls_with_our_certificate(redis: RedisServer, opened: Opener, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    with Proxy(redis, tls=certificates.server(ask_client=True)) as proxy:
        options = {"redis_tls": "true", "redis_ca_file": certificates.authority, "redis_timeout": 1}
        opened(proxy, **options, redis_cert_file=certificates.client).announce(node(), [(TOPIC, "s")])
        with pytest.raises(DirectoryError):
            opened(proxy, **options)


# Several hosts.


def test_next_host_is_used_when_one_is_away(fresh: RedisServer, redis: RedisServer, opened: Opener) -> None:
    directory = opened(f"zmq+redis://{fresh.address},{redis.address}/0")
    directory.announce(node(), [(TOPIC, "s")])
    assert (size(fresh), size(redis)) == (2, 0)
    fresh.kill()
    directory.announce(node(), [(TOPIC, "t")])
    assert size(redis) == 2
    assert [entry.server for entry in opened(f"zmq+redis://{fresh.address},{redis.address}/0").look_up(TOPIC)] == ["t"]


def test_replica_is_passed_over_for_writing(redis: RedisServer, opened: Opener) -> None:
    with RedisServer(replica_of=redis) as replica:
        both = opened(f"zmq+redis://{replica.address},{redis.address}/0")
        both.announce(node(), [(TOPIC, "s")])
        assert size(redis) == 2
        alone = opened(f"zmq+redis://{replica.address}/0")
        with pytest.raises(DirectoryError, match="replica"):
            alone.announce(node(), [(TOPIC, "s")])


# Sentinel.


def test_failover_is_followed(opened: Opener) -> None:
    with SentinelCluster() as cluster:
        url = f"zmq+sentinel://{cluster.addresses}/{cluster.group}"
        directory, reader = opened(url), opened(url)
        one = node()
        directory.announce(one, [(TOPIC, "one")])
        reader.look_up(TOPIC)
        master = cluster.master()
        with master.client() as client:
            client.execute_command("WAIT", 2, 5000)
        old = cluster.kill_master()
        with pytest.raises(DirectoryError, match="sentinels"):
            reader.look_up(TOPIC)
        cluster.wait_for_failover(old)
        wait_until(lambda: answers(reader))
        assert [entry.server for entry in reader.look_up(TOPIC)] == ["one"]
        late = node(2)
        wait_until(lambda: announced(directory, late))
        wait_until(lambda: changed(reader))
        assert {entry.server for entry in reader.look_up(TOPIC)} == {"one", "late"}


def announced(directory: Directory, one: Node) -> bool:
    with contextlib.suppress(DirectoryError):
        directory.announce(one, [(TOPIC, "late")])
        return True
    return False


def test_sentinels_with_passwords(opened: Opener) -> None:
    with SentinelCluster(password="inner", sentinel_password="outer") as cluster:
        url = f"zmq+sentinel://:inner@{cluster.addresses}/{cluster.group}/3"
        directory = opened(url, redis_sentinel_password="outer")
        directory.announce(node(), [(TOPIC, "s")])
        assert size(cluster.master(), 3) == 2
        with pytest.raises(DirectoryError):
            opened(url)


def test_unknown_group_and_no_sentinel(opened: Opener) -> None:
    with SentinelCluster() as cluster:
        with pytest.raises(DirectoryError, match="blue") as caught:
            opened(f"zmq+sentinel://{cluster.addresses}/blue")
        assert len(str(caught.value)) < 400, "redis-py tells all of its clients"
        addresses = cluster.addresses
    with pytest.raises(DirectoryError, match=addresses):
        opened(f"zmq+sentinel://{addresses}/{cluster.group}")
