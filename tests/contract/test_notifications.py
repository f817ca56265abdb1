# SPDX-License-Identifier: Apache-2.0
"""Notifications: stored where they are sent, and forwarded to listeners until one of each pool has processed them."""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from oslo_config import cfg
from oslo_messaging.notify.dispatcher import PRIORITIES
from oslo_messaging.transport import TransportURL

from green_zmq import config, notifications
from green_zmq.notifications import Pool, State, Store
from tests.contract.harness import GREEN, MODELS, ROOT, Directory, Fleet, Raised, Worker, cpu_shares, following, wait_until
from tests.servers import RedisServer

# That the store follows a failover is tested with the stores.
pytestmark = pytest.mark.no_sentinel

Start = Callable[[str], Worker]

# A machine that is busy with other things takes its time.
LIMIT = 60
# Descriptors that may be more for a moment, or for good where two happened to be open at once that were not before.
SOME = 10


def run(worker: Worker, scenario: str, **args: Any) -> Any:
    return worker.run(f"notification_scenarios.{scenario}", limit=2 * LIMIT, **args)


def begin(worker: Worker, scenario: str, **args: Any) -> Future[Any]:
    return worker.begin(f"notification_scenarios.{scenario}", **args)


def seen(worker: Worker, count: int, label: str = "listener") -> list[Any]:
    """What a listener has processed, once that is so much."""

    def enough() -> bool:
        return len(run(worker, "seen", label=label)) >= count

    wait_until(enough, LIMIT, f"{count} notifications at {worker!r}")
    found: list[Any] = run(worker, "seen", label=label)
    return found


def raised(future: Future[Any]) -> Raised:
    error = future.exception(2 * LIMIT)
    assert isinstance(error, Raised), error
    return error


@contextlib.contextmanager
def store(url: str) -> Iterator[Store]:
    """The store of that transport, in this process."""
    conf = cfg.ConfigOpts()
    conf([], project="contract")
    opened = notifications.open_store(config.read(conf, TransportURL.parse(conf, url)))
    try:
        yield opened
    finally:
        opened.close()


def state(url: str, topic: str, priority: str = "info") -> State | None:
    with store(url) as opened:
        return next((each for each in opened.overview() if each.topic.name == f"{topic}.{priority}"), None)


def pool(url: str, topic: str, name: str = "") -> Pool | None:
    found = state(url, topic)
    return next((each for each in found.pools if each.name == name), None) if found else None


def settled(url: str, topic: str, name: str = "") -> None:
    """Everything was processed, and the store knows it."""

    def nothing_left() -> bool:
        found = pool(url, topic, name)
        return found is not None and (found.waiting, found.taken) == (0, 0)

    wait_until(nothing_left, LIMIT, f"all of {topic} to be processed")


# What arrives.


@pytest.mark.parametrize("driver", ["messaging", "messagingv2"])
def test_a_notification_arrives_as_it_was_sent(client: Worker, server: Worker, url: str, topic: str, driver: str) -> None:
    run(server, "listen", url=url, topics=[topic])
    payload = {"text": "Grüße, \N{SNOWMAN} \N{GRINNING FACE} \x00", "list": [1, 2.5, None, True, {"deep": []}], "empty": ""}
    ctxt = {"user": "Ünal", "roles": ["a", "b"]}
    run(client, "notify", url=url, topics=[topic], values=[payload], driver=driver, ctxt=ctxt, event="it.happened")
    assert seen(server, 1) == [payload]
    ((priority, *details),) = run(server, "details")
    assert (priority, details[:4]) == ("info", [ctxt, "publisher", "it.happened", payload])
    assert sorted(details[4]) == ["message_id", "timestamp"]
    assert all(details[4].values())
    assert run(client, "swallowed") == []


def test_each_priority_has_its_own_endpoint(client: Worker, server: Worker, url: str, topic: str) -> None:
    run(server, "listen", url=url, topics=[topic])
    for priority in PRIORITIES:
        run(client, "notify", url=url, topics=[topic], values=[priority], priority=priority)
    seen(server, len(PRIORITIES))
    assert sorted((each[0], each[4]) for each in run(server, "details")) == sorted((each, each) for each in PRIORITIES)


@pytest.mark.rotated
def test_a_listener_gets_only_the_priorities_that_it_has_endpoints_for(
    client: Worker, server: Worker, url: str, topic: str
) -> None:
    run(server, "listen", url=url, topics=[topic], priorities=["error"])
    run(client, "notify", url=url, topics=[topic], values=["info"])
    run(client, "notify", url=url, topics=[topic], values=["error"], priority="error")
    assert seen(server, 1) == ["error"]
    run(server, "listen", url=url, topics=[topic], label="later", priorities=["info"])
    assert seen(server, 1, "later") == ["info"]


@pytest.mark.rotated
def test_other_exchanges_are_other_topics(client: Worker, server: Worker, url: str, topic: str) -> None:
    run(server, "listen", url=url, topics=[topic], exchange="here", label="here")
    run(server, "listen", url=url, topics=[topic], exchange="there", label="there")
    run(client, "send", url=url, topic=topic, values=["for here"], exchange="here")
    run(client, "send", url=url, topic=topic, values=["for there"], exchange="there")
    assert seen(server, 1, "here") == ["for here"]
    assert seen(server, 1, "there") == ["for there"]


@pytest.mark.rotated
def test_a_listener_has_several_topics_and_a_notifier_too(client: Worker, server: Worker, url: str, topic: str) -> None:
    topics = [f"{topic}-{i}" for i in range(3)]
    run(server, "listen", url=url, topics=topics)
    for each in topics:
        run(client, "notify", url=url, topics=[each], values=[each])
    run(client, "notify", url=url, topics=topics, values=["to all"])
    assert Counter(seen(server, 6)) == Counter([*topics, *["to all"] * 3])


@pytest.mark.rotated
def test_1_mib(client: Worker, server: Worker, url: str, topic: str) -> None:
    run(client, "send_fill", url=url, topic=topic, size=1 << 20)
    run(server, "listen", url=url, topics=[topic])
    wait_until(lambda: run(server, "lengths") == [1 << 20], LIMIT)


