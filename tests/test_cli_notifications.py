# SPDX-License-Identifier: Apache-2.0
"""``green-zmq notifications``, as a shell runs it, over a store of the test's own."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import oslo_messaging as om
import pytest
from oslo_config import cfg

from green_zmq import wire
from green_zmq.cli import main
from green_zmq.cli.common import PRIORITIES, read_url
from green_zmq.cli.notifications import records
from green_zmq.notifications import Consumer, Dead, State, Store, open_store
from green_zmq.routing import Topic
from tests.commands import COMMAND, LIMIT, Env, environment, process, result, run, wait_for

pytestmark = pytest.mark.slow

POOL = "a pool\n[bold]"
T = Topic("openstack", "t.info")


def url(folder: Path, **options: object) -> str:
    return f"zmq://?{urlencode({'directory_path': folder / 'directory.sqlite', **options})}"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    made = environment(url(tmp_path))
    made.pop("PYTHONUNBUFFERED", None)  # what is to be seen at once must be flushed
    return made


@contextlib.contextmanager
def opened(env: Env) -> Iterator[Store]:
    """The store that the commands use."""
    store = open_store(read_url(env["GREEN_ZMQ_URL"])[1])
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def consuming(env: Env, topic: Topic, pool: str = "") -> Iterator[Consumer]:
    with opened(env) as store:
        consumer = store.consume([topic], pool)
        try:
            yield consumer
        finally:
            consumer.close()


def stored(value: object, codec: int = wire.JSON) -> bytes:
    return wire.encode_stored(wire.encode_body(value, codec, lambda: None), codec)


def message(number: int) -> dict[str, Any]:
    return {
        "message_id": f"m{number}",
        "publisher_id": "p\n1",
        "event_type": "thing.made",
        "priority": "INFO",
        "payload": {"number": number},
        "timestamp": f"2020-01-01 00:00:0{number}.000000",
    }


def notifications(env: Env, *args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return run(env, "notifications", *args, **kwargs)


def listed(env: Env, *args: str) -> Any:
    return result(env, "notifications", *args, "--json")


def put_aside(env: Env, *bodies: bytes, topic: Topic = T, pool: str = "") -> None:
    with consuming(env, topic, pool) as consumer:
        with opened(env) as store:
            store.append([(topic, body) for body in bodies])
        taken = wait_for(lambda: consumer.take(len(bodies)))
        assert len(taken) == len(bodies)
        consumer.put_aside(taken)


def test_nothing_is_there(env: dict[str, str]) -> None:
    for args, said in (
        ([], "There are no notifications."),
        (["ls"], "There are no notifications."),
        (["dead"], "Nothing is put aside."),
        (["put-back", "--all"], "Nothing is put aside."),
    ):
        done = notifications(env, *args)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", f"green-zmq: {said}\n")
        done = notifications(env, *args, "--json")
        assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, [], f"green-zmq: {said}\n")


def test_list(env: dict[str, str]) -> None:
    other = Topic("other", "versioned\n.error")
    with consuming(env, T, POOL) as consumer, opened(env) as store:
        store.append([(T, stored([{}, message(i)])) for i in range(5)])
        store.append([(other, b"junk")])
        taken = consumer.take(3)
        consumer.acknowledge(taken[:1])
        consumer.put_aside(taken[1:2])

        one, two = listed(env)
        assert [(topic["exchange"], topic["topic"]) for topic in (one, two)] == [tuple(T), tuple(other)]
        assert (one["kept"], one["dropped"], one["dead"]) == (5, 0, 1)
        default, named = one["pools"]
        ages = [one["oldest"], default.pop("lag"), named.pop("lag")]
        assert default == {"pool": "", "consumers": 0, "waiting": 5, "taken": 0}
        assert named == {"pool": POOL, "consumers": 1, "waiting": 2, "taken": 1}
        assert all(0 <= age < 600 for age in ages)
        assert (two["kept"], two["dead"], [pool["pool"] for pool in two["pools"]]) == (1, 0, [""])

        for args in ([], ["ls"]):
            done = notifications(env, *args)
            assert (done.returncode, done.stderr) == (0, "")
            heading, *rows = done.stdout.splitlines()
            assert heading.split() == [
                "EXCHANGE", "TOPIC", "POOL", "CONSUMERS", "WAITING", "TAKEN", "LAG", "KEPT", "OLDEST", "DROPPED", "DEAD",
            ]  # fmt: skip
            cells = [re.split(r"  +", row) for row in rows]
            assert [row[:6] + row[7:8] + row[9:] for row in cells] == [
                ["openstack", "t.info", "-", "0", "5", "0", "5", "0", "1"],
                ["openstack", "t.info", "a pool\\n[bold]", "1", "2", "1", "5", "0", "1"],
                ["other", "versioned\\n.error", "-", "0", "1", "0", "1", "0", "0"],
            ]
            assert all(re.fullmatch(r"\d+s|\d+m\d+s", row[i]) for row in cells for i in (6, 8))
        # Options may be given before the action too.
        assert [topic["topic"] for topic in result(env, "notifications", "--json", "ls")] == [T.name, other.name]
        nowhere = {**env, "GREEN_ZMQ_URL": "nope://"}
        assert result(nowhere, "notifications", "--url", env["GREEN_ZMQ_URL"], "--json", "dead")[0]["pool"] == POOL

        # What all pools have processed is gone; the pool lags no more.
        with consuming(env, T) as rest:
            rest.acknowledge(wait_for(lambda: rest.take(10)))
            consumer.acknowledge([*taken[2:], *consumer.take(10)])
            store.trim([T])
        topic = listed(env)[0]
        assert (topic["kept"], topic["oldest"], topic["dead"]) == (0, None, 1)
        assert [pool["lag"] for pool in topic["pools"]] == [None, None]
        row = notifications(env).stdout.splitlines()[1].split()
        assert row == ["openstack", "t.info", "-", "0", "0", "0", "-", "0", "-", "0", "1"]


def test_what_was_dropped_is_counted(tmp_path: Path) -> None:
    env = environment(url(tmp_path, notification_messages=2))
    with opened(env) as store:
        store.append([(T, stored([{}, message(i)])) for i in range(5)])
        store.trim([T])
    (topic,) = listed(env)
    assert (topic["kept"], topic["dropped"]) == (2, 3)


def test_topics_of_which_only_the_dead_are_left() -> None:
    dead = [Dead(str(i), topic, "", 1.0, 1, b"") for i, topic in enumerate([T, T, Topic("a", "b")])]
    nothing = {"kept": 0, "oldest": None, "dropped": 0, "pools": []}
    assert records([], dead) == [
        {"exchange": "a", "topic": "b", "dead": 1, **nothing},
        {"exchange": "openstack", "topic": "t.info", "dead": 2, **nothing},
    ]
    found = records([State(T, 3, 1.23456, 0, [])], dead[:1])
    assert found == [{"exchange": "openstack", "topic": "t.info", **nothing, "kept": 3, "oldest": 1.235, "dead": 1}]


def test_dead(env: dict[str, str]) -> None:
    put_aside(env, stored([{"user": "me"}, message(1)]), b"junk", stored(["no", ["notification"]]))
    when = {"payload": {"when": datetime.datetime(2020, 1, 2)}}
    put_aside(env, stored([{}, when], wire.MSGPACK), topic=Topic("other", "t.error"), pool=POOL)
    found = listed(env, "dead")
    ages = [each.pop("age") for each in found]
    assert all(0 <= age < 600 for age in ages)
    assert sorted(ages, reverse=True) == ages
    names = [each.pop("name") for each in found]
    assert len(set(names)) == 4
    common = {"exchange": "openstack", "topic": "t.info", "pool": "", "tries": 1}
    error = found[1].pop("error")
    assert found == [
        {**common, "context": {"user": "me"}, "message": message(1)},
        {**common, "context": None, "message": None},
        {**common, "context": "no", "message": ["notification"]},
        {
            **common,
            "exchange": "other",
            "topic": "t.error",
            "pool": POOL,
            "context": {},
            "message": {"payload": {"when": "2020-01-02T00:00:00.000000"}},
        },
    ]
    assert error.startswith("it cannot be made out: ")

    done = notifications(env, "dead")
    assert (done.returncode, done.stderr) == (0, "")
    heading, *rows = (re.split(r"  +", line) for line in done.stdout.splitlines())
    assert heading == ["NAME", "EXCHANGE", "TOPIC", "POOL", "EVENT_TYPE", "PUBLISHER_ID", "MESSAGE_ID", "TRIES", "AGE"]
    assert [row[:-1] for row in rows] == [
        [names[0], "openstack", "t.info", "-", "thing.made", "p\\n1", "m1", "1"],
        [names[1], "openstack", "t.info", "-", "-", "-", "-", "1"],
        [names[2], "openstack", "t.info", "-", "-", "-", "-", "1"],
        [names[3], "other", "t.error", "a pool\\n[bold]", "-", "-", "-", "1"],
    ]

    done = notifications(env, "dead", "--body")
    assert (done.returncode, done.stderr) == (0, "")
    heading, *lines = done.stdout.splitlines()
    assert heading.split()[7:] == ["BODY", "TRIES", "AGE"]
    whole = json.dumps({"context": {"user": "me"}, "message": message(1)}, ensure_ascii=False)
    assert whole in lines[0]
    assert error in lines[1]
    assert '"2020-01-02T00:00:00.000000"' in lines[3]


def test_put_back(env: dict[str, str]) -> None:
    put_aside(env, *(stored([{}, message(i)]) for i in range(4)))
    put_aside(env, stored([{}, message(4)]), pool=POOL)
    names = [each["name"] for each in listed(env, "dead")]
    # What cannot be done in full is not begun.
    done = notifications(env, "put-back", names[0], "nobody")
    assert (done.returncode, done.stdout) == (4, "")
    assert "'nobody'" in done.stderr
    assert "green-zmq notifications dead" in done.stderr
    assert [each["name"] for each in listed(env, "dead")] == names

    done = notifications(env, "put-back", names[2], names[0], names[2])
    assert (done.returncode, done.stderr) == (0, "green-zmq: 2 notifications put back.\n")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["NAME", names[2], names[0]]
    assert [each["name"] for each in listed(env, "dead")] == [names[1], names[3], names[4]]
    done = notifications(env, "put-back", names[2])
    assert (done.returncode, done.stdout) == (4, "")
    done = notifications(env, "put-back", "--json", names[3])
    assert (done.returncode, done.stderr) == (0, "green-zmq: 1 notification put back.\n")
    assert [each["message"] for each in json.loads(done.stdout)] == [message(3)]

    done = notifications(env, "put-back", "--all")
    assert (done.returncode, done.stderr) == (0, "green-zmq: 2 notifications put back.\n")
    assert listed(env)[0]["dead"] == 0
    for pool, numbers in (("", {0, 1, 2, 3, 4}), (POOL, {4})):  # each has its own, and the default one what the other got too
        with consuming(env, T, pool) as consumer:
            taken = {
                wire.decode_stored(each.body, lambda: None)[1]["payload"]["number"]
                for each in wait_for(lambda consumer=consumer: consumer.take(10))
            }
            assert taken == numbers


@contextlib.contextmanager
def tailing(env: Env, *args: str) -> Iterator[subprocess.Popen[str]]:
    with process(env, "notifications", "tail", *args) as child:
        assert child.stderr is not None
        line = child.stderr.readline()
        assert line.startswith("green-zmq: following "), line
        yield child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_tail(env: dict[str, str], number: int) -> None:
    with opened(env) as store:
        store.append([(T, stored([{}, message(0)]))])  # before, and so not shown
    with tailing(env, "t", "u.error", "t.info") as tail, tailing(env, "--json", "--exchange", "x", "t.warn") as other:
        assert tail.stdout is not None
        assert other.stdout is not None
        with opened(env) as store:
            store.append([(Topic("openstack", name), b"not followed") for name in ("u.info", "tt.info", "t", "t.nope")])
            for priority in PRIORITIES:
                store.append([(Topic("openstack", f"t.{priority}"), stored([{"user": "me"}, message(1)]))])
                line = tail.stdout.readline()
                assert line == f"2020-01-01 00:00:01.000000  t.{priority}  thing.made  p\\n1  m1\n"
            store.append([(Topic("openstack", "u.error"), b"junk\n")])
            assert tail.stdout.readline().startswith("u.error  it cannot be made out: ")
            store.append([(Topic("openstack", "u.error"), stored(["no", "notification"]))])
            assert tail.stdout.readline() == "-  u.error  -  -  -\n"

            store.append([(Topic("x", "t.warn"), stored([{"user": "me"}, message(i)])) for i in (1, 2)])
            store.append([(Topic("x", "t.warn"), b"junk")])
            for i in (1, 2):
                assert json.loads(other.stdout.readline()) == {
                    "exchange": "x",
                    "topic": "t.warn",
                    "context": {"user": "me"},
                    "message": message(i),
                }
            found = json.loads(other.stdout.readline())
            assert found["message"] is None
            assert found["error"].startswith("it cannot be made out: ")
        for child in (tail, other):
            child.send_signal(number)
            out, err = child.communicate(timeout=LIMIT)
            assert (child.returncode, out, err) == (0, "", "")
    # No pool began, nothing was taken.
    for topic in listed(env):
        assert [(pool["pool"], pool["waiting"], pool["consumers"]) for pool in topic["pools"]] == [("", topic["kept"], 0)]


def test_tail_goes_on_when_the_store_does(env: dict[str, str], tmp_path: Path) -> None:
    with tailing(env, "t") as tail, contextlib.closing(sqlite3.connect(tmp_path / "notifications.sqlite")) as database:
        assert tail.stdout is not None
        assert tail.stderr is not None
        database.execute("begin immediate")
        line = tail.stderr.readline()
        assert "database is locked" in line
        assert line.endswith("It is tried again.\n")
        database.rollback()
        assert tail.stderr.readline() == "green-zmq: The notifications can be read again.\n"
        assert notifications(env, "publish", "t", "thing").returncode == 0
        assert tail.stdout.readline().split()[2:4] == ["t.info", "thing"]
        tail.terminate()
        out, err = tail.communicate(timeout=LIMIT)
        assert (tail.returncode, out, err) == (0, "", "")


def test_whoever_reads_the_tail_has_gone(env: dict[str, str]) -> None:
    reader, writer = os.pipe()
    child = subprocess.Popen(
        [*COMMAND, "notifications", "tail", "t"], env=env, stdout=writer, stderr=subprocess.PIPE, encoding="utf-8"
    )
    os.close(writer)
    try:
        assert child.stderr is not None
        assert child.stderr.readline().startswith("green-zmq: following ")
        os.close(reader)
        assert notifications(env, "publish", "t", "thing").returncode == 0
        _, err = child.communicate(timeout=LIMIT)
        assert (child.returncode, err) == (141, "")
    finally:
        child.kill()
        child.communicate(timeout=LIMIT)


def test_publish(env: dict[str, str]) -> None:
    got = []

    class Endpoint:
        def __init__(self, exchange: str | None) -> None:
            self.exchange = exchange

        def _note(self, ctxt: Any, publisher_id: str, event_type: str, payload: Any, metadata: Any) -> None:
            got.append((self.exchange, ctxt, publisher_id, event_type, payload))

        info = error = _note

    cfg.CONF([], project="green_zmq_tests", default_config_files=[], default_config_dirs=[])
    transport = om.get_notification_transport(cfg.CONF, env["GREEN_ZMQ_URL"])
    listeners = [
        om.get_notification_listener(transport, [om.Target(topic="t", exchange=exchange)], [Endpoint(exchange)], "threading")
        for exchange in (None, "other")
    ]
    for listener in listeners:
        listener.start()
    try:
        done = notifications(env, "publish", "t", "thing.made")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        wait_for(lambda: len(got) == 1)
        assert got[0] == (None, {}, f"green-zmq.{socket.gethostname()}", "thing.made", {})
        words = ("ü", '{"a": [1, null], "b": "😀"}', "--exchange", "other", "--priority", "error", "--publisher-id", "p1")
        sent = result(env, "notifications", "publish", "--json", "t", *words)
        wait_for(lambda: len(got) == 2)
        assert got[1] == ("other", {}, "p1", "ü", {"a": [1, None], "b": "😀"})
        assert (sent["exchange"], sent["topic"], sent["context"]) == ("other", "t.error", {})
        expected = {"event_type": "ü", "publisher_id": "p1", "priority": "ERROR", "payload": got[1][4]}
        assert expected.items() <= sent["message"].items()
        assert sent["message"].keys() - expected.keys() == {"message_id", "timestamp"}
        assert notifications(env, "publish", "t", "big", "-", input=json.dumps("x" * 3_000_000)).returncode == 0
        wait_for(lambda: len(got) == 3)
        assert got[2][4] == "x" * 3_000_000
    finally:
        for listener in listeners:
            listener.stop()
            listener.wait()
        transport.cleanup()


def test_all_priorities_can_be_published(env: dict[str, str]) -> None:
    for priority in PRIORITIES:
        sent = listed(env, "publish", "t", "thing", "--priority", priority)
        assert sent["topic"] == f"t.{priority}"
    assert {topic["topic"]: topic["kept"] for topic in listed(env)} == {f"t.{priority}": 1 for priority in PRIORITIES}


def test_a_store_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("no database" * 1000)
    env = environment(url(tmp_path, notification_path=tmp_path / "bad"))
    for args in (
        ["ls"],
        ["dead", "--json"],
        ["put-back", "--all"],
        ["put-back", "1"],
        ["tail", "t"],
        ["publish", "t", "thing"],
        ["publish", "t", "thing", "--retry", "2", "--json"],
    ):
        done = notifications(env, *args)
        assert (done.returncode, done.stdout) == (4, ""), args
        *warned, line = done.stderr.splitlines()
        assert len(warned) == ("--retry" in args)
        assert line.startswith(f"green-zmq: The notifications in {tmp_path / 'bad'} cannot be opened")


def test_publish_tries_again(tmp_path: Path) -> None:
    """As often as it is told to: until the store can be used."""
    bad = tmp_path / "bad"
    bad.write_text("no database" * 1000)
    env = environment(url(tmp_path, notification_path=bad))
    with process(env, "notifications", "publish", "t", "thing", "--retry", "999999") as publish:
        assert publish.stderr is not None
        assert "file is not a database" in publish.stderr.readline()
        bad.unlink()
        out, err = publish.communicate(timeout=LIMIT)
        assert (publish.returncode, out) == (0, "")
        assert err == f"green-zmq: Notifications in {bad} can be stored again.\n"
    assert listed(env)[0]["kept"] == 1


@pytest.mark.parametrize(
    "args",
    [
        ["nope"],
        ["ls", "more"],
        ["dead", "more"],
        ["put-back"],
        ["put-back", ""],
        ["put-back", "1", "--all"],
        ["put-back", "--nope"],
        ["tail"],
        ["tail", ""],
        ["tail", "t", "--exchange", ""],
        ["tail", os.fsdecode(b"\xff")],
        ["tail", "t" * 70_000],
        ["publish"],
        ["publish", "t"],
        ["publish", "t", ""],
        ["publish", "t", "thing", "{"],
        ["publish", "t", "thing", "NaN"],
        ["publish", "t", "thing", "{" * 100_000],
        ["publish", "t", "thing", "{}", "more"],
        ["publish", "t", "thing", "--priority", "INFO"],
        ["publish", "t", "thing", "--priority", "warning"],
        ["publish", "t", "thing", "--retry", "-1"],
        ["publish", "t.info", "thing"],
        ["publish", os.fsdecode(b"\xff"), "thing"],
        ["publish", "t", "thing", "--exchange", os.fsdecode(b"\xff")],
        *([*action, "--url", bad] for action in ([], ["dead"], ["put-back", "--all"], ["tail", "t"], ["publish", "t", "thing"])
          for bad in ("", "zmq", "nope://", "zmq://?nope=1")),
    ],
)  # fmt: skip
def test_usage(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    """In this process: a Python of its own for each takes its time."""
    monkeypatch.setenv("GREEN_ZMQ_URL", env["GREEN_ZMQ_URL"])
    try:
        code: object = main(["notifications", *args])
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert "green-zmq" in err


def test_what_cannot_be_published(tmp_path: Path) -> None:
    env = environment(url(tmp_path, max_message_bytes=65536))
    done = notifications(env, "publish", "t", "thing", "-", input=json.dumps("x" * 70_000))
    assert (done.returncode, done.stdout) == (2, "")
    assert "max_message_bytes" in done.stderr
    done = notifications(env, "publish", "t", "thing", "-", input="{")
    assert (done.returncode, done.stdout) == (2, "")
    assert "stdin is no JSON" in done.stderr
    assert notifications(env, "--json").stdout == "[]\n"
