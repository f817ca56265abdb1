# SPDX-License-Identifier: Apache-2.0
"""The commands that look into a directory and mend it, over each directory that processes can share."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from green_zmq.cli import main
from green_zmq.cli.common import UNDELIVERED, USAGE, Failure
from green_zmq.cli.nodes import duration, find
from green_zmq.routing import Node
from tests.commands import Env, environment, listed, result, run, serving, wait_for
from tests.servers import RedisServer

pytestmark = pytest.mark.slow

Place = Callable[..., Env]
SECRET = "s3cret&pass"
COMMANDS = (
    ["ls"], ["topics"], ["sweep"], ["evict", "host"], ["figures"],
    *(["notifications", *words] for words in ([], ["dead"], ["put-back", "--all"], ["tail", "t"], ["publish", "t", "e"])),
)  # fmt: skip


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_place(redis_server: RedisServer) -> Iterator[Place]:
    yield lambda **options: environment(
        f"zmq+redis://{redis_server.address}/0?{urlencode({'rpc_zmq_host': '127.0.0.1', **options})}"
    )
    with redis_server.client() as client:
        client.flushall()


@pytest.fixture(params=["sqlite", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Makes the environment of commands that share a directory, with options for the query of their URL."""
    if request.param == "redis":
        made: Place = request.getfixturevalue("redis_place")
        return made
    return lambda **options: environment(f"zmq://?{urlencode({'directory_path': tmp_path / 'directory.sqlite', **options})}")


def table(env: Env, *args: str) -> list[list[str]]:
    """What a command prints, by cells, which must not have spaces within."""
    done = run(env, *args)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_nothing_is_registered(place: Place) -> None:
    env = place()
    for command in ("ls", "topics", "sweep", "figures"):
        said = "green-zmq: Nothing is dead.\n" if command == "sweep" else "green-zmq: Nothing is registered.\n"
        done = run(env, command)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", said)
        done = run(env, command, "--json")
        assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, [], said)
    for command in ("evict", "figures"):
        done = run(env, command, "nobody")
        assert (done.returncode, done.stdout) == (4, "")
        assert "'nobody'" in done.stderr
        assert "green-zmq ls" in done.stderr


def test_what_is_there(place: Place) -> None:
    env = place()
    host = socket.gethostname()
    with (
        serving(env, "a", "--server", "one\n[two]") as first,
        serving(env, "a", "--server", "s") as second,
        serving(env, "a", "--server", "s", "--executor", "gevent"),
        serving(env, "b", "--server", "s", "--executor", "eventlet"),
    ):
        found = listed(env)
        assert [(li["topic"], li["server"]) for li in found] == [("a", "one\n[two]"), ("a", "s"), ("a", "s"), ("b", "s")]
        assert found[0]["pid"] == first.pid
        assert [row[2] for row in table(env, "ls", "a")[1:]] == ["one\\n[two]", "s", "s"]

        heading, *rows = table(env, "topics")
        assert heading == ["EXCHANGE", "TOPIC", "MODELS", "SERVERS", "NAMES", "HOSTS", "OLDEST", "NEWEST"]
        assert [row[:-2] for row in rows] == [
            ["openstack", "a", "gevent", "1,", "threads", "2", "3", "2", "1"],
            ["openstack", "b", "eventlet", "1", "1", "1", "1"],
        ]
        a, b = result(env, "topics", "--json")
        assert (a["names"], a["hosts"], a["models"]) == (["one\n[two]", "s"], [host], {"gevent": 1, "threads": 2})
        assert (b["exchange"], b["topic"], b["models"]) == ("openstack", "b", {"eventlet": 1})
        ages = [server["age"] for server in a["servers"]]
        assert (a["oldest"], a["newest"]) == (max(ages), min(ages))
        known = [{k: v for k, v in li.items() if k not in ("exchange", "topic", "age")} for li in found[:3]]
        assert [{k: v for k, v in server.items() if k != "age"} for server in a["servers"]] == known

        heading, *rows = table(env, "figures")
        assert heading[:4] == ["ADDRESS", "HOST", "MODEL", "PID"]
        assert heading[4:] == ["OPEN", "REUSED", "OPENED", "CLOSED", "EVICTED", "FAILED"]
        assert {row[3]: row[:3] for row in rows} == {str(li["pid"]): [li["address"], host, li["model"]] for li in found}
        assert all(cell.isdecimal() for row in rows for cell in row[4:])
        told = result(env, "figures", found[3]["instance"][:8], "--json")
        assert [(node["instance"], node["figures"]["connections open"]) for node in told] == [(found[3]["instance"], 0)]

        # Of one who does not answer, the others' figures are told nevertheless.
        second.send_signal(signal.SIGSTOP)
        said = "1 of 4 processes did not answer within 2 s"
        done = wait_for(lambda: said in (done := run(env, "figures", "--timeout", "2")).stderr and done)
        assert done.returncode == 3
        silent = [line for line in done.stdout.splitlines() if line.endswith("no answer")]
        assert [line.split()[3] for line in silent] == [str(second.pid)]
        (stuck,) = (li for li in found if li["pid"] == second.pid)
        done = run(env, "figures", stuck["instance"], "--timeout", "0.1", "--json")
        assert done.returncode == 3
        assert [(node["pid"], node["figures"]) for node in json.loads(done.stdout)] == [(second.pid, None)]