@pytest.mark.rotated
def test_above_max_message_bytes_is_an_error_where_it_is_sent(
    client: Worker, server: Worker, directory: Directory, topic: str
) -> None:
    url = directory.url(max_message_bytes=10_000)
    with pytest.raises(Raised, match="max_message_bytes") as caught:
        run(client, "send_fill", url=url, topic=topic, size=10_000)
    assert caught.value.name == "MessageTooLarge"
    run(client, "notify", url=url, topics=[topic], values=["x" * 10_000])
    assert run(client, "swallowed") == ["MessageTooLarge"]
    run(client, "send_fill", url=url, topic=topic, size=9_000)
    run(server, "listen", url=url, topics=[topic])
    wait_until(lambda: run(server, "lengths") == [9_000], LIMIT)


@pytest.mark.rotated
@pytest.mark.parametrize("name", ["exchange", "topic"])
def test_a_name_that_is_no_text_is_an_error_and_others_go_on(client: Worker, url: str, topic: str, name: str) -> None:
    bad = {"topic": f"{topic}\udc80"} if name == "topic" else {"topic": topic, "exchange": "\udc80"}
    with pytest.raises(Raised, match=name) as caught:
        run(client, "send", url=url, values=["lost"], **bad)
    assert caught.value.name == "Unserializable"
    with pytest.raises(Raised, match=name) as caught:
        run(client, "listen", url=url, topics=[bad["topic"]], exchange=bad.get("exchange"))
    assert caught.value.name == "Unserializable"
    run(client, "listen", url=url, topics=[topic])
    run(client, "send", url=url, topic=topic, values=["arrives"])
    assert seen(client, 1) == ["arrives"]


@pytest.mark.rotated
def test_what_cannot_be_serialised_is_an_error_and_others_go_on(client: Worker, url: str, topic: str) -> None:
    with pytest.raises(Raised) as caught:
        run(client, "send_unserialisable", url=url, topic=topic)
    assert caught.value.name == "Unserializable"
    run(client, "listen", url=url, topics=[topic])
    run(client, "send", url=url, topic=topic, values=["arrives"])
    assert seen(client, 1) == ["arrives"]


# Stored and forwarded.


def test_what_is_sent_with_nobody_listening_is_kept_in_order(client: Worker, server: Worker, url: str, topic: str) -> None:
    values = list(range(100))
    run(client, "notify", url=url, topics=[topic], values=values)
    run(server, "listen", url=url, topics=[topic], workers=1)
    assert seen(server, 100) == values


@pytest.mark.rotated
def test_a_notifier_may_be_killed_as_soon_as_it_has_sent(
    client_model: str, server: Worker, start: Start, url: str, topic: str
) -> None:
    victim = start(client_model)
    run(victim, "notify", url=url, topics=[topic], values=list(range(20)))
    victim.kill()
    run(server, "listen", url=url, topics=[topic], workers=1)
    assert seen(server, 20) == list(range(20))


def test_a_listener_that_is_stopped_and_started_misses_nothing(client: Worker, server: Worker, url: str, topic: str) -> None:
    run(server, "listen", url=url, topics=[topic], workers=1)
    for i in range(3):
        run(client, "send", url=url, topic=topic, values=[f"{i} while it listens"])
        seen(server, 2 * i + 1)
        run(server, "stop")
        run(client, "send", url=url, topic=topic, values=[f"{i} while it does not"])
        run(server, "wait")
        run(server, "start_again")
        seen(server, 2 * i + 2)
    settled(url, topic)
    assert run(server, "seen") == [f"{i} while it {does}" for i in range(3) for does in ("listens", "does not")]


def test_a_stop_under_load_loses_nothing_and_repeats_nothing(
    client: Worker, server: Worker, other: Worker, url: str, topic: str, tmp_path: Path
) -> None:
    enough = tmp_path / "enough"
    sending = begin(client, "send_until", url=url, topic=topic, name="sent", path=str(enough))
    run(other, "listen", url=url, topics=[topic], label="other", doing={"*": "rest"}, workers=4)
    found = []
    for i in range(3):
        run(server, "listen", url=url, topics=[topic], label=f"{i}", doing={"*": "rest"}, workers=4)
        seen(server, 3, f"{i}")
        found += run(server, "end", label=f"{i}")
    enough.touch()
    values = [f"sent-{i}" for i in range(sending.result(LIMIT))]
    settled(url, topic)
    assert Counter(found + run(other, "seen", label="other")) == Counter(values)


@pytest.mark.rotated
def test_many_senders_at_once(client: Worker, server: Worker, other: Worker, url: str, topic: str) -> None:
    run(server, "listen", url=url, topics=[topic])
    values = [[f"{who} {i}" for i in range(150)] for who in ("client", "other")]
    sending = [
        begin(worker, "notify_together", url=url, topics=[topic], values=each)
        for worker, each in zip((client, other), values, strict=True)
    ]
    for each in sending:
        each.result(2 * LIMIT)
    assert Counter(seen(server, 300)) == Counter([*values[0], *values[1]])
    settled(url, topic)
    assert len(run(server, "seen")) == 300


# Who gets it.


def test_listeners_of_a_topic_share_what_is_sent(client: Worker, server: Worker, other: Worker, url: str, topic: str) -> None:
    for worker in (server, other):
        run(worker, "listen", url=url, topics=[topic])
    for value in range(10):
        run(client, "send", url=url, topic=topic, values=[value])
        settled(url, topic)
    shares = [run(worker, "seen") for worker in (server, other)]
    assert all(shares)
    assert Counter(shares[0] + shares[1]) == Counter(range(10))


@pytest.mark.rotated
def test_each_pool_gets_a_copy_that_its_members_share(
    client: Worker, server: Worker, other: Worker, url: str, topic: str
) -> None:
    for name in (None, "one", "two"):
        for worker in (server, other):
            run(worker, "listen", url=url, topics=[topic], pool=name, label=str(name))
    for value in range(20):
        run(client, "send", url=url, topic=topic, values=[value])
    for name in (None, "one", "two"):
        settled(url, topic, name or "")
        shares = [run(worker, "seen", label=str(name)) for worker in (server, other)]
        assert all(shares)
        assert Counter(shares[0] + shares[1]) == Counter(range(20))


