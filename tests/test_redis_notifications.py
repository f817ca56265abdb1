# SPDX-License-Identifier: Apache-2.0
"""What the store of notifications in Redis does beyond others: the database is lost, connections are cut, servers fail over."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from green_zmq.errors import StoreError
from green_zmq.notifications import Busy, Consumer, Store, Taken
from green_zmq.routing import Topic
from tests.contract.harness import wait_until
from tests.servers import Certificates, Proxy, RedisServer, SentinelCluster
from tests.test_notification_stores import Opener, bodies, numbers, send, send_at_once, state, take

TOPIC = Topic("openstack", "notifications.info")
OTHER = Topic("openstack", "notifications.error")
STREAM = "green_zmq:notifications:stream:9:openstack18:notifications.info"
AGAIN = "green_zmq:notifications:again:9:openstack18:notifications.info"
DEAD = "green_zmq:notifications:dead"

Open = Callable[..., Opener]


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
def at() -> Iterator[Open]:
    """Opens stores at a server."""
    found: list[Opener] = []

    def opener(server: RedisServer | Proxy | str, **options: Any) -> Opener:
        url = server if isinstance(server, str) else f"zmq+redis://{server.address}/0"
        query = "&".join(f"{name}={value}" for name, value in options.items())
        found.append(Opener(f"{url}?{query}", Path()))
        return found[-1]

    yield opener
    for each in found:
        for opened in reversed(each.opened):
            with contextlib.suppress(StoreError):
                opened.close()


def attempt(job: Callable[[], Any]) -> bool:
    with contextlib.suppress(StoreError):
        job()
        return True
    return False


def take_through(consumer: Consumer, count: int, limit: float = 30.0) -> list[Taken]:
    """As ``take``, while Redis may be away."""
    return take(consumer, count, limit, [StoreError])


def begin_to_wait(consumer: Consumer) -> None:
    """Have it ask Redis for what comes, as it does while it waits."""
    wake = os.eventfd(1)
    assert consumer.take(10) == []
    consumer.wait(wake, 3600)
    os.close(wake)


def pending(server: RedisServer) -> int:
    with server.client() as client:
        return int(client.xpending(STREAM, "pool:")["pending"])


def blocked(server: RedisServer) -> int:
    with server.client() as client:
        return int(client.info("clients")["blocked_clients"])


# What it costs.


def test_append_is_one_command(redis: RedisServer, at: Open) -> None:
    store = at(redis)()
    with redis.client() as client:

        def total() -> int:
            return int(client.info("stats")["total_commands_processed"])

        before = total()
        send(store, TOPIC, *numbers(0, 10))
        assert total() - before == 11


def test_silence_costs_nothing(redis: RedisServer, at: Open) -> None:
    consumer = at(redis).consume([TOPIC, OTHER], takeover=3600)
    begin_to_wait(consumer)
    wake = os.eventfd(0)
    with redis.client() as client:
        before = client.info("stats")["total_commands_processed"]
        for _ in range(100):
            os.eventfd_write(wake, 1)
            assert consumer.take(10) == []
            consumer.wait(wake, 3600)
        assert client.info("stats")["total_commands_processed"] - before == 1
    os.close(wake)


def test_nothing_is_left_of_what_is_processed(redis: RedisServer, at: Open) -> None:
    opener = at(redis)
    store, consumer = opener(), opener.consume(TOPIC, takeover=1)
    send(store, TOPIC, *numbers(0, 3))
    taken = take(consumer, 3)
    consumer.give_back(taken[:1], tried=True)
    consumer.acknowledge([*taken[1:], *take(consumer, 1)])
    store.trim([TOPIC])
    assert state(store, TOPIC).kept == 0
    opener.leave(consumer)
    store.trim([TOPIC])
    assert store.overview() == []
    with redis.client() as client:
        wait_until(lambda: client.dbsize() == 0)
    # Whoever comes next begins where it has ended.
    send(store, TOPIC, b"3")
    assert bodies(take(opener.consume(TOPIC), 1)) == [b"3"]


def test_dead_consumers_are_forgotten(redis: RedisServer, at: Open) -> None:
    opener = at(redis)
    lives, wake = opener.consume(TOPIC, takeover=1), os.eventfd(0)
    for _ in range(5):
        opener.consume(TOPIC, takeover=1).take(1)
    with redis.client() as client:

        def alone() -> bool:
            lives.take(1)
            lives.wait(wake, 0.05)
            return len(client.xinfo_consumers(STREAM, "pool:")) == len(client.xinfo_consumers(AGAIN, "pool:")) == 1

        wait_until(alone)
    os.close(wake)


def test_clouds_with_prefixes_and_databases_do_not_meet(redis: RedisServer, at: Open) -> None:
    places = [(database, prefix) for database in (0, 1) for prefix in ("one", "two", "o*")]
    openers = {place: at(f"zmq+redis://{redis.address}/{place[0]}", redis_prefix=place[1]) for place in places}
    stores = {place: opener() for place, opener in openers.items()}
    for place, store in stores.items():
        send(store, TOPIC, repr(place).encode())
    for place, opener in openers.items():
        consumer = opener.consume(TOPIC)
        assert bodies(take(consumer, 1)) == [repr(place).encode()]
        assert consumer.take(10) == []
        assert [each.kept for each in stores[place].overview()] == [1]


# When it is away.


def test_away_is_an_error_at_once(fresh: RedisServer, at: Open) -> None:
    opener = at(fresh)
    store, consumer = opener(), opener.consume(TOPIC)
    send(store, TOPIC, b"0", b"1")
    taken = take(consumer, 1)
    fresh.kill()
    asks: list[Callable[[], object]] = [
        lambda: store.append([(TOPIC, b"2")]),
        lambda: store.append([(TOPIC, b"2"), (TOPIC, b"3")]),
        lambda: store.trim([TOPIC]),
        store.overview,
        store.dead,
        lambda: store.put_back(["1-1"]),
        lambda: store.since(TOPIC, None),
        lambda: store.since(TOPIC, "0-0"),
        lambda: opener.consume(TOPIC),
        lambda: consumer.take(1),
        lambda: consumer.acknowledge(taken),
        lambda: consumer.give_back(taken, tried=True),
        lambda: consumer.put_aside(taken),
        consumer.close,
    ]
    for ask in asks:
        with pytest.raises(StoreError) as caught:
            ask()
        assert fresh.address in str(caught.value)
        assert "check that it runs" in str(caught.value)


def test_wait_while_away_does_not_spin(fresh: RedisServer, at: Open) -> None:
    consumer = at(fresh).consume(TOPIC)
    begin_to_wait(consumer)
    fresh.kill()
    wake = os.eventfd(0)
    wait_until(lambda: not attempt(lambda: consumer.take(1)))
    end, rounds = time.monotonic() + 0.5, 0
    while (left := end - time.monotonic()) > 0:
        with contextlib.suppress(StoreError):
            consumer.take(1)
        consumer.wait(wake, left)
        rounds += 1
    os.close(wake)
    assert rounds < 20


def test_redis_that_hangs_is_an_error_in_time(fresh: RedisServer, at: Open) -> None:
    opener = at(fresh, redis_timeout=0.3)
    store, consumer = opener(), opener.consume(TOPIC)
    begin_to_wait(consumer)
    fresh.pause()
    try:
        with pytest.raises(StoreError, match=r"[Tt]imeout"):
            store.append([(TOPIC, b"in doubt")])
    finally:
        fresh.resume()
    wait_until(lambda: attempt(lambda: store.append([(TOPIC, b"sure")])))
    wait_until(lambda: b"sure" in bodies(take_through(consumer, 1)))


def test_restart_with_messages_in_hand(at: Open) -> None:
    with RedisServer("appendonly yes", "appendfsync always") as server:
        opener = at(server)
        store, consumer = opener(takeover=5), opener.consume(TOPIC, takeover=5)
        send(store, TOPIC, *numbers(0, 6))
        taken = take(consumer, 4)
        consumer.give_back(taken[3:], tried=True)
        server.restart(keep=True)
        rest = take_through(consumer, 3)
        assert {message.body: message.tries for message in rest} == {b"3": 2, b"4": 1, b"5": 1}
        consumer.acknowledge([*taken[:3], *rest])
        send(store, TOPIC, b"6")
        assert bodies(take(consumer, 1)) == [b"6"]
        (pool,) = state(store, TOPIC).pools
        assert pool[:4] == ("", 0, 1, 1)


@pytest.mark.parametrize("pool", ["", "pool"])
@pytest.mark.parametrize("waiting", [True, False])
def test_flushed_database_under_a_consumer(redis: RedisServer, at: Open, pool: str, waiting: bool) -> None:
    opener = at(redis)
    store, consumer, other = opener(), opener.consume([OTHER, TOPIC], pool), opener.consume(TOPIC, pool)
    send(store, TOPIC, b"before")
    taken = take(consumer, 1)
    if waiting:
        begin_to_wait(consumer)
        begin_to_wait(other)
    with redis.client() as client:
        client.flushall()
    send(store, TOPIC, *numbers(0, 5))
    for consume in (consumer.acknowledge, consumer.put_aside):
        consume(taken)  # nobody has it any more
    found = take(consumer, 3)
    found += take(other, 2)
    assert sorted(bodies(found)) == numbers(0, 5)
    send(store, OTHER, b"other")
    assert bodies(take(consumer, 1)) == [b"other"]


def test_restart_with_an_empty_database(fresh: RedisServer, at: Open) -> None:
    opener = at(fresh)
    store, consumer = opener(), opener.consume(TOPIC, "pool")
    begin_to_wait(consumer)
    fresh.restart()
    wait_until(lambda: attempt(lambda: store.append([(TOPIC, b"0")])))
    assert bodies(take_through(consumer, 1)) == [b"0"]


def test_connection_that_is_cut_while_waiting_loses_nothing(redis: RedisServer, at: Open) -> None:
    with Proxy(redis) as proxy:
        store, opener = at(redis)(), at(proxy)
        consumer = opener.consume(TOPIC, takeover=3600)
        for i in range(5):
            begin_to_wait(consumer)
            wait_until(lambda: blocked(redis) == 1)
            proxy.stall(requests=False)
            send(store, TOPIC, b"%d" % i)
            wait_until(lambda: pending(redis) == 1)  # it is under way
            proxy.cut()
            proxy.flow()
            (message,) = take_through(consumer, 1)
            assert (message.body, message.tries) == (b"%d" % i, 1)
            consumer.acknowledge([message])
        assert consumer.take(10) == []


def test_what_went_to_a_connection_that_redis_took_for_alive_comes_again(redis: RedisServer, at: Open) -> None:
    opener = at(redis)
    store, consumer = opener(), opener.consume(TOPIC, takeover=1)
    with redis.client() as client:
        (about,) = client.xinfo_consumers(STREAM, "pool:")
        send(store, TOPIC, b"0", b"1")
        client.xreadgroup("pool:", about["name"], {STREAM: ">"}, count=1)
    assert sorted(bodies(take(consumer, 2))) == [b"0", b"1"]
    assert consumer.take(10) == []


def test_wait_mends_a_lost_connection(redis: RedisServer, at: Open) -> None:
    opener = at(redis)
    store, consumer = opener(), opener.consume(TOPIC)
    for i in range(5):
        begin_to_wait(consumer)
        with redis.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
        store.append([(TOPIC, b"%d" % i)])
        assert bodies(take(consumer, 1)) == [b"%d" % i]


def test_append_in_doubt_is_not_repeated(redis: RedisServer, at: Open) -> None:
    with Proxy(redis) as proxy, redis.client() as client:
        store = at(proxy)()
        store.append([(TOPIC, b"0")])
        proxy.cut_after(0)
        with pytest.raises(StoreError, match=r"Connection|reading"):
            store.append([(TOPIC, b"1")])
        assert client.xlen(STREAM) == 2
        store.overview()
        proxy.cut_after(1)
        with pytest.raises(StoreError, match=r"Connection|reading"):
            store.append([(TOPIC, b"2"), (TOPIC, b"3")])
        assert client.xlen(STREAM) == 4
        # Here it is certain.
        client.client_kill_filter(_type="normal", skipme=True)
        wait_until(lambda: proxy.open == 0)
        store.append([(TOPIC, b"4")])
        assert client.xlen(STREAM) == 5


def test_append_at_once_is_one_command_or_none(redis: RedisServer, at: Open) -> None:
    with Proxy(redis) as proxy, redis.client() as client:
        store = at(proxy)()
        send_at_once(store, TOPIC, b"0")
        with pytest.raises(Busy):
            send_at_once(store, TOPIC, bytes(1 << 20))
        client.client_kill_filter(_type="normal", skipme=True)
        wait_until(lambda: proxy.open == 0)
        with pytest.raises(Busy):
            send_at_once(store, TOPIC, b"1")
        assert client.xlen(STREAM) == 1
        store.overview()
        proxy.cut_after(1)
        with pytest.raises(StoreError, match=r"Connection|reading"):
            send_at_once(store, TOPIC, b"2")
        assert client.xlen(STREAM) == 2
        with pytest.raises(Busy):
            send_at_once(store, TOPIC, b"3")


def test_append_at_once_to_redis_that_hangs(fresh: RedisServer, at: Open) -> None:
    store = at(fresh, redis_timeout=1)()
    fresh.pause()
    with pytest.raises(StoreError, match="did not answer in time"):
        send_at_once(store, TOPIC, b"0")
    fresh.resume()
    store.append([(TOPIC, b"1")])
    send_at_once(store, TOPIC, b"2")
    with fresh.client() as client:
        assert [fields[b"body"] for _, fields in client.xrange(STREAM)][-2:] == [b"1", b"2"]


@pytest.mark.parametrize("size", [1, 2, 5, 20, 60, 150, 400])
def test_replies_that_are_cut_off(redis: RedisServer, at: Open, size: int) -> None:
    with Proxy(redis) as proxy:
        opener = at(proxy)
        store, consumer = at(redis)(), opener.consume([TOPIC, OTHER], takeover=3600)
        done: dict[bytes, int] = {}
        for i in range(20):
            store.append([(TOPIC, b"a%d" % i), (OTHER, b"b%d" % i)])
            proxy.cut_after(size)
            taken = take_through(consumer, 2)
            wait_until(lambda taken=taken: attempt(lambda: consumer.give_back(taken[:1], tried=False)))
            taken[:1] = take_through(consumer, 1)
            wait_until(lambda taken=taken: attempt(lambda: consumer.acknowledge(taken)))
            for message in taken:
                assert message.tries == 1
                done[message.body] = done.get(message.body, 0) + 1
        assert done == {b"%s%d" % (name, i): 1 for name in (b"a", b"b") for i in range(20)}


# What is refused.


def test_short_memory_is_told_and_recovered_from(redis: RedisServer, at: Open) -> None:
    opener = at(redis)
    store, consumer = opener(messages=3), opener.consume(TOPIC)
    send(store, TOPIC, *numbers(0, 5))
    with redis.client() as client:
        client.config_set("maxmemory", 1)
        try:
            for messages in ([(TOPIC, b"x")], [(TOPIC, b"x"), (OTHER, b"x")]):
                with pytest.raises(StoreError, match="raise maxmemory"):
                    store.append(messages)
            with pytest.raises(StoreError, match="raise maxmemory"):
                send_at_once(store, TOPIC, b"x")
            assert client.xlen(STREAM) == 5
            # What is there can be processed, also by those that begin now.
            taken = take(consumer, 3)
            consumer.acknowledge(taken[:1])
            consumer.give_back(taken[1:2], tried=True)
            consumer.put_aside(taken[2:])
            opener.leave(consumer)
            late = opener.consume(TOPIC)
            assert sorted(bodies(take(late, 3))) == [b"1", b"3", b"4"]
            assert [each.body for each in store.dead()] == [b"2"]
            store.trim([TOPIC])
            assert store.put_back([each.name for each in store.dead()]) == 1
            assert bodies(take(late, 1)) == [b"2"]
        finally:
            client.config_set("maxmemory", 0)
    send(store, TOPIC, b"5")
    assert bodies(take(late, 1)) == [b"5"]


def test_batch_is_kept_whole_or_not_at_all(redis: RedisServer, at: Open) -> None:
    store = at(redis)()
    with redis.client() as client:
        client.set(STREAM, "text")
        with pytest.raises(StoreError, match="WRONGTYPE"):
            store.append([(OTHER, b"0"), (TOPIC, b"1"), (OTHER, b"2")])
        client.delete(STREAM)
    assert [each.kept for each in store.overview()] == [0]


def test_disk_that_fails(at: Open, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with RedisServer(f"dir {folder}", "save 3600 1") as server, server.client() as client:
        store = at(server)()
        store.append([(TOPIC, b"0")])
        shutil.rmtree(folder)
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        with pytest.raises(StoreError, match="cannot write to its disk"):
            store.append([(TOPIC, b"1")])
        with pytest.raises(StoreError, match="cannot write to its disk"):
            store.trim([TOPIC])
        client.config_set("stop-writes-on-bgsave-error", "no")
        store.append([(TOPIC, b"2")])
        assert state(store, TOPIC).kept == 2
        client.config_set("save", "")  # or it does not end


def test_replica_is_passed_over(redis: RedisServer, at: Open) -> None:
    with RedisServer(replica_of=redis) as replica:
        url = f"zmq+redis://{replica.address},{redis.address}/0"
        store = at(url)()
        store.append([(TOPIC, b"0")])
        assert bodies(take(at(url).consume(TOPIC), 1)) == [b"0"]
        assert at(url)().trim([TOPIC]) == {}
        assert at(url)().put_back(["1-1"]) == 0
        alone = at(replica)
        for ask in (
            lambda: alone().append([(TOPIC, b"1")]),
            lambda: alone().append([(TOPIC, b"1"), (TOPIC, b"2")]),
            lambda: alone().trim([TOPIC]),
            lambda: alone.consume(TOPIC),
        ):
            with pytest.raises(StoreError, match="it is a replica"):
                ask()
    assert state(store, TOPIC).kept == 1


def test_next_host_is_used_when_one_is_away(fresh: RedisServer, redis: RedisServer, at: Open) -> None:
    opener = at(f"zmq+redis://{fresh.address},{redis.address}/0")
    store, consumer = opener(), opener.consume(TOPIC)
    store.append([(TOPIC, b"0")])
    fresh.kill()
    wait_until(lambda: attempt(lambda: store.append([(TOPIC, b"1")])))
    assert bodies(take_through(consumer, 1)) in ([b"0"], [b"1"])
    with redis.client() as client:
        assert client.xlen(STREAM) == 1


def test_user_that_may_do_just_what_is_needed(at: Open) -> None:
    rules = "resetkeys resetchannels ~cloud:* -@all +@connection +multi +exec +eval +time +scan +set +del +exists"
    rules += " +xadd +xack +xdel +xgroup +xinfo +xlen +xpending +xrange +xrevrange +xreadgroup +xtrim +hget +hexists +hincrby"
    with RedisServer(username="green", password="secret", rules=rules) as server:
        opener = at(f"zmq+redis://green:secret@{server.address}/0", redis_prefix="cloud")
        store, consumer = opener(messages=2), opener.consume(TOPIC, takeover=1)
        other = opener.consume(TOPIC, takeover=1)
        begin_to_wait(other)
        assert other.take(0) == []
        store.append([(TOPIC, b"%d" % i) for i in range(5)])
        taken = take(consumer, 3)
        consumer.acknowledge(taken[:1])
        consumer.put_aside(taken[1:2])
        take(other, 3)
        consumer.give_back(taken[2:], tried=True)
        store.put_back([each.name for each in store.dead()])
        store.trim([TOPIC])
        store.since(TOPIC, store.since(TOPIC, None)[0])
        assert len(store.overview()) == 1
        with pytest.raises(StoreError, match="correct the user"):
            at(f"zmq+redis://green:wrong@{server.address}/0")()
        outside = at(f"zmq+redis://green:secret@{server.address}/0", redis_prefix="another")()
        for ask in (
            lambda: outside.append([(TOPIC, b"")]),
            lambda: outside.trim([TOPIC]),
            lambda: outside.consume([TOPIC], ""),
            lambda: outside.since(TOPIC, None),
        ):
            with pytest.raises(StoreError, match="what that user may do"):
                ask()


def refusals(asks: list[Callable[[], object]]) -> list[str]:
    """What is said of those that fail."""
    said = []
    for ask in asks:
        try:
            ask()
        except StoreError as error:
            said.append(str(error))
    return said


def everything(store: Store, consumer: Consumer, taken: list[Taken]) -> list[Callable[[], object]]:
    return [
        lambda: store.append([(TOPIC, b"x")]),
        lambda: store.trim([TOPIC]),
        store.overview,
        store.dead,
        lambda: store.put_back(["1-1"]),
        lambda: store.since(TOPIC, None),
        lambda: store.since(TOPIC, "0-0"),
        lambda: consumer.take(5),
        lambda: consumer.put_aside(taken[1:2]),
        lambda: consumer.give_back(taken[:1], tried=True),
    ]


@pytest.mark.parametrize("key", [STREAM, AGAIN, DEAD, "green_zmq:notifications:dropped"])
def test_keys_of_another_kind_are_an_error_that_says_so(redis: RedisServer, at: Open, key: str) -> None:
    opener = at(redis)
    store, consumer = opener(messages=1), opener.consume(TOPIC)
    send(store, TOPIC, *numbers(0, 10))
    taken = take(consumer, 3)
    with redis.client() as client:
        client.delete(key)
        client.set(key, "text")
        refused = refusals(everything(store, consumer, taken))
        assert refused
        assert all("WRONGTYPE" in said and "redis_prefix" in said for said in refused)
        client.delete(key)
        if key == DEAD:
            consumer.put_aside(taken[1:2])
            assert [each.body for each in store.dead()] == [b"1"]


@pytest.mark.parametrize("fields", [{"a": "b"}, {"tries": "many", "body": "x"}])
def test_entries_that_are_none_of_ours_are_an_error_that_says_so(redis: RedisServer, at: Open, fields: dict[Any, Any]) -> None:
    opener = at(redis)
    store, consumer = opener(messages=1), opener.consume(TOPIC)
    send(store, TOPIC, *numbers(0, 5))
    taken = take(consumer, 3)
    with redis.client() as client:
        for key in (STREAM, AGAIN, DEAD):
            client.xadd(key, fields)
        client.set("green_zmq:notifications:stream:other", "text")
    refused = refusals(everything(store, consumer, taken))
    assert refused
    assert all("redis_prefix" in said for said in refused)


def test_password_and_tls(redis: RedisServer, at: Open, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    with RedisServer(password="secret") as server, Proxy(server, tls=certificates.server()) as proxy:
        url = f"zmq+redis://:secret@{proxy.address}/0"
        opener = at(url, redis_tls="true", redis_ca_file=certificates.authority)
        store, consumer = opener(), opener.consume(TOPIC)
        begin_to_wait(consumer)
        bodies_sent = [os.urandom(100_000) for _ in range(5)]
        threading.Thread(target=lambda: send(store, TOPIC, *bodies_sent)).start()
        assert bodies(take(consumer, 5)) == bodies_sent


# Sentinel.


def test_failover_is_followed(at: Open) -> None:
    with SentinelCluster() as cluster:
        opener = at(f"zmq+sentinel://{cluster.addresses}/{cluster.group}")
        store, consumer, waiting = opener(), opener.consume(TOPIC), opener.consume(OTHER)
        send(store, TOPIC, *numbers(0, 4))
        taken = take(consumer, 2)
        begin_to_wait(waiting)
        with cluster.master().client() as client:
            client.execute_command("WAIT", 2, 5000)
        old = cluster.kill_master()
        with pytest.raises(StoreError, match="sentinels"):
            store.append([(TOPIC, b"lost")])
        cluster.wait_for_failover(old)
        wait_until(lambda: attempt(lambda: store.append([(TOPIC, b"4"), (OTHER, b"5")])))
        wait_until(lambda: attempt(lambda: consumer.acknowledge(taken)))
        assert bodies(take_through(consumer, 3)) == numbers(2, 5)
        assert consumer.take(10) == []
        assert bodies(take_through(waiting, 1)) == [b"5"]