def test_evict(place: Place) -> None:
    env = place(zmq_target_expire=3000, zmq_target_update=1)
    with serving(env, "t", "--server", "lost") as lost, serving(env, "t", "--server", "s"):
        # So it is when its host is: its record stays until it expires.
        lost.send_signal(signal.SIGSTOP)
        first, second = listed(env)
        assert [first["server"], second["server"]] == ["lost", "s"]
        address = first["address"].removeprefix("tcp://")
        for dry in (["--dry-run"], []):
            done = run(env, "evict", address, *dry)
            assert done.returncode == 0
            heading, row = [line.split() for line in done.stdout.splitlines()]
            assert heading == ["ADDRESS", "HOST", "INSTANCE", "MODEL", "PID", "LISTENERS"]
            assert row == [first["address"], first["hostname"], first["instance"][:8], "threads", str(lost.pid), "1"]
            assert done.stderr.startswith(f"green-zmq: 1 process {'would be removed' if dry else 'removed'}")
            assert [li["server"] for li in listed(env)] == (["lost", "s"] if dry else ["s"])
        # What cannot be done in full is not begun.
        done = run(env, "evict", second["instance"], address)
        assert (done.returncode, done.stdout) == (4, "")
        assert repr(address) in done.stderr
        assert [li["server"] for li in listed(env)] == ["s"]
        assert result(env, "call", "t", "inspect", "--timeout", "50")["server"] == "s"
        # It still runs after all.
        lost.send_signal(signal.SIGCONT)
        wait_for(lambda: [li["server"] for li in listed(env)] == ["lost", "s"])

        done = run(env, "evict", socket.gethostname(), "--json")
        assert done.returncode == 0
        assert [node["listeners"] for node in json.loads(done.stdout)] == [
            [{"exchange": "openstack", "topic": "t", "server": server}] for server in ("lost", "s")
        ]
        assert done.stderr.startswith("green-zmq: 2 processes removed")
        wait_for(lambda: len(listed(env)) == 2)


def swept(env: Env, *args: str) -> list[dict[str, str]]:
    done = run(env, "sweep", "--json", *args)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found


def test_sweep(place: Place) -> None:
    # The one that stays does not look after the directory while this runs, and so leaves what is dead to others.
    with serving(place(zmq_target_expire=3000, zmq_target_update=1000), "t", "--server", "s"):
        env = place(zmq_target_expire=5, zmq_target_update=1)
        with serving(env, "t", "--server", "dead") as server:
            dead = {"exchange": "openstack", "topic": "t", "server": "dead", "instance": listed(env)[0]["instance"]}
            server.kill()
            server.wait()
        wait_for(lambda: swept(env, "--dry-run"))
        assert swept(env, "--dry-run") == [dead]
        for dry in (["--dry-run"], []):
            done = run(env, "sweep", *dry)
            assert done.returncode == 0
            heading, row = [line.split() for line in done.stdout.splitlines()]
            assert heading == ["EXCHANGE", "TOPIC", "SERVER", "INSTANCE"]
            assert row == ["openstack", "t", "dead", dead["instance"][:8]]
            assert done.stderr == f"green-zmq: 1 dead listener {'would be removed' if dry else 'removed'}.\n"
        assert swept(env) == []
        assert [li["server"] for li in listed(env)] == ["s"]


@pytest.mark.parametrize("model", ["threads", "eventlet", "gevent"])
def test_nothing_stays_in_redis(redis_place: Place, redis_server: RedisServer, model: str) -> None:
    env = redis_place(zmq_target_expire=3, zmq_target_update=1)
    with redis_server.client() as client:
        with serving(env, "t", "--executor", model) as server:
            assert client.dbsize() > 0
            assert result(env, "call", "t", "inspect", "--timeout", "50")["pid"] == server.pid
            server.terminate()
            assert server.wait(60) == 0
            assert client.dbsize() == 0
        with serving(env, "t", "--executor", model) as server, serving(env, "u", "--executor", model) as other:
            server.kill()
            other.kill()
            wait_for(lambda: client.dbsize() == 0)