@pytest.mark.rotated
def test_a_pool_with_a_name_begins_with_its_first_listener_and_keeps_what_comes_then(
    client: Worker, server: Worker, other: Worker, url: str, topic: str
) -> None:
    run(client, "send", url=url, topic=topic, values=["before"])
    run(server, "listen", url=url, topics=[topic], pool="named", label="first")
    run(client, "send", url=url, topic=topic, values=["while it listens"])
    assert seen(server, 1, "first") == ["while it listens"]
    run(server, "end", label="first")
    run(client, "send", url=url, topic=topic, values=["while it is away"])
    run(other, "listen", url=url, topics=[topic], pool="named", label="second")
    assert seen(other, 1, "second") == ["while it is away"]
    run(other, "listen", url=url, topics=[topic], label="default", workers=1)
    assert seen(other, 3, "default") == ["before", "while it listens", "while it is away"]


# Batches.


@pytest.mark.apart
def test_batches_are_full_but_the_last(client: Worker, server: Worker, url: str, topic: str) -> None:
    run(client, "notify", url=url, topics=[topic], values=list(range(205)))
    run(server, "listen", url=url, topics=[topic], size=100, timeout=2, workers=1)
    seen(server, 205)
    found = run(server, "batches")
    assert [len(batch) for batch in found] == [100, 100, 5]
    assert [value for batch in found for value in batch] == list(range(205))
    settled(url, topic)


@pytest.mark.apart
def test_a_batch_that_is_not_full_is_handed_over_when_its_time_has_come(
    client: Worker, server: Worker, url: str, topic: str
) -> None:
    run(client, "send", url=url, topic=topic, values=[1, 2, 3])
    began = time.monotonic()
    run(server, "listen", url=url, topics=[topic], size=10, timeout=2)
    seen(server, 3)
    assert run(server, "batches") == [[1, 2, 3]]
    assert run(server, "arrivals")[0] - began >= 2
    settled(url, topic)


@pytest.mark.rotated
def test_a_listener_that_is_stopped_gives_back_what_is_in_no_batch_yet(
    client: Worker, server: Worker, other: Worker, url: str, topic: str
) -> None:
    run(server, "listen", url=url, topics=[topic], size=100, timeout=600)
    run(client, "send", url=url, topic=topic, values=[1, 2, 3])
    wait_until(lambda: (found := pool(url, topic)) is not None and found.taken == 3, LIMIT)
    assert run(server, "end") == []
    run(other, "listen", url=url, topics=[topic], workers=1)
    assert seen(other, 3) == [1, 2, 3]


@pytest.mark.rotated
def test_batches_of_any_size_are_single_ones(client: Worker, server: Worker, url: str, topic: str) -> None:
    """Oslo.messaging's default for the size of a batch is None."""
    run(server, "listen", url=url, topics=[topic], size=-1)
    run(client, "send", url=url, topic=topic, values=[1, 2])
    seen(server, 2)
    assert run(server, "batches") == [[1], [2]]


# Given back.


@pytest.mark.rotated
@pytest.mark.parametrize("how", ["requeue", "fail"])
def test_what_is_requeued_is_delivered_again(client: Worker, server: Worker, url: str, topic: str, how: str) -> None:
    run(server, "listen", url=url, topics=[topic], requeue=True, doing={"bad": how})
    run(client, "send", url=url, topic=topic, values=["bad", "good"])
    wait_until(lambda: run(server, "began").count("bad") > 2, LIMIT)
    assert run(server, "seen") == ["good"]
    assert server.run("counts", url=url)["notifications requeued"] >= 2


@pytest.mark.rotated
def test_what_one_listener_requeues_another_gets(client: Worker, server: Worker, other: Worker, url: str, topic: str) -> None:
    run(server, "listen", url=url, topics=[topic], requeue=True, doing={"*": "requeue"})
    run(other, "listen", url=url, topics=[topic], requeue=True)
    values = list(range(10))
    run(client, "send", url=url, topic=topic, values=values)
    assert sorted(seen(other, 10)) == values
    settled(url, topic)
    assert run(server, "began")


@pytest.mark.rotated
def test_a_batch_is_requeued_as_a_whole(client: Worker, server: Worker, other: Worker, url: str, topic: str) -> None:
    run(server, "listen", url=url, topics=[topic], requeue=True, size=3, timeout=600, doing={"2": "requeue"})
    run(client, "send", url=url, topic=topic, values=[1, 2, 3])
    wait_until(lambda: len(run(server, "batches")) > 2, LIMIT)
    assert {tuple(sorted(batch)) for batch in run(server, "batches")} == {(1, 2, 3)}
    run(server, "end")
    run(other, "listen", url=url, topics=[topic])
    assert sorted(seen(other, 3)) == [1, 2, 3]


@pytest.mark.rotated
def test_without_requeue_an_endpoint_that_raises_has_processed_it(client: Worker, server: Worker, url: str, topic: str) -> None:
    run(server, "listen", url=url, topics=[topic], doing={"bad": "fail", "odd": "requeue"}, workers=1)
    run(client, "send", url=url, topic=topic, values=["bad", "odd", "good"])
    assert seen(server, 1) == ["good"]
    settled(url, topic)
    assert run(server, "began") == ["bad", "odd", "good"]


