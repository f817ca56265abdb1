# SPDX-License-Identifier: Apache-2.0
"""What every store of notifications must do."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest

from green_zmq.config import Settings
from green_zmq.executors import threads
from green_zmq.notifications import Busy, Consumer, Dead, State, Store, Taken, open_store
from green_zmq.routing import Topic
from tests.contract.harness import wait_until
from tests.servers import RedisServer, SentinelCluster
from tests.test_config import read

fork = multiprocessing.get_context("fork")

# The stores that everything here is run over.
KINDS = ["memory", "sqlite", "redis", "sentinel"]
# Those that several processes share.
SHARED = [kind for kind in KINDS if kind != "memory"]


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    with RedisServer() as server, SentinelCluster() as cluster:
        yield {
            "memory": "zmq+memory://",
            "sqlite": "zmq://",
            "redis": f"zmq+redis://{server.address}/0",
            "sentinel": f"zmq+sentinel://{cluster.addresses}/{cluster.group}",
        }


def settings_of(url: str, path: Path, **bounds: Any) -> Settings:
    settings = read(url)
    return dataclasses.replace(settings, notification_path=path, bounds=dataclasses.replace(settings.bounds, **bounds))


class Opener:
    """Opens stores that share everything, and closes them in the end."""

    def __init__(self, url: str, path: Path) -> None:
        self.url = url
        self.path = path
        self.opened: list[Store | Consumer] = []

    def __call__(self, **bounds: Any) -> Store:
        store = open_store(settings_of(self.url, self.path, **bounds))
        self.opened.append(store)
        return store

    def consume(self, topics: Topic | Collection[Topic], pool: str = "", **bounds: Any) -> Consumer:
        """A consumer with a store of its own."""
        consumer = self(**bounds).consume([topics] if isinstance(topics, Topic) else topics, pool)
        self.opened.append(consumer)
        return consumer

    def leave(self, consumer: Consumer) -> None:
        consumer.close()
        self.opened.remove(consumer)

    def close(self) -> None:
        for each in reversed(self.opened):
            each.close()


@pytest.fixture(params=KINDS)
def opener(request: pytest.FixtureRequest, urls: dict[str, str], tmp_path: Path) -> Iterator[Opener]:
    made = Opener(urls[request.param], tmp_path / "notifications.sqlite")
    yield made
    made.close()


@pytest.fixture
def store(opener: Opener) -> Store:
    return opener()


@pytest.fixture
def topic() -> Topic:
    """A new one for each test: the stores are the same for several."""
    return Topic(f"ex-{os.urandom(4).hex()}", "notifications.info")


@pytest.fixture
def wake() -> Iterator[int]:
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    yield descriptor
    os.close(descriptor)


def take(consumer: Consumer, count: int, limit: float = 20.0, ignored: Collection[type[Exception]] = ()) -> list[Taken]:
    """So many messages, as they come.

    :param ignored: errors that the store may have meanwhile.
    """
    taken: list[Taken] = []
    wake = os.eventfd(0)
    end = time.monotonic() + limit
    try:
        while len(taken) < count:
            assert time.monotonic() < end, f"only {len(taken)} of {count} came in time"
            with contextlib.suppress(*ignored):
                taken += consumer.take(count - len(taken))
                if len(taken) < count:
                    consumer.wait(wake, 0.1)
    finally:
        os.close(wake)
    return taken


def bodies(messages: Sequence[Taken]) -> list[bytes]:
    return [message.body for message in messages]


def numbers(begin: int, end: int) -> list[bytes]:
    return [b"%d" % i for i in range(begin, end)]


def send(store: Store, topic: Topic, *contents: bytes) -> None:
    for body in contents:
        store.append([(topic, body)])


def send_at_once(store: Store, topic: Topic, body: bytes) -> None:
    """As a thread does that sends a notification."""
    with contextlib.closing(store.append_at_once(topic, body)) as steps:
        for fd, seconds in steps:
            threads.wait_readable(fd, seconds)


def state(store: Store, topic: Topic) -> State:
    (found,) = [state for state in store.overview() if state.topic == topic]
    return found


def dead(store: Store, topic: Topic) -> list[Dead]:
    return [each for each in store.dead() if each.topic == topic]


# What is sent is taken.


def test_what_is_sent_is_taken_in_its_order(opener: Opener, store: Store, topic: Topic) -> None:
    consumer = opener.consume(topic)
    assert not consumer.take(10)
    send(store, topic, *numbers(0, 5))
    store.append([(topic, body) for body in numbers(5, 20)])
    taken = [*take(consumer, 7), *take(consumer, 13)]
    assert bodies(taken) == numbers(0, 20)
    assert {(message.topic, message.tries) for message in taken} == {(topic, 1)}
    assert len({message.name for message in taken}) == 20
    assert not consumer.take(10)


def test_what_is_sent_at_once_is_taken_in_its_order(opener: Opener, store: Store, topic: Topic, wake: int) -> None:
    consumer = opener.consume(topic)
    for body in numbers(0, 10):
        send_at_once(store, topic, body)
    assert bodies(take(consumer, 10)) == numbers(0, 10)
    assert consumer.take(1) == []
    timer = threading.Timer(0.2, send_at_once, [store, topic, b"10"])
    timer.start()
    begun = time.monotonic()
    while not (taken := consumer.take(1)):
        consumer.wait(wake, 30)
        assert time.monotonic() - begun < 20, "it was not woken"
    timer.join()
    assert bodies(taken) == [b"10"]


def test_what_is_interrupted_leaves_the_store_usable(opener: Opener, store: Store, topic: Topic) -> None:
    consumer = opener.consume(topic)
    send_at_once(store, topic, b"0")
    with contextlib.closing(store.append_at_once(topic, b"in doubt")) as steps:
        for _ in steps:
            break
    with contextlib.suppress(Busy):
        send_at_once(store, topic, b"1")
    send(store, topic, b"2")
    send_at_once(store, topic, b"3")
    found = []
    while b"3" not in found:
        found += bodies(take(consumer, 1))
    assert [body for body in found if body not in (b"1", b"in doubt")] == [b"0", b"2", b"3"]


def test_nothing_may_be_sent(store: Store) -> None:
    store.append([])


def test_several_topics(opener: Opener, store: Store, topic: Topic) -> None:
    topics = [topic._replace(name=f"notifications.{i}") for i in range(14)]
    other = topic._replace(name="other")
    consumer = opener.consume(topics)
    store.append([(each, b"%d" % i) for i in range(4) for each in [*topics, other]])
    taken = take(consumer, 4 * 14)
    for each in topics:
        assert bodies([message for message in taken if message.topic == each]) == numbers(0, 4)
    assert not consumer.take(100)


def test_names_are_those_of_a_topic(opener: Opener, store: Store, topic: Topic) -> None:
    """The same name in another topic is another message."""
    other = topic._replace(name="other")
    consumer = opener.consume([topic, other])
    store.append([(topic, b"1"), (other, b"2")])
    one, two = sorted(take(consumer, 2), key=lambda message: message.body)
    consumer.acknowledge([one])
    consumer.give_back([two], tried=False)
    assert bodies(take(consumer, 1)) == [b"2"]


def test_take_respects_most(opener: Opener, store: Store, topic: Topic) -> None:
    topics = [topic._replace(name=str(i)) for i in range(7)]
    consumer = opener.consume(topics)
    store.append([(each, b"%d" % i) for i in range(10) for each in topics])
    taken = []
    for most in (1, 2, 0, 3, 5, 8, 13, 21, 0):
        some = consumer.take(most)
        assert len(some) == most
        taken += some
    taken += take(consumer, 17)
    for each in topics:
        assert bodies([message for message in taken if message.topic == each]) == numbers(0, 10)


@pytest.mark.parametrize("body", [b"", b"\0", bytes(range(256)), b"\xff\xfe\r\n$5", os.urandom(1 << 20)], ids=len)
def test_bodies_are_opaque(opener: Opener, store: Store, topic: Topic, body: bytes) -> None:
    consumer = opener.consume(topic)
    send(store, topic, body)
    taken = take(consumer, 1)
    consumer.give_back(taken, tried=True)
    again = take(consumer, 1)
    assert [*bodies(taken), *bodies(again)] == [body, body]
    consumer.put_aside(again)
    assert [each.body for each in dead(store, topic)] == [body]
    assert store.since(topic, store.since(topic._replace(name="other"), None)[0])[1] in ((), [], [body])


ODD = ["", "a:b", "3:a", "host@backend", "with spaces", "grün", "\0", "*?[x]\\", "pool:", "+"]


@pytest.mark.parametrize("odd", ODD)
def test_names_may_be_odd(opener: Opener, store: Store, topic: Topic, odd: str) -> None:
    exchange = topic.exchange
    topics = [Topic(exchange + odd, odd), Topic(exchange, odd + "x"), Topic(exchange + odd, "y" + odd)]
    pools = [odd, odd + "x", "y" + odd]
    consumers = {(each, pool): opener.consume(each, pool) for each in topics for pool in pools}
    store.append([(each, repr(each).encode()) for each in topics])
    for (each, pool), consumer in consumers.items():
        (message,) = taken = take(consumer, 1)
        assert (message.topic, message.body) == (each, repr(each).encode())
        assert not consumer.take(5)
        consumer.give_back(taken, tried=True)
        taken = take(consumer, 1)
        assert taken[0].tries == 2
        consumer.put_aside(taken)
        assert {(d.topic, d.pool) for d in dead(store, each)} == {(each, pool)}
        assert store.put_back([d.name for d in dead(store, each)]) == 1
        assert bodies(take(consumer, 1)) == [repr(each).encode()]
        assert each in {found.topic for found in store.overview()}
        assert pool in {found.name for found in state(store, each).pools}


# Pools.


def test_each_pool_gets_each_message_once(opener: Opener, store: Store, topic: Topic) -> None:
    consumers = [opener.consume(topic, pool) for pool in ("", "one", "two")]
    send(store, topic, *numbers(0, 10))
    for consumer in consumers:
        taken = take(consumer, 10)
        assert bodies(taken) == numbers(0, 10)
        consumer.acknowledge(taken[:5])
    for consumer in consumers:
        assert not consumer.take(10)


def test_members_of_a_pool_share(opener: Opener, store: Store, topic: Topic) -> None:
    one, two = opener.consume(topic, "pool"), opener.consume(topic, "pool")
    send(store, topic, *numbers(0, 10))
    assert sorted(bodies([*take(one, 4), *take(two, 6)])) == numbers(0, 10)


def test_members_that_wait_each_get_some(opener: Opener, store: Store, topic: Topic) -> None:
    got: dict[int, list[bytes]] = {0: [], 1: []}
    stop = threading.Event()

    def listen(number: int, consumer: Consumer, wake: int) -> None:
        while not stop.is_set():
            taken = consumer.take(10)
            consumer.acknowledge(taken)
            got[number] += bodies(taken)
            consumer.wait(wake, 10)

    consumers, wakes = [opener.consume(topic) for _ in got], [os.eventfd(0) for _ in got]
    threads = [threading.Thread(target=listen, args=(i, consumers[i], wakes[i])) for i in got]
    for thread in threads:
        thread.start()
    for i in range(10):
        send(store, topic, b"%d" % i)
        wait_until(lambda i=i: sum(map(len, got.values())) == i + 1)
    stop.set()
    for wake, thread in zip(wakes, threads, strict=True):
        os.eventfd_write(wake, 1)
        thread.join()
        os.close(wake)
    assert sorted(got[0] + got[1]) == numbers(0, 10)
    assert got[0]
    assert got[1]


def test_default_pool_has_what_was_sent_before_its_first_listener(opener: Opener, store: Store, topic: Topic) -> None:
    send(store, topic, *numbers(0, 3))
    store.trim([topic])
    assert bodies(take(opener.consume(topic), 3)) == numbers(0, 3)


def test_named_pool_begins_with_its_first_listener(opener: Opener, store: Store, topic: Topic) -> None:
    send(store, topic, b"before")
    consumer = opener.consume(topic, "pool")
    assert not consumer.take(10)
    send(store, topic, b"after")
    assert bodies(take(consumer, 1)) == [b"after"]


@pytest.mark.parametrize("pool", ["", "pool"])
def test_pool_has_what_was_sent_while_nobody_listened(opener: Opener, store: Store, topic: Topic, pool: str) -> None:
    consumer = opener.consume(topic, pool)
    send(store, topic, b"0")
    consumer.acknowledge(take(consumer, 1))
    opener.leave(consumer)
    store.trim([topic])
    send(store, topic, *numbers(1, 4))
    store.trim([topic])
    assert bodies(take(opener.consume(topic, pool), 3)) == numbers(1, 4)


# What becomes of messages.


def test_what_is_acknowledged_is_gone(opener: Opener, store: Store, topic: Topic) -> None:
    consumer = opener.consume(topic)
    send(store, topic, *numbers(0, 4))
    taken = take(consumer, 4)
    consumer.acknowledge(taken[:2])
    consumer.acknowledge([])
    consumer.acknowledge(taken[2:3])
    opener.leave(consumer)
    other = opener.consume(topic)
    assert bodies(take(other, 1)) == [b"3"]
    assert not other.take(10)


@pytest.mark.parametrize("tried", [True, False])
def test_what_is_given_back_is_taken_again(opener: Opener, store: Store, topic: Topic, tried: bool) -> None:
    consumer, other = opener.consume(topic), opener.consume(topic)
    elsewhere = opener.consume(topic, "elsewhere")
    send(store, topic, b"0")
    for times in range(1, 5):
        (message,) = taken = take(consumer, 1)
        assert message.tries == (times if tried else 1)
        consumer.give_back(taken, tried=tried)
    (message,) = take(other, 1)
    assert (message.body, message.tries) == (b"0", 5 if tried else 1)
    other.acknowledge([message])
    assert not consumer.take(10)
    assert not other.take(10)
    (message,) = take(elsewhere, 1)
    assert message.tries == 1
    assert not elsewhere.take(10)


def test_what_is_given_back_wakes(opener: Opener, store: Store, topic: Topic, wake: int) -> None:
    consumer, other = opener.consume(topic), opener.consume(topic)
    send(store, topic, b"0")
    taken = take(consumer, 1)
    assert not other.take(1)
    waiting = threading.Thread(target=lambda: take(other, 1))
    waiting.start()
    consumer.give_back(taken, tried=False)
    waiting.join(30)
    assert not waiting.is_alive()


def test_what_is_put_aside_is_told_of_and_can_be_put_back(opener: Opener, store: Store, topic: Topic) -> None:
    consumer, elsewhere = opener.consume(topic, "pool"), opener.consume(topic, "elsewhere")
    send(store, topic, *numbers(0, 3))
    taken = take(consumer, 3)
    consumer.give_back(taken[1:2], tried=True)
    (again,) = take(consumer, 1)
    consumer.put_aside(taken[:1])
    consumer.put_aside([again])
    assert not consumer.take(10)
    one, two = dead(store, topic)
    assert (one.pool, one.tries, one.body) == ("pool", 1, b"0")
    assert (two.pool, two.tries, two.body) == ("pool", 2, b"1")
    assert 0 <= two.age <= one.age < 60
    assert one.name != two.name
    assert store.put_back([one.name, "no such", "0-0", "-1", ""]) == 1
    assert store.put_back([one.name]) == 0
    (back,) = take(consumer, 1)
    assert (back.body, back.tries) == (b"0", 1)
    assert [each.name for each in dead(store, topic)] == [two.name]
    assert store.put_back([two.name]) == 1
    assert dead(store, topic) == []
    consumer.acknowledge([back, *taken[2:], *take(consumer, 1)])
    assert not consumer.take(10)
    assert sorted(bodies(take(elsewhere, 3))) == numbers(0, 3)
    assert not elsewhere.take(10)


def test_closing_gives_back_at_once(opener: Opener, store: Store, topic: Topic) -> None:
    consumer, other = opener.consume(topic, takeover=3600), opener.consume(topic, takeover=3600)
    send(store, topic, *numbers(0, 5))
    taken = take(consumer, 3)
    consumer.acknowledge(taken[:1])
    consumer.give_back(taken[1:2], tried=True)
    take(consumer, 1)
    opener.leave(consumer)
    found = {message.body: message.tries for message in take(other, 4)}
    assert found == {body: 2 if body == taken[1].body else 1 for body in numbers(0, 5) if body != taken[0].body}


# Waiting.


def test_wait_ends_when_there_is_more(opener: Opener, store: Store, topic: Topic, wake: int) -> None:
    consumer = opener.consume(topic)
    got: list[Taken] = []

    def listen() -> None:
        while len(got) < 3:
            got.extend(consumer.take(10))
            consumer.wait(wake, 3600)

    # Were it not woken, it would wait for an hour or, to tell that it lives, for some seconds, which is too long for three.
    thread = threading.Thread(target=listen)
    thread.start()
    for i in range(3):
        send(store, topic, b"%d" % i)
        wait_until(lambda i=i: len(got) == i + 1, 15)
    thread_ends(thread, wake)
    assert bodies(got) == numbers(0, 3)


def thread_ends(thread: threading.Thread, wake: int) -> None:
    os.eventfd_write(wake, 1)
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("most", [0, 5])
def test_wait_ends_when_woken(opener: Opener, topic: Topic, wake: int, most: int) -> None:
    consumer = opener.consume(topic)
    stop = threading.Event()

    def listen() -> None:
        while True:  # at least once: what it is woken by is to be taken
            consumer.take(most)
            consumer.wait(wake, 3600)
            if stop.is_set():
                return

    for _ in range(5):
        stop.clear()
        thread = threading.Thread(target=listen)
        thread.start()
        stop.set()
        thread_ends(thread, wake)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(wake)


@pytest.mark.parametrize("most", [0, 5])
def test_wait_does_not_spin(opener: Opener, store: Store, topic: Topic, wake: int, most: int) -> None:
    """With nothing to do, and with something that is not wanted."""
    consumer = opener.consume(topic)
    if not most:
        send(store, topic, b"0")
    end, rounds = time.monotonic() + 0.5, 0
    while (left := end - time.monotonic()) > 0:
        assert not consumer.take(most)
        consumer.wait(wake, left)
        rounds += 1
    assert rounds < 20


def test_wait_is_not_in_vain_when_there_is_more(opener: Opener, store: Store, topic: Topic, wake: int) -> None:
    """It has been taken as many as was asked for, and there are more."""
    consumer = opener.consume(topic)
    send(store, topic, *numbers(0, 20))
    found = []
    for _ in range(20):
        found += consumer.take(1)
        consumer.wait(wake, 3600)
    assert bodies(found) == numbers(0, 20)


def test_room_may_shrink_while_waiting(opener: Opener, store: Store, topic: Topic, wake: int) -> None:
    """What is not wanted any more is for others."""
    consumer, other = opener.consume(topic, takeover=3600), opener.consume(topic, takeover=3600)
    assert not consumer.take(10)
    os.eventfd_write(wake, 1)
    consumer.wait(wake, 3600)
    assert not consumer.take(0)
    send(store, topic, *numbers(0, 10))
    assert sorted(bodies(take(other, 10))) == numbers(0, 10)


def test_nothing_is_fetched_that_there_is_no_room_for(opener: Opener, store: Store, topic: Topic, wake: int) -> None:
    consumer = opener.consume(topic, takeover=3600)
    send(store, topic, b"0")
    assert bodies(take(consumer, 1)) == [b"0"]
    os.eventfd_write(wake, 1)
    consumer.wait(wake, 3600)
    send(store, topic, b"1")
    assert bodies(take(opener.consume(topic, takeover=3600), 1)) == [b"1"]


# Those that die.


def test_what_a_dead_consumer_had_is_taken_over(opener: Opener, store: Store, topic: Topic) -> None:
    consumer, other = opener.consume(topic, takeover=1), opener.consume(topic, takeover=1)
    send(store, topic, *numbers(0, 3))
    one, two, three = take(consumer, 3)
    consumer.give_back([one], tried=True)
    take(consumer, 1)
    consumer.acknowledge([two])
    # It is not used any more from here on, as if its thread had ended.
    found = {message.body: message.tries for message in take(other, 2)}
    assert found == {one.body: 3, three.body: 2}
    (pool,) = state(store, topic).pools
    assert (pool.waiting, pool.taken, pool.consumers) == (0, 2, 1)


def test_most_holds_for_what_is_taken_over(opener: Opener, store: Store, topic: Topic) -> None:
    consumer, other = opener.consume(topic, takeover=1), opener.consume(topic, takeover=1)
    send(store, topic, *numbers(0, 10))
    take(consumer, 10)
    found = take(other, 1)
    for _ in range(9):
        (message,) = other.take(1)
        found.append(message)
    assert sorted(bodies(found)) == numbers(0, 10)


@pytest.mark.slow
def test_what_a_living_consumer_has_is_left_to_it(opener: Opener, store: Store, topic: Topic, wake: int) -> None:
    consumer, other = opener.consume(topic, takeover=2), opener.consume(topic, takeover=2)
    send(store, topic, b"0")
    taken = take(consumer, 1)
    before = now = time.monotonic()
    end = now + 5
    while now < end:
        before, now = now, time.monotonic()
        assert not consumer.take(0)
        if found := other.take(1):
            assert time.monotonic() - before > 0.5, "it was taken for dead, and the machine did not stand still"
            consumer, other, taken = other, consumer, found
            end = time.monotonic() + 5
        other.wait(wake, 0.05)
    (pool,) = state(store, topic).pools
    assert (pool.taken, pool.consumers) == (1, 2)
    consumer.acknowledge(taken)


def test_who_was_slow_keeps_what_nobody_has_taken_over(opener: Opener, store: Store, topic: Topic) -> None:
    consumer = opener.consume(topic, takeover=1)
    send(store, topic, b"0", b"1")
    taken = take(consumer, 1)
    time.sleep(0.8)  # it is the time that is to pass, and nothing else
    assert bodies(take(consumer, 1)) == [b"1"]
    assert consumer.take(1) == []
    consumer.acknowledge(taken)
    (pool,) = state(store, topic).pools
    assert (pool.waiting, pool.taken, pool.consumers) == (0, 1, 1)


# Bounds.


def test_trim_removes_what_all_pools_have_processed(opener: Opener, store: Store, topic: Topic) -> None:
    assert store.trim([]) == {}
    assert store.trim([topic]) == {}
    consumers = [opener.consume(topic, pool) for pool in ("", "pool")]
    send(store, topic, *numbers(0, 5))
    taken = [take(consumer, 4) for consumer in consumers]
    assert store.trim([topic]) == {}
    assert state(store, topic).kept == 5
    consumers[0].acknowledge(taken[0])
    assert store.trim([topic]) == {}
    assert state(store, topic).kept == 5
    consumers[1].acknowledge(taken[1][:2])
    assert store.trim([topic]) == {}
    assert state(store, topic).kept == 3
    consumers[1].acknowledge(taken[1][2:])
    assert store.trim([topic, topic._replace(name="other")]) == {}
    assert (state(store, topic).kept, state(store, topic).dropped) == (1, 0)
    for consumer in consumers:
        assert bodies(take(consumer, 1)) == [b"4"]


def test_trim_keeps_no_more_than_the_bound(opener: Opener, topic: Topic) -> None:
    store = opener(messages=3)
    send(store, topic, *numbers(0, 5))
    assert store.trim([topic]) == {topic: 2}
    assert store.trim([topic]) == {}
    send(store, topic, *numbers(5, 6))
    assert store.trim([topic]) == {topic: 1}
    assert (state(store, topic).kept, state(store, topic).dropped) == (3, 3)
    consumer = opener.consume(topic)
    assert bodies(take(consumer, 3)) == numbers(3, 6)
    assert not consumer.take(10)


def test_trim_counts_what_some_pool_had_not_processed(opener: Opener, topic: Topic) -> None:
    store = opener(messages=3)
    consumer, slow = opener.consume(topic), opener.consume(topic, "slow")
    send(store, topic, *numbers(0, 10))
    taken = take(consumer, 10)
    consumer.acknowledge([*taken[:2], *taken[3:]])
    late = take(slow, 6)
    slow.acknowledge([*late[:1], *late[3:]])
    # 0: both have; 1: one had it; 2: both had; 3, 4, 5: both have; 6: one has not been given it. 7, 8, 9 stay.
    assert store.trim([topic]) == {topic: 3}
    assert state(store, topic).kept == 3
    assert bodies(take(slow, 3)) == numbers(7, 10)
    # What was theirs and is gone comes back to nobody, whatever they do with it.
    consumer.acknowledge(taken[2:3])
    slow.give_back(late[1:2], tried=True)
    assert not slow.take(10)
    assert not consumer.take(10)


def test_trim_counts_what_is_being_processed(opener: Opener, topic: Topic) -> None:
    store = opener(messages=3)
    consumer = opener.consume(topic)
    send(store, topic, *numbers(0, 10))
    taken = take(consumer, 10)
    assert store.trim([topic]) == {topic: 7}
    assert (state(store, topic).kept, state(store, topic).dropped) == (3, 7)
    consumer.give_back(taken, tried=False)
    assert sorted(bodies(take(consumer, 3))) == numbers(7, 10)
    assert not consumer.take(10)


def test_one_message_that_is_stuck_does_not_make_others_count(opener: Opener, topic: Topic) -> None:
    store = opener(messages=2)
    consumer = opener.consume(topic)
    send(store, topic, *numbers(0, 400))
    consumer.acknowledge(take(consumer, 400)[1:])
    assert store.trim([topic]) == {topic: 1}
    assert state(store, topic).kept <= 2


def test_trim_removes_what_is_old(opener: Opener, topic: Topic) -> None:
    store = opener(age=0.3)
    consumer = opener.consume(topic)
    send(store, topic, *numbers(0, 3))
    taken = take(consumer, 1)
    dropped = []
    wait_until(lambda: dropped.append(store.trim([topic]).get(topic, 0)) or sum(dropped) == 3)
    assert not consumer.take(10)
    assert opener.consume(topic).take(10) == []
    consumer.acknowledge(taken)
    send(store, topic, b"new")
    assert opener(age=3600).trim([topic]) == {}
    assert bodies(take(consumer, 1)) == [b"new"]


def test_what_is_to_be_given_again_is_bounded(opener: Opener, topic: Topic) -> None:
    store = opener(messages=3)
    consumer = opener.consume(topic)
    send(store, topic, *numbers(0, 10))
    consumer.give_back(take(consumer, 10), tried=True)
    assert store.trim([topic]) == {topic: 7}
    assert len(take(consumer, 3)) == 3
    assert not consumer.take(10)


def test_what_is_put_aside_is_bounded(opener: Opener, topic: Topic) -> None:
    store = opener(messages=2)
    consumer = opener.consume(topic)
    send(store, topic, *numbers(0, 5))
    for message in take(consumer, 5):
        consumer.put_aside([message])
    assert store.trim([topic]) == {}
    assert [each.body for each in dead(store, topic)] == numbers(3, 5)
    old = opener(age=0.2)
    wait_until(lambda: old.trim([topic]) == {} and dead(store, topic) == [])


# Telling.


def test_overview(opener: Opener, store: Store, topic: Topic) -> None:
    assert topic not in {each.topic for each in store.overview()}
    send(store, topic, *numbers(0, 3))
    begun = state(store, topic)
    assert (begun.kept, begun.dropped) == (3, 0)
    assert begun.oldest is not None
    assert 0 <= begun.oldest < 60
    consumers = [opener.consume(topic), opener.consume(topic), opener.consume(topic, "pool")]
    send(store, topic, *numbers(3, 5))
    taken = take(consumers[0], 2)
    found = state(store, topic)
    assert found.kept == 5
    default, pool = sorted(found.pools)
    assert default[:4] == ("", 3, 2, 2)
    assert pool[:4] == ("pool", 2, 0, 1)
    assert default.oldest is not None
    assert pool.oldest is not None
    assert 0 <= pool.oldest <= default.oldest < 60
    consumers[0].acknowledge(taken[:1])
    consumers[0].give_back(taken[1:], tried=True)
    default, pool = sorted(state(store, topic).pools)
    assert default[:4] == ("", 4, 0, 2)
    for consumer in consumers:
        opener.leave(consumer)
    assert [each[:4] for each in sorted(state(store, topic).pools)] == [("", 4, 0, 0), ("pool", 2, 0, 0)]


def test_overview_of_what_is_all_processed(opener: Opener, store: Store, topic: Topic) -> None:
    consumer = opener.consume(topic)
    send(store, topic, b"0")
    consumer.acknowledge(take(consumer, 1))
    store.trim([topic])
    found = state(store, topic)
    assert (found.kept, found.oldest) == (0, None)
    assert [tuple(pool) for pool in found.pools] == [("", 0, 0, 1, None)]


def test_overview_counts_many(opener: Opener, store: Store, topic: Topic) -> None:
    store.append([(topic, b"%d" % i) for i in range(2345)])
    consumer = opener.consume(topic)
    take(consumer, 45)
    (pool,) = state(store, topic).pools
    assert pool[:4] == ("", 2300, 45, 1)


def test_since(opener: Opener, store: Store, topic: Topic) -> None:
    begin, found = store.since(topic, None)
    assert list(found) == []
    send(store, topic, *numbers(0, 3))
    reader = opener()
    place, found = reader.since(topic, begin)
    assert found == numbers(0, 3)
    assert list(reader.since(topic, place)[1]) == []
    now, found = reader.since(topic, None)
    assert list(found) == []
    send(store, topic, *numbers(3, 5))
    for after in (place, now):
        end, found = reader.since(topic, after)
        assert found == numbers(3, 5)
        assert list(reader.since(topic, end)[1]) == []
    assert reader.since(topic, begin)[1] == numbers(0, 5)
    assert bodies(take(opener.consume(topic), 5)) == numbers(0, 5)


def test_since_tells_nothing_twice(opener: Opener, store: Store, topic: Topic) -> None:
    """What is given back or put back to a pool is not new, and what all have processed is not needed."""
    consumer = opener.consume(topic)
    send(store, topic, *numbers(0, 3))
    place, _ = store.since(topic, None)
    taken = take(consumer, 3)
    consumer.give_back(taken[:1], tried=True)
    consumer.put_aside(taken[1:2])
    store.put_back([each.name for each in dead(store, topic)])
    consumer.acknowledge([*taken[2:], *take(consumer, 2)])
    store.trim([topic])
    assert list(store.since(topic, place)[1]) == []
    place, _ = store.since(topic, None)
    send(store, topic, *numbers(3, 5))
    assert store.since(topic, place)[1] == numbers(3, 5)


# Several threads and processes.


def test_many_at_once(opener: Opener, topic: Topic) -> None:
    """Each message is processed once, though consumers come and go."""
    got: list[bytes] = []
    over = threading.Event()
    count = 400

    def write(number: int) -> None:
        store = open_store(settings_of(opener.url, opener.path))
        for i in range(count):
            send(store, topic, b"%d %d" % (number, i))
        store.close()

    def listen() -> None:
        wake = os.eventfd(0)
        while len(got) < 2 * count and not over.is_set():
            store = open_store(settings_of(opener.url, opener.path))
            consumer = store.consume([topic], "")
            for _ in range(10):
                taken = consumer.take(7)
                consumer.acknowledge(taken[:5])
                got.extend(bodies(taken[:5]))
                consumer.give_back(taken[5:6], tried=False)
                consumer.wait(wake, 0.05)
                if len(taken) < 7:
                    consumer.acknowledge(taken[6:])
                    got.extend(bodies(taken[6:]))
            consumer.close()
            store.close()
        os.close(wake)

    with ThreadPoolExecutor(5) as threads:
        ends = [*(threads.submit(write, i) for i in range(2)), *(threads.submit(listen) for _ in range(3))]
        try:
            for end in as_completed(ends, 60):
                end.result()
        finally:
            over.set()
    assert sorted(got) == sorted(b"%d %d" % (number, i) for number in range(2) for i in range(count))


@pytest.mark.parametrize("opener", SHARED, indirect=True)
def test_two_processes(opener: Opener, topic: Topic) -> None:
    def child() -> None:
        store = open_store(settings_of(opener.url, opener.path))
        for i in range(100):
            send(store, topic, b"%d" % i)
        os._exit(0)

    process = fork.Process(target=child)
    process.start()
    assert bodies(take(opener.consume(topic), 100)) == numbers(0, 100)
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("opener", SHARED, indirect=True)
def test_what_a_dead_process_had_is_taken_over(opener: Opener, store: Store, topic: Topic) -> None:
    def child() -> None:
        consumer = open_store(settings_of(opener.url, opener.path, takeover=1)).consume([topic], "pool")
        send(store_of_child := open_store(settings_of(opener.url, opener.path)), topic, b"0", b"1")
        store_of_child.close()
        consumer.acknowledge(take(consumer, 2)[:1])
        os._exit(0)

    process = fork.Process(target=child)
    process.start()
    process.join()
    (message,) = take(opener.consume(topic, "pool", takeover=1), 1)
    assert (message.body, message.tries) == (b"1", 2)


# Files.


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file.sqlite"


@pytest.fixture
def filed(file: Path) -> Iterator[Store]:
    opener = Opener("zmq://", file)
    yield opener()
    opener.close()


def test_who_must_not_be_kept_waiting_is_told_that_others_write(filed: Store, file: Path, topic: Topic) -> None:
    send_at_once(filed, topic, b"0")
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("begin immediate")
    with pytest.raises(Busy):
        send_at_once(filed, topic, b"1")
    other.close()
    send_at_once(filed, topic, b"2")
    assert state(filed, topic).kept == 2


def test_who_must_not_be_kept_waiting_does_not_open_a_file(filed: Store, file: Path, topic: Topic) -> None:
    send_at_once(filed, topic, b"0")
    for name in ("", "-wal", "-shm"):
        file.with_name(file.name + name).unlink()
    with pytest.raises(Busy):
        send_at_once(filed, topic, b"1")
    send(filed, topic, b"2")
    send_at_once(filed, topic, b"3")
    assert state(filed, topic).kept == 2


def test_who_must_not_be_kept_waiting_does_not_write_the_log_back(filed: Store, file: Path, topic: Topic) -> None:
    for _ in range(9):
        send_at_once(filed, topic, bytes(4 << 20))
    assert file.stat().st_size < 1 << 20
    filed.trim([topic])
    assert file.stat().st_size > 32 << 20