@pytest.mark.parametrize(
    "url",
    [
        "zmq+redis://me:SECRET@127.0.0.1:PORT/0",
        "zmq+redis://:SECRET@127.0.0.1:PORT/0",
        "zmq+redis://me:SECRET@127.0.0.1:PORT/x",
        "zmq+redis://me:SECRET@127.0.0.1:1/0",
        "zmq+redis://me:SECRET@127.0.0.1:none/0",
        "zmq+redis://me:SECRET@[::1/0",
        "zmq+redis://me:x#SECRET@127.0.0.1:PORT/0",
        "zmq+redis://me:SECRET#x@127.0.0.1:PORT/0",
        "zmq+redis://me:SECRET/x@127.0.0.1:PORT/0",
        "zmq+redis://me:1/SECRET@127.0.0.1:PORT/0",
        "zmq+redis://me:SECRET@127.0.0.1:PORT,127.0.0.2:PORT/0?nope=1",
        "zmq+redis://me:SECRET@127.0.0.1:PORT/0?redis_timeout=soon",
        "zmq+sentinel://127.0.0.1:none/group?redis_sentinel_password=SECRET",
        "zmq+sentinel://127.0.0.1:1/group?redis_sentinel_password=SECRET",
        "zmq://me:SECRET@127.0.0.1:1/0",
        "nope://me:SECRET@127.0.0.1:1/0",
    ],
)
def test_no_password_is_told(
    redis_server: RedisServer,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = url.replace("SECRET", "s3cret").replace("PORT", str(redis_server.port))
    for command in (*COMMANDS, ["call", "topic", "method", "--timeout", "1"]):
        monkeypatch.setenv("GREEN_ZMQ_URL", url)
        assert main(command) in (USAGE, UNDELIVERED)
        out, err = capfd.readouterr()
        assert err.startswith("green-zmq: ")
        assert "s3cret" not in out + err + caplog.text
        monkeypatch.delenv("GREEN_ZMQ_URL")
        # What was meant as a URL may come to stand elsewhere.
        with pytest.raises(SystemExit):
            main([*command, "--urll", url, "more"])
        out, err = capfd.readouterr()
        assert "s3cret" not in out + err


def test_a_password_works() -> None:
    with RedisServer(password=SECRET) as server:
        url = "zmq+redis://:{}@" + server.address + "/0"
        done = run(environment(url.format("s3cret%26pass")), "ls")
        assert (done.returncode, done.stderr) == (0, "green-zmq: Nothing is registered.\n")
        done = run(environment(url.format("wrong")), "ls")
        assert done.returncode == 4
        assert "password" in done.stderr
        assert "wrong" not in done.stderr


def test_a_directory_that_does_not_answer() -> None:
    env = environment("zmq+redis://127.0.0.1:1/0")
    for command in COMMANDS:
        done = run(env, *command)
        assert (done.returncode, done.stdout) == (4, "")
        assert "127.0.0.1:1 cannot be used" in done.stderr


def node(instance: str, hostname: str = "one", port: int = 1, host: str = "10.0.0.1") -> Node:
    return Node(bytes.fromhex(instance.ljust(32, "0")), host, port, hostname, 1, "threads")


def test_find() -> None:
    a, b, c = node("abcd1"), node("abcd2", port=2), node("beef", "abcd", host="fe80::1")
    nodes = [a, b, c, a]
    assert find(nodes, ["one"]) == [a, b]
    assert find(nodes, ["10.0.0.1"]) == [a, b]
    assert find(nodes, ["10.0.0.1:2", "one"]) == [b, a]
    assert find(nodes, ["tcp://[fe80::1]:1"]) == find(nodes, ["[fe80::1]:1"]) == find(nodes, ["fe80::1"]) == [c]
    assert find(nodes, ["one:1"]) == find(nodes, ["ABCD1"]) == find(nodes, [a.instance.hex()]) == [a]
    # The whole name of a host, rather than the beginning of two ids.
    assert find(nodes, ["abcd"]) == [c]
    assert find([], []) == []
    with pytest.raises(Failure, match=f"{a.instance.hex()}, {b.instance.hex()}") as caught:
        find([a, b], ["abcd"])
    assert caught.value.code == USAGE
    for word in ("bee", "beef0000f", "zzzz", "10.0.0.1:3", "on", "10.0.0", f"{c.instance.hex()}0"):
        with pytest.raises(Failure, match="green-zmq ls") as caught:
            find(nodes, ["one", word])
        assert caught.value.code == UNDELIVERED


def test_durations() -> None:
    seconds = (-1, 0, 59.9, 60, 3599, 3600, 86399, 86400, 90000, 1e8)
    assert [duration(s) for s in seconds] == [
        "0s", "0s", "59s", "1m0s", "59m59s", "1h0m", "23h59m", "1d0h", "1d1h", "1157d9h",
    ]  # fmt: skip