@pytest.mark.rotated
def test_what_is_tried_too_often_is_put_aside_and_can_be_put_back(
    client: Worker, server: Worker, other: Worker, directory: Directory, topic: str
) -> None:
    url = directory.url(notification_tries=3)
    run(server, "listen", url=url, topics=[topic], requeue=True, doing={"bad": "fail"})
    run(client, "send", url=url, topic=topic, values=["bad", "good"])
    wait_until(lambda: server.run("counts", url=url).get("notifications put aside") == 1, LIMIT)
    assert run(server, "began").count("bad") == 3
    (line,) = wait_until(lambda: [line for line in server.run("logged") if "put aside" in line], LIMIT)
    assert line.startswith("ERROR")
    assert f"{topic}.info" in line
    settled(url, topic)
    with store(url) as opened:
        (dead,) = [each for each in opened.dead() if each.topic.name == f"{topic}.info"]
        assert (dead.pool, dead.tries) == ("", 3)
        run(server, "end")
        run(other, "listen", url=url, topics=[topic])
        assert opened.put_back([dead.name]) == 1
        assert opened.put_back([dead.name]) == 0
        assert seen(other, 1) == ["bad"]
        assert not [each for each in opened.dead() if each.topic.name == f"{topic}.info"]


@pytest.mark.one_directory
def test_many_that_are_put_back_for_one_pool_stand_in_no_others_way(url: str, topic: str, start: Start) -> None:
    own = f"{url}&notification_takeover=3600&notification_tries=1"
    worker = start("threads")
    run(worker, "listen", url=own, topics=[topic], pool="sick", label="sick", requeue=True, doing={"*": "fail"})
    run(worker, "listen", url=own, topics=[topic], label="well")
    values = list(range(600))
    run(worker, "notify_together", url=own, topics=[topic], values=values)
    seen(worker, 600, "well")
    wait_until(lambda: worker.run("counts", url=own).get("notifications put aside") == 600, LIMIT)
    run(worker, "end", label="sick")
    run(worker, "end", label="well")
    with store(own) as opened:
        assert opened.put_back([each.name for each in opened.dead() if each.topic.name == f"{topic}.info"]) == 600
    run(worker, "send", url=own, topic=topic, values=["new"])
    run(worker, "listen", url=own, topics=[topic], label="well")
    assert seen(worker, 1, "well") == ["new"]


# Listeners that die.


@pytest.mark.apart
def test_what_a_killed_listener_had_not_processed_another_gets(
    client: Worker, server_model: str, start: Start, other: Worker, directory: Directory, topic: str
) -> None:
    url = directory.url(notification_takeover=2)
    victim = start(server_model)
    run(victim, "listen", url=url, topics=[topic], doing={"held": "hold"})
    run(client, "send", url=url, topic=topic, values=["processed", "held"])
    wait_until(lambda: "held" in run(victim, "began"), LIMIT)
    seen(victim, 1)
    wait_until(lambda: (found := pool(url, topic)) is not None and (found.waiting, found.taken) == (0, 1), LIMIT)
    victim.kill()
    run(other, "listen", url=url, topics=[topic])
    assert seen(other, 1) == ["held"]
    settled(url, topic)
    assert run(other, "began") == ["held"]


@pytest.mark.apart
def test_a_notification_that_kills_its_listeners_is_put_aside(
    client: Worker, server_model: str, start: Start, directory: Directory, topic: str
) -> None:
    url = directory.url(notification_takeover=2, notification_tries=2)
    run(client, "send", url=url, topic=topic, values=["deadly"])
    for _ in range(2):
        victim = start(server_model)
        run(victim, "listen", url=url, topics=[topic], doing={"deadly": "hold"})
        wait_until(lambda victim=victim: run(victim, "began") == ["deadly"], LIMIT)
        victim.kill()
    last = start(server_model)
    run(last, "listen", url=url, topics=[topic])
    wait_until(lambda: any("put aside" in line and "died" in line for line in last.run("logged")), LIMIT)
    with store(url) as opened:
        # What is logged can be looked at.
        assert len([each for each in opened.dead() if each.topic.name == f"{topic}.info"]) == 1
    run(client, "send", url=url, topic=topic, values=["harmless"])
    assert seen(last, 1) == ["harmless"]
    assert run(last, "began") == ["harmless"]


# The store is away.


def away(worker: Worker) -> None:
    """It has said that it cannot store, and waits."""
    wait_until(lambda: any("Until then" in line for line in worker.run("logged")), LIMIT, "a notifier to wait")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a file for notifications that cannot be made, since there is a folder in its place."""
    path = tmp_path / "notifications.sqlite"
    path.mkdir()
    return path


@pytest.fixture
def own(directory: Directory, path: Path) -> str:
    return directory.url(notification_path=path)


@pytest.mark.one_directory
@pytest.mark.parametrize("model", MODELS)
def test_a_number_of_retries_ends_in_an_error(fleet: Fleet, model: str, own: str, path: Path, topic: str) -> None:
    worker = fleet.get("client", model)
    for retry, least in ((0, 0.0), (2, 0.3)):
        before = time.monotonic()
        error = raised(begin(worker, "send", url=own, topic=topic, values=["lost"], retry=retry))
        assert time.monotonic() - before >= least
        assert error.names[:2] == ["StoreError", "MessageDeliveryFailure"]
        assert str(path) in error.text
        assert "notification_path" in error.text
    run(worker, "notify", url=own, topics=[topic], values=["lost"], retry=0)
    assert run(worker, "swallowed") == ["StoreError"]
    assert worker.run("counts", url=own)["notifications that could not be stored"] == 3
    path.rmdir()
    run(worker, "listen", url=own, topics=[topic])
    run(worker, "send", url=own, topic=topic, values=["arrives"], retry=0)
    assert seen(worker, 1) == ["arrives"]


@pytest.mark.one_directory
@pytest.mark.parametrize("retry", [None, -1])
@pytest.mark.parametrize("model", MODELS)
def test_without_a_number_it_waits_until_the_store_is_back(
    fleet: Fleet, model: str, own: str, path: Path, topic: str, retry: int | None
) -> None:
    worker = fleet.get("client", model)
    sending = [begin(worker, "send", url=own, topic=topic, values=[i], retry=retry) for i in range(3)]
    away(worker)
    worker.run("serve", url=own, topic=topic)
    assert worker.run("calls", url=own, topic=topic, method="who", count=50) == ["server"] * 50
    assert not any(each.done() for each in sending)
    path.rmdir()
    for each in sending:
        each.result(LIMIT)
    run(worker, "listen", url=own, topics=[topic])
    assert sorted(seen(worker, 3)) == [0, 1, 2]
    assert len([line for line in worker.run("logged") if "Until then" in line]) == 1
    wait_until(lambda: any("can be stored again" in line for line in worker.run("logged")), LIMIT)


@pytest.mark.one_directory
@pytest.mark.parametrize("model", MODELS)
def test_cleanup_ends_the_wait(fleet: Fleet, model: str, own: str, path: Path, topic: str) -> None:
    worker = fleet.get("client", model)
    sending = [begin(worker, "send", url=own, topic=topic, values=[i]) for i in range(3)]
    away(worker)
    worker.run("cleanup", url=own)
    assert [raised(each).name for each in sending] == ["TransportClosed"] * 3
    path.rmdir()
    run(worker, "send", url=own, topic=topic, values=["new"])
    run(worker, "listen", url=own, topics=[topic])
    assert seen(worker, 1) == ["new"]


@pytest.mark.one_directory
@pytest.mark.parametrize("model", GREEN)
def test_a_notifier_that_is_killed_while_it_waits_leaves_nothing_behind(
    fleet: Fleet, model: str, own: str, path: Path, topic: str
) -> None:
    """Eventlet's and gevent's timeouts do likewise: the caller was told that it was not sent."""
    worker = fleet.get("client", model)
    waiting = begin(worker, "send", url=own, topic=topic, values=["wanted"])
    run(worker, "send_and_be_killed", url=own, topic=topic, values=["unwanted 1", "unwanted 2"], line="Until then")
    path.rmdir()
    waiting.result(LIMIT)
    run(worker, "send", url=own, topic=topic, values=["last"])
    run(worker, "listen", url=own, topics=[topic], workers=1)
    assert seen(worker, 2) == ["wanted", "last"]


@contextlib.contextmanager
def hanging(worker: Worker, topic: str) -> Iterator[tuple[str, RedisServer]]:
    """A Redis that has stored from this worker, and does not answer now; its URL and it."""
    with RedisServer() as redis:
        url = f"zmq+redis://{redis.address}/0"
        run(worker, "send", url=url, topic=topic, values=["before"] * 3)
        redis.pause()
        yield url, redis


def seen_to_the_last(worker: Worker, url: str, topic: str) -> list[Any]:
    """All that was stored, by a listener that begins now."""
    run(worker, "send", url=url, topic=topic, values=["last"])
    run(worker, "listen", url=url, topics=[topic], workers=1)
    wait_until(lambda: "last" in run(worker, "seen"), LIMIT)
    found: list[Any] = run(worker, "seen")
    return found


@pytest.mark.one_directory
@pytest.mark.parametrize("model", MODELS)
def test_a_redis_that_hangs_keeps_nobody_else_waiting(start: Start, model: str, topic: str) -> None:
    worker = start(model)
    with hanging(worker, topic) as (url, redis):
        waiting = begin(worker, "send", url=url, topic=topic, values=["after"])
        if model in GREEN:
            run(worker, "send_and_be_killed_soon", url=url, topic=topic, value="unwanted")
        for _ in range(20):
            worker.run("cpu")
        assert not waiting.done()
        redis.resume()
        waiting.result(LIMIT)
        # What may have arrived before the answer was lost is sent again.
        found = [value for value in seen_to_the_last(worker, url, topic) if value != "unwanted"]
        assert found in (["before"] * 3 + ["after"] * count + ["last"] for count in (1, 2))


@pytest.mark.one_directory
@pytest.mark.parametrize("model", GREEN)
def test_a_green_thread_that_is_killed_while_redis_answers(start: Start, model: str, topic: str) -> None:
    worker = start(model)
    with hanging(worker, topic) as (url, redis):
        run(worker, "send_and_be_killed_soon", url=url, topic=topic, value="in doubt")
        redis.resume()
        found = [value for value in seen_to_the_last(worker, url, topic) if value != "in doubt"]
        assert found == ["before"] * 3 + ["last"]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Somebody writes all the time."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("begin immediate")
    try:
        yield
    finally:
        database.close()


@pytest.mark.slow
@pytest.mark.one_directory
@pytest.mark.parametrize("model", MODELS)
def test_a_file_that_somebody_keeps_locked(fleet: Fleet, model: str, directory: Directory, tmp_path: Path, topic: str) -> None:
    file = tmp_path / "locked.sqlite"
    url = directory.url(notification_path=file)
    sender, listener = fleet.get("client", model), fleet.get("server", following(model))
    run(listener, "listen", url=url, topics=[topic])
    run(sender, "send", url=url, topic=topic, values=["before"])
    seen(listener, 1)
    with locked(file):
        error = raised(begin(sender, "send", url=url, topic=topic, values=["lost"], retry=0))
        assert error.name == "StoreError"
        assert "locked" in error.text
        waiting = begin(sender, "send", url=url, topic=topic, values=["after"])
        for _ in range(20):
            sender.run("cpu")
        assert not waiting.done()
    waiting.result(LIMIT)
    assert seen(listener, 2) == ["before", "after"]
    settled(url, topic)


@pytest.mark.one_directory
@pytest.mark.parametrize("model", MODELS)
def test_a_file_that_is_replaced_by_garbage_and_removed(
    fleet: Fleet, model: str, directory: Directory, tmp_path: Path, topic: str
) -> None:
    file = tmp_path / "replaced.sqlite"
    url = directory.url(notification_path=file)
    sender, listener = fleet.get("client", model), fleet.get("server", following(model))
    run(listener, "listen", url=url, topics=[topic])
    run(sender, "send", url=url, topic=topic, values=["before"])
    seen(listener, 1)
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"garbage " * 10_000)
    for name in ("-wal", "-shm"):
        file.with_name(file.name + name).unlink()
    garbage.rename(file)
    error = raised(begin(sender, "send", url=url, topic=topic, values=["lost"], retry=0))
    assert error.name == "StoreError"
    assert "remove it" in error.text
    waiting = begin(sender, "send", url=url, topic=topic, values=["after"])
    away(sender)
    file.unlink()
    waiting.result(LIMIT)
    assert seen(listener, 2) == ["before", "after"]
    settled(url, topic)


def mounted(model: str, tmp_path: Path, options: str) -> Worker:
    """A process with a file system of its own in the folder ``disk``."""
    (tmp_path / "disk").mkdir()
    command = 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"'
    within = ("unshare", "--mount", "sh", "-c", command, "sh", options, str(tmp_path / "disk"))
    return Worker(model, tmp_path / f"mounted-{model}.log", within=within)


@pytest.mark.one_directory
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("before", "after"), [("size=600k", "size=8m"), ("ro", "rw")], ids=["full", "read-only"])
def test_a_disk_that_takes_nothing(
    model: str, directory: Directory, tmp_path: Path, topic: str, before: str, after: str
) -> None:
    worker = mounted(model, tmp_path, before)
    try:
        url = directory.url(notification_path=tmp_path / "disk" / "notifications.sqlite")
        with contextlib.ExitStack() as failed:
            error = failed.enter_context(pytest.raises(Raised))
            for i in range(100):
                run(worker, "send", url=url, topic=topic, values=[f"{i} {'x' * 20_000}"], retry=0)
        assert error.value.name == "StoreError"
        assert "space" in error.value.text
        stored = worker.run("counts", url=url).get("notifications stored", 0)
        waiting = begin(worker, "send", url=url, topic=topic, values=[f"last {'x' * 20_000}"])
        away(worker)
        run(worker, "remount", folder=str(tmp_path / "disk"), options=after)
        waiting.result(LIMIT)
        run(worker, "listen", url=url, topics=[topic], workers=1)
        found = seen(worker, stored + 1)
        assert [each.split()[0] for each in found] == [*map(str, range(stored)), "last"]
    finally:
        worker.kill()


# Bounds.


@pytest.mark.rotated
def test_too_many_are_dropped_counted_and_logged(client: Worker, server: Worker, directory: Directory, topic: str) -> None:
    url = directory.url(notification_messages=50)
    values = list(range(250))
    run(client, "send", url=url, topic=topic, values=values)
    # It is looked after every hundred messages, beside those that go on being stored; so then no further look is due.
    found = wait_until(lambda: (found := state(url, topic)) is not None and found.kept < 150 and found, LIMIT)
    assert found.kept + found.dropped == 250
    wait_until(lambda: client.run("counts", url=url).get("notifications dropped") == found.dropped, LIMIT)
    assert any(line.startswith("ERROR") and f"{topic}.info" in line for line in client.run("logged"))
    run(server, "listen", url=url, topics=[topic], workers=1)
    kept = seen(server, found.kept)
    assert kept == values[-found.kept :]


@pytest.mark.apart
def test_what_is_too_old_is_dropped_counted_and_logged(
    client: Worker, server: Worker, directory: Directory, topic: str
) -> None:
    url = directory.url(notification_age=3)
    run(client, "send", url=url, topic=topic, values=["old"] * 10)
    sent = time.monotonic()
    wait_until(lambda: time.monotonic() > sent + 3.1, LIMIT)  # the youngest is too old as well
    run(client, "send", url=url, topic=topic, values=["new"] * 100)
    wait_until(lambda: client.run("counts", url=url).get("notifications dropped", 0) >= 10, LIMIT)
    # The native thread counts, and the loop logs, a moment later.
    wait_until(lambda: any(line.startswith("ERROR") and f"{topic}.info" in line for line in client.run("logged")), LIMIT)
    assert "old" not in _listen_once(server, url, topic, 1)


def _listen_once(worker: Worker, url: str, topic: str, least: int) -> list[Any]:
    run(worker, "listen", url=url, topics=[topic])
    seen(worker, least)
    settled(url, topic)
    found: list[Any] = run(worker, "end")
    return found


@pytest.mark.one_directory
def test_processes_that_send_little_each_keep_to_the_bounds_too(start: Start, directory: Directory, topic: str) -> None:
    url = directory.url(notification_messages=50)
    worker = start("threads")
    for i in range(10):
        run(worker, "send", url=url, topic=topic, values=[i] * 20, tag=str(i))
    wait_until(lambda: (found := state(url, topic)) is not None and found.kept <= 70, LIMIT)


@pytest.mark.apart
def test_what_all_have_processed_goes(client: Worker, server: Worker, other: Worker, url: str, topic: str) -> None:
    run(server, "listen", url=url, topics=[topic])
    run(other, "listen", url=url, topics=[topic], pool="named")
    for i in range(3):
        run(client, "notify_together", url=url, topics=[topic], values=list(range(200)))
        for worker in (server, other):
            seen(worker, 200 * (i + 1))
        wait_until(lambda: (found := state(url, topic)) is not None and found.kept == 0, LIMIT, "all to be gone")
    found = state(url, topic)
    assert found is not None
    assert found.dropped == 0


# Endings.


ORDERS = [
    ["stop", "wait", "cleanup"],
    ["cleanup", "stop", "wait"],
    ["stop", "cleanup", "wait"],
    ["cleanup", "cleanup", "stop", "stop", "wait", "wait"],
    ["stop", "stop", "wait", "wait", "cleanup", "cleanup"],
]


@pytest.mark.one_directory
@pytest.mark.parametrize("order", ORDERS, ids=["-".join(order) for order in ORDERS])
@pytest.mark.parametrize("model", MODELS)
def test_an_end_in_any_order_gives_back_what_is_not_processed(
    fleet: Fleet, model: str, directory: Directory, topic: str, order: list[str]
) -> None:
    url = directory.url(listener_window=10, zmq_linger=1)
    worker, other = fleet.get("server", model), fleet.get("client", following(model))
    run(other, "send", url=url, topic=topic, values=list(range(100)))
    run(worker, "listen", url=url, topics=[topic], doing={"7": "hold"}, workers=2)
    seen(worker, 20)
    wait_until(lambda: 7 in run(worker, "began"), LIMIT)
    # More than it takes at once go on coming.
    sending = begin(other, "send", url=url, topic=topic, values=list(range(100, 150)))
    for doing in order:
        if doing == "wait":
            run(worker, "release")
            run(worker, "wait")
        elif doing == "cleanup":
            worker.run("cleanup", url=url, limit=LIMIT)
        else:
            run(worker, doing)
    sending.result(LIMIT)
    found = run(worker, "seen")
    assert len(found) == len(set(found))
    run(other, "listen", url=url, topics=[topic])
    wait_until(lambda: {*found, *run(other, "seen")} == set(range(150)), LIMIT)
    settled(url, topic)
    again = set(found) & set(run(other, "seen"))
    # What was handed over when the transport was closed, its endpoints may have ended without being able to say so. That is so
    # also where it is closed while somebody waits for them.
    assert len(again) <= 64


_SCRIPT = r"""
import sys, threading, time
from tests.contract.worker import patch
model, url, topic, ending = sys.argv[1:]
patch(model)
import oslo_messaging
from oslo_config import cfg
import green_zmq
cfg.CONF([], project="contract")
transport = oslo_messaging.get_notification_transport(cfg.CONF, url)
notifier = oslo_messaging.Notifier(transport, "publisher", driver="messagingv2", topics=[topic])
seen = []
class Endpoint:
    def info(self, ctxt, publisher, event, payload, metadata):
        if ending == "half":
            time.sleep(0.001)
        sys.stdout.write(f"{payload}\n")
        sys.stdout.flush()
        seen.append(payload)
executor = {"threads": "threading"}.get(model, model)
listener = green_zmq.get_notification_listener(transport, [oslo_messaging.Target(topic=topic)], [Endpoint()], executor=executor)
listener.start(override_pool_size=1 if ending == "half" else None)
for i in range(100):
    notifier.info({}, "event", i)
while len(seen) < (10 if ending == "half" else 100):
    time.sleep(0.001)
if ending == "cleanup":
    transport.cleanup()
elif ending == "stop":
    listener.stop()
    listener.wait()
"""


def _run_script(model: str, url: str, topic: str, ending: str) -> list[int]:
    """What it has processed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT, model, url, topic, ending],
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return sorted(map(int, done.stdout.split()))


@pytest.mark.one_directory
@pytest.mark.parametrize("ending", ["exit", "cleanup", "stop"])
@pytest.mark.parametrize("model", MODELS)
def test_a_process_that_ends_has_acknowledged_what_it_has_processed(
    fleet: Fleet, model: str, directory: Directory, topic: str, ending: str
) -> None:
    url = directory.url(notification_takeover=2)
    assert _run_script(model, url, topic, ending) == list(range(100))
    other = fleet.get("client", following(model))
    run(other, "send", url=url, topic=topic, values=["last"])
    run(other, "listen", url=url, topics=[topic])
    seen(other, 1)
    settled(url, topic)
    # The endpoint of the last ones had noted them, but not returned yet.
    assert len(run(other, "seen")) <= 1 + 2


@pytest.mark.one_directory
@pytest.mark.parametrize("model", MODELS)
def test_what_a_process_that_ends_has_not_processed_others_do(
    fleet: Fleet, model: str, directory: Directory, topic: str
) -> None:
    """Executors refuse what comes when the interpreter has begun to end, and oslo.messaging knows nothing of that."""
    url = directory.url(notification_takeover=2)
    processed = _run_script(model, url, topic, "half")
    assert 10 <= len(processed) < 100
    other = fleet.get("client", following(model))
    run(other, "listen", url=url, topics=[topic])
    seen(other, 100 - len(processed))
    settled(url, topic)
    assert {*processed, *run(other, "seen")} == set(range(100))
    # As above: what its endpoints have ended with while the transport was closed.
    assert len(set(processed) & set(run(other, "seen"))) <= 64


# Forks.


@pytest.mark.one_directory
@pytest.mark.parametrize("model", MODELS)
def test_a_parent_and_its_children_send_at_once(
    start: Start, model: str, directory: Directory, tmp_path: Path, topic: str
) -> None:
    url = directory.url(notification_path=tmp_path / "notifications.sqlite")
    listener, parent = start(following(model)), start(model)
    run(listener, "listen", url=url, topics=[topic])
    result = run(parent, "fork_and_send", url=url, topic=topic, children=4, count=25)
    assert result["codes"] == [0] * 4
    seen(listener, len(result["sent"]))
    settled(url, topic)
    assert Counter(run(listener, "seen")) == Counter(result["sent"])


@pytest.mark.one_directory
@pytest.mark.parametrize("model", MODELS)
def test_a_child_sends_on_after_its_parent_has_ended(
    start: Start, model: str, directory: Directory, tmp_path: Path, topic: str
) -> None:
    """What SQLite knows of a parent's locks does not hold in its children."""
    url = directory.url(notification_path=tmp_path / "notifications.sqlite")
    parent, listener = start(model), start(following(model))
    run(parent, "send", url=url, topic=topic, values=["parent"])
    go = tmp_path / "go"
    done = tmp_path / "done"
    run(parent, "fork_to_send", url=url, topic=topic, values=["child 1", "child 2"], go=str(go), done=str(done))
    parent.run("cleanup", url=url)
    go.touch()
    wait_until(done.exists, LIMIT)
    run(listener, "listen", url=url, topics=[topic], workers=1)
    assert seen(listener, 3) == ["parent", "child 1", "child 2"]


@pytest.mark.one_directory
@pytest.mark.parametrize("doing", [[], ["send"], ["stop", "wait"], ["cleanup", "stop", "wait", "send"]], ids="-".join)
@pytest.mark.parametrize("model", MODELS)
def test_a_listener_survives_a_fork(start: Start, model: str, directory: Directory, topic: str, doing: list[str]) -> None:
    url = directory.url(notification_takeover=2)
    parent, other = start(model), start(following(model))
    run(parent, "listen", url=url, topics=[topic], workers=1)
    run(other, "send", url=url, topic=topic, values=["before"])
    seen(parent, 1)
    sent = ["before"]
    for i in range(3):
        assert run(parent, "fork_and", doing=doing, url=url, topic=topic, values=[f"{i} child"]) == 0
        run(other, "send", url=url, topic=topic, values=[f"{i} other"])
        sent += [f"{i} child", f"{i} other"] if "send" in doing else [f"{i} other"]
        assert seen(parent, len(sent)) == sent
    settled(url, topic)
    found = pool(url, topic)
    assert found is not None
    assert found.consumers == 1


# What it uses.


@pytest.mark.one_directory
@pytest.mark.parametrize("model", MODELS)
def test_transports_leave_nothing_open(start: Start, model: str, directory: Directory, topic: str) -> None:
    url = directory.url(zmq_linger=1)
    worker = start(model)
    run(worker, "listen", url=url, topics=[topic], label="steady", tag="steady")
    # While one connection to a file is open, SQLite keeps the descriptors of others, as many as there ever were, for new ones.
    run(worker, "transports", url=url, topic=f"{topic}-many", count=10)
    worker.run("resources")
    descriptors = worker.run("resources")["descriptors"] + SOME
    threads = run(worker, "native_threads")
    run(worker, "transports", url=url, topic=f"{topic}-many", count=50)
    wait_until(lambda: run(worker, "native_threads") <= threads, LIMIT, f"{threads} threads again")
    wait_until(lambda: worker.run("resources")["descriptors"] <= descriptors, LIMIT, f"{descriptors} descriptors again")


@pytest.mark.slow
@pytest.mark.one_directory
@pytest.mark.parametrize("model", MODELS)
def test_listeners_leave_nothing_open(start: Start, model: str, directory: Directory, topic: str) -> None:
    url = directory.url()
    worker = start(model)
    run(worker, "listen", url=url, topics=[topic], label="steady")
    run(worker, "listen_to_nothing", url=url, topics=[f"{topic}-many"], count=3)
    threads = run(worker, "native_threads")
    run(worker, "listen_at_all", url=url, topics=[f"{topic}-many"], count=100)
    wait_until(lambda: run(worker, "native_threads") <= threads, LIMIT, f"{threads} threads again")
    worker.run("resources")
    descriptors = worker.run("resources")["descriptors"] + SOME
    run(worker, "listen_to_nothing", url=url, topics=[f"{topic}-many"], count=100)
    run(worker, "listen_at_all", url=url, topics=[f"{topic}-many"], count=100)
    wait_until(lambda: run(worker, "native_threads") <= threads, LIMIT, f"{threads} threads again")
    wait_until(lambda: worker.run("resources")["descriptors"] <= descriptors, LIMIT, f"{descriptors} descriptors again")
    run(worker, "send", url=url, topic=topic, values=["arrives"])
    assert seen(worker, 1, "steady") == ["arrives"]
    found = pool(url, f"{topic}-many")
    assert found is not None
    assert found.consumers == 0


def switches(worker: Worker, others: list[int]) -> int:
    """How often the threads of a process but those have waited."""
    total = 0
    for task in Path(f"/proc/{worker.process.pid}/task").iterdir():
        if int(task.name) in others:
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            text = (task / "status").read_text()
            total += int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return total


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_an_idle_listener_rests(start: Start, model: str, directory: Directory, topic: str) -> None:
    worker = start(model)
    url = directory.url()
    run(worker, "listen", url=url, topics=[topic])
    run(worker, "send", url=url, topic=topic, values=["arrives"])
    seen(worker, 1)
    settled(url, topic)

    def per_second() -> float:
        others = run(worker, "executor_threads")
        before, began = switches(worker, others), time.monotonic()
        wait_until(lambda: time.monotonic() >= began + 3)
        return (switches(worker, others) - before) / (time.monotonic() - began)

    wait_until(lambda: per_second() < 5, LIMIT, "it to rest")
    assert cpu_shares([worker], 2)[0] < 0.05


@pytest.mark.rotated
def test_an_idle_listener_is_woken_at_once(client: Worker, server: Worker, url: str, topic: str) -> None:
    run(server, "listen", url=url, topics=[topic])
    sent = []
    for i in range(50):
        sent.append(run(client, "send_at", url=url, topic=topic, value=i))
        seen(server, i + 1)
    late = [arrived - began for arrived, began in zip(run(server, "arrivals"), sent, strict=True)]
    assert statistics.median(late) < 0.04, late  # looking ten times a second it would be 0.05
    # Who misses one finds it when it removes what was processed, a second later.
    assert sum(each > 0.5 for each in late) <= 1, late


# Beside RPC.


@pytest.mark.rotated
def test_rpc_and_notifications_of_one_transport_both_ways(client: Worker, server: Worker, url: str, topic: str) -> None:
    for name, worker in (("one", client), ("two", server)):
        worker.run("serve", url=url, topic=f"{topic}-{name}", server=name, label=name)
        run(worker, "listen", url=url, topics=[f"{topic}-{name}"])
    values = list(range(100))
    under_way = []
    for name, worker in (("two", client), ("one", server)):
        how = {"url": url, "topic": f"{topic}-{name}", "values": values}
        under_way.append(worker.begin("calls_together", method="echo", timeout=60, **how))
        under_way.append(begin(worker, "notify_together", url=url, topics=[f"{topic}-{name}"], values=values))
    assert [each.result(2 * LIMIT) for each in under_way] == [values, None] * 2
    for worker in (client, server):
        assert sorted(seen(worker, 100)) == values


@pytest.mark.one_directory
@pytest.mark.parametrize("model", MODELS)
def test_in_memory(start: Start, model: str, topic: str) -> None:
    worker = start(model)
    for i in range(2):
        run(worker, "send", url="zmq+memory://", topic=topic, values=[f"{i} before"])
        run(worker, "listen", url="zmq+memory://", topics=[topic], label="a", workers=1)
        run(worker, "listen", url="zmq+memory://", topics=[topic], label="b", pool="named", tag="other")
        run(worker, "send", url="zmq+memory://", topic=topic, values=[f"{i} after"], tag="another")
        assert seen(worker, 2, "a") == [f"{i} before", f"{i} after"]
        assert seen(worker, i + 1, "b") == ([f"{i} before"] * i + [f"{i} after"])  # its pool stays
        for label in ("a", "b"):
            run(worker, "end", label=label)
        for tag in ("", "other", "another"):
            worker.run("cleanup", url="zmq+memory://", tag=tag)
