# SPDX-License-Identifier: Apache-2.0
"""The command ``green-zmq``, as a shell runs it: real processes over a directory of the test's own."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import oslo_messaging as om
import pytest
from oslo_config import cfg

from green_zmq import get_rpc_server
from green_zmq.cli import main
from tests.commands import COMMAND, LIMIT, environment, listed, process, result, run, serving, wait_for

pytestmark = pytest.mark.slow

MODELS = ("eventlet", "gevent", "threads")
NAME = "a host@back/end:1 ü\n[bold]"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return environment(f"zmq://?directory_path={quote(str(tmp_path))}/directory.sqlite") | {"TMPDIR": str(tmp_path)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve(env: dict[str, str], model: str, number: int) -> None:
    with serving(env, "topic", "--server", "s", "--executor", model) as server:
        seen = result(env, "call", "topic", "inspect")
        assert (seen["pid"], seen["model"], seen["server"]) == (server.pid, model, "s")
        assert seen["counts"] == {"inspect": 1}
        # A method that runs when the server is stopped does not hold it up, and its caller gets an answer.
        with process(env, "call", "topic", "sleep", "seconds=600", "--timeout", "700") as sleeper:
            wait_for(lambda: result(env, "call", "topic", "inspect")["counts"].get("sleep"))
            server.send_signal(number)
            out, err = server.communicate(timeout=LIMIT)
            assert (server.returncode, out, err) == (0, "", "")
            out, err = sleeper.communicate(timeout=LIMIT)
            assert (sleeper.returncode, err) == (0, "")
            assert 0 <= json.loads(out) < 500
    assert listed(env) == []


@pytest.mark.parametrize("model", MODELS)
def test_serve_runs_methods_at_the_same_time(env: dict[str, str], model: str) -> None:
    with serving(env, "topic", "--executor", model), contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(process(env, "call", "topic", "sleep", "seconds=600", "--timeout", "600"))
        wait_for(lambda: result(env, "call", "topic", "inspect")["counts"].get("sleep") == 3)


def test_arguments(env: dict[str, str]) -> None:
    with serving(env, "topic"):

        def echo(*args: str, **kwargs: Any) -> Any:
            return result(env, "call", "topic", "echo", *args, **kwargs)

        assert echo() == {}
        assert echo("n=1", "f=-1.5", "t=true", 'l=[1, "x"]', "o={}", "z=null") == {
            "n": 1,
            "f": -1.5,
            "t": True,
            "l": [1, "x"],
            "o": {},
            "z": None,
        }
        assert echo("word=hello world", "empty=", "eq=a=b", 'quoted="1"', "nan=NaN", "bad={") == {
            "word": "hello world",
            "empty": "",
            "eq": "a=b",
            "quoted": "1",
            "nan": "NaN",
            "bad": "{",
        }
        assert echo("a=1", "--timeout", "5", '{"b": "x=y"}', "--retry", "1", "c=2") == {"a": 1, "b": "x=y", "c": 2}
        assert echo("ключ=😀€", "-", input='{"ß": "\\u0000\\n"}') == {"ключ": "😀€", "ß": "\0\n"}
        big = "x" * 3_000_000
        assert echo("-", input=json.dumps({"big": big})) == {"big": big}
        # JSON stays JSON where the output's encoding has not the letters, or they are none.
        ascii_only = env | {"PYTHONIOENCODING": "ascii"}
        assert result(ascii_only, "call", "topic", "echo", "a=😀") == {"a": "😀"}
        assert echo(os.fsdecode(b"a=\xff")) == {"a": "\udcff"}


def test_a_result_that_json_has_not(env: dict[str, str]) -> None:
    class Endpoint:
        def when(self, ctxt: Any) -> Any:
            return {"when": datetime.datetime(2020, 1, 2, 3, 4, 5, 6), "which": [{1}, b"text"]}

        def what(self, ctxt: Any) -> Any:
            return b"\xff"

    url = f"{env['GREEN_ZMQ_URL']}&rpc_zmq_serialization=msgpack"
    cfg.CONF([], project="green_zmq_tests", default_config_files=[], default_config_dirs=[])
    transport = om.get_rpc_transport(cfg.CONF, url)
    server = get_rpc_server(transport, om.Target(topic="topic", server="s"), [Endpoint()], executor="threading")
    server.start()
    try:
        assert result(environment(url), "call", "topic", "when") == {
            "when": "2020-01-02T03:04:05.000006",
            "which": [[1], "text"],
        }
        assert result(environment(url), "call", "topic", "what") == repr(b"\xff")
    finally:
        server.stop()
        server.wait()
        transport.cleanup()


def test_targets(env: dict[str, str]) -> None:
    with serving(env, "topic", "--server", NAME), serving(env, "topic", "--server", "two"):
        with serving(env, "topic", "--server", "two", "--exchange", "other") as other:
            for name in (NAME, "two"):
                assert result(env, "call", "topic", "inspect", "--server", name)["server"] == name
            seen = result(env, "call", "topic", "inspect", "--exchange", "other", "--context", '{"user": "me"}')
            assert seen["pid"] == other.pid
            for args in (("--namespace", "nope"), ("--rpc-version", "7.0")):
                done = run(env, "call", "topic", "inspect", *args)
                assert (done.returncode, done.stdout) == (1, "")
                assert "UnsupportedVersion" in done.stderr
        for command, patience in (("cast", "--retry"), ("fanout", "--timeout")):
            done = run(env, command, "topic", "count", f"key={command}", "number=7", patience, "50")
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

        def counted(key: str) -> list[Any]:
            servers = [result(env, "call", "topic", "inspect", "--server", name) for name in (NAME, "two")]
            return [server["counted"][key] for server in servers if key in server["counted"]]

        assert wait_for(lambda: counted("cast")) == [[1, 7]]
        assert wait_for(lambda: len(counted("fanout")) == 2)
        assert counted("fanout") == [[1, 7], [1, 7]]


def test_remote_exceptions(env: dict[str, str]) -> None:
    with serving(env, "topic") as server:
        done = run(env, "call", "topic", "fail", "message=süß: 1")
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "green-zmq: ValueError: süß: 1\n")
        done = run(env, "call", "topic", "fail", "--traceback")
        assert done.returncode == 1
        assert done.stderr.startswith("Traceback (most recent call last):\n  File ")
        assert done.stderr.endswith("raise ValueError(message)\nValueError: as asked\ngreen-zmq: ValueError: as asked\n")
        done = run(env, "call", "topic", "nope")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("green-zmq: NoSuchMethod: ")
        done = run(env, "call", "topic", "sleep")
        assert done.returncode == 1
        assert done.stderr.startswith("green-zmq: TypeError: ")
        server.terminate()
        # What is expected is not logged, and what is logged has no traceback.
        logged = server.communicate(timeout=LIMIT)[1].splitlines()
        assert [line.split(": ")[2] for line in logged] == ["NoSuchMethod", "TypeError"]


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["nope"],
        ["call"],
        ["call", "topic"],
        ["call", "", "method"],
        ["call", "topic", "method", "word"],
        ["call", "topic", "method", "=1"],
        ["call", "topic", "method", "a=1", "a=2"],
        ["call", "topic", "method", "a=1", '{"a": 2}'],
        ["call", "topic", "method", "ctxt=1"],
        ["call", "topic", "method", "{"],
        ["call", "topic", "method", "{" * 100_000],
        ["call", "topic", "method", "--nope", "a=1"],
        ["call", "topic", "method", "--timeout", "0"],
        ["call", "topic", "method", "--timeout", "nan"],
        ["call", "topic", "method", "--timeout", "1e300"],
        ["call", "topic", "method", "--retry", "-1"],
        ["call", "topic", "method", "--context", "[]"],
        ["call", "topic", "method", "--rpc-version", "one"],
        ["call", "topic", "method", "--url", ""],
        ["call", "topic", "method", "--url", "zmq"],
        ["call", "topic", "method", "--url", "nope://"],
        ["call", "topic", "method", "--url", "zmq://host:1"],
        ["call", "topic", "method", "--url", "zmq://[::1"],
        ["call", "topic", "method", "--url", "zmq://a:b:c"],
        ["call", "topic", "method", "--url", "zmq://?nope=1"],
        ["call", "topic", "method", "--url", "zmq://?cast_grace=soon"],
        ["cast", "topic", "method", "--timeout", "1"],
        ["fanout", "topic", "method", "--server", "s"],
        ["serve", "topic", "--executor", "nope"],
        ["serve", "topic", "more"],
        ["ls", "--url", "nope://"],
        ["ls", "topic", "more"],
        ["topics", "topic"],
        ["sweep", "topic"],
        ["evict"],
        ["evict", ""],
        ["figures", "--timeout", "0"],
        ["demo", "--url", ""],
    ],
)
def test_usage(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    """In this process: a Python of its own for each takes its time."""
    monkeypatch.setenv("GREEN_ZMQ_URL", env["GREEN_ZMQ_URL"])
    try:
        code: object = main(args)
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert "green-zmq" in err


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["call", os.fsdecode(b"\xff"), "method"],
        ["call", "topic", "method", "{" * 100_000],
        ["call", "topic", "method", "--url", "zmq://a:b:c"],
        ["serve", "topic", "--executor", "gevent", "--url", "zmq://?executor=threads"],
    ],
)
def test_usage_of_a_process(env: dict[str, str], args: list[str]) -> None:
    done = run(env, *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert "green-zmq" in done.stderr
    assert "Traceback" not in done.stderr


def test_timeouts(env: dict[str, str]) -> None:
    done = run(env, "call", "topic", "echo", "--timeout", "3")
    assert (done.returncode, done.stdout) == (3, "")
    assert "no server is registered" in done.stderr
    with serving(env, "topic"):
        # Whether it came so far as to be run in that time is another matter.
        done = run(env, "call", "topic", "sleep", "seconds=600", "--timeout", "0.5")
        assert (done.returncode, done.stdout) == (3, "")
    with serving(env, "other") as server, process(env, "call", "other", "sleep", "seconds=600", "--timeout", "600") as call:
        wait_for(lambda: result(env, "call", "other", "inspect")["counts"].get("sleep"))
        server.kill()
        out, err = call.communicate(timeout=LIMIT)
        assert (call.returncode, out) == (3, "")
        assert f"pid {server.pid}" in err


def test_nobody_takes_it(env: dict[str, str], tmp_path: Path) -> None:
    for args in (
        ("call", "topic", "echo", "--at-least-once"),
        ("call", "topic", "echo", "--retry", "0"),
        ("cast", "topic", "echo"),
        ("cast", "topic", "echo", "--at-least-once"),
        ("fanout", "topic", "echo", "--at-least-once"),
    ):
        done = run(env, *args)
        assert (done.returncode, done.stdout) == (4, ""), done.stderr
        assert "no server is registered" in done.stderr.lower()
    assert run(env, "fanout", "topic", "echo").returncode == 0
    with serving(env, "topic") as server:
        server.send_signal(signal.SIGSTOP)
        done = run(env, "fanout", "topic", "echo", "--timeout", "0.5")
        assert (done.returncode, done.stdout) == (4, "")
        assert "1 of the servers did not take the fanout" in done.stderr
    (tmp_path / "bad").write_text("no database" * 1000)
    bad = f"zmq://?directory_path={quote(str(tmp_path))}/bad"
    for args in (("call", "topic", "echo"), ("cast", "topic", "echo"), ("fanout", "topic", "echo"), ("serve", "t"), ("ls",)):
        done = run(env, *args, "--url", bad)
        assert (done.returncode, done.stdout) == (4, "")
        assert "damaged" in done.stderr


def test_ls(env: dict[str, str]) -> None:
    done = run(env, "ls")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "green-zmq: Nothing is registered.\n")
    done = run(env, "ls", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    with serving(env, "topic", "--server", NAME) as one, serving(env, "b", "--server", "s", "--executor", "gevent") as two:
        done = run(env, "ls")
        assert (done.returncode, done.stderr) == (0, "")
        heading, *rows = done.stdout.splitlines()
        assert heading.split() == ["EXCHANGE", "TOPIC", "SERVER", "ADDRESS", "HOST", "INSTANCE", "MODEL", "PID", "AGE"]
        assert len(rows) == 2
        assert rows[1].startswith(f"openstack  topic  {NAME.replace(chr(10), chr(92) + 'n')}  tcp://127.0.0.1:")
        assert rows[1].split()[-3:-1] == ["threads", str(one.pid)]
        found = result(env, "ls", "--json")
        assert [(li["topic"], li["server"], li["pid"], li["model"]) for li in found] == [
            ("b", "s", two.pid, "gevent"),
            ("topic", NAME, one.pid, "threads"),
        ]
        assert all(li["address"] == f"tcp://{li['host']}:{li['port']}" and 0 <= li["age"] < 600 for li in found)
        assert [li["topic"] for li in result(env, "ls", "b", "--json")] == ["b"]
        one.kill()
        wait_for(lambda: [li["pid"] for li in result(env, "ls", "--json")] == [two.pid])


def test_ls_on_a_terminal(env: dict[str, str]) -> None:
    with serving(env, "topic", "--server", NAME):
        code, text = on_terminal(env, "ls")
        assert code == 0
        assert "[bold]" in text  # a name is no markup
        assert "│" in text


def test_whoever_reads_the_output_has_gone(env: dict[str, str]) -> None:
    with serving(env, "topic"):
        reader, writer = os.pipe()
        os.close(reader)
        for args in (["ls"], ["call", "topic", "echo"], ["demo"], ["--help"]):
            done = subprocess.run([*COMMAND, *args], check=False, env=env, stdout=writer, stderr=subprocess.PIPE, timeout=LIMIT)
            # What argparse writes without a buffer ($PYTHONUNBUFFERED) fails unnoticed.
            assert (args, done.returncode, done.stderr) in ((args, 141, b""), (["--help"], 0, b""))
        os.close(writer)
        with Path("/dev/full").open("w") as full:
            done = subprocess.run([*COMMAND, "ls"], check=False, env=env, stdout=full, stderr=subprocess.PIPE, timeout=LIMIT)
        assert done.returncode == 4
        assert done.stderr.startswith(b"green-zmq: The output cannot be written")
    assert left_behind(env) == []


def test_interrupted_call(env: dict[str, str]) -> None:
    with serving(env, "topic"), process(env, "call", "topic", "sleep", "seconds=600", "--timeout", "600") as call:
        wait_for(lambda: result(env, "call", "topic", "inspect")["counts"].get("sleep"))
        call.send_signal(signal.SIGINT)
        out, err = call.communicate(timeout=LIMIT)
        assert (call.returncode, out, err) == (130, "", "")


def test_version_and_help(env: dict[str, str]) -> None:
    assert run(env, "--version").stdout.startswith("green-zmq ")
    for command in (
        [],
        ["demo"],
        ["serve"],
        ["call"],
        ["cast"],
        ["fanout"],
        ["ls"],
        ["topics"],
        ["sweep"],
        ["evict"],
        ["figures"],
        ["notifications"],
        *(["notifications", action] for action in ("ls", "dead", "put-back", "tail", "publish")),
    ):
        done = run(env, *command, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert "example: green-zmq " in done.stdout
        assert "exit codes:" in done.stdout


def test_nothing_is_imported_before_the_process_is_patched(env: dict[str, str]) -> None:
    code = """if True:
        import sys
        import green_zmq.cli, green_zmq.cli.serve, green_zmq.cli.demo_client
        import green_zmq.cli.topics, green_zmq.cli.sweep, green_zmq.cli.evict, green_zmq.cli.figures
        import green_zmq.cli.notifications
        print([name for name in ("oslo_messaging", "green_zmq.driver", "zmq", "eventlet", "gevent") if name in sys.modules])
    """
    assert subprocess.check_output([sys.executable, "-c", code], env=env, encoding="utf-8") == "[]\n"


def test_demo(env: dict[str, str]) -> None:
    done = run(env, "demo")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("everything answered")
    rows = [line.split() for line in lines[-10:-1]]
    assert [row[:2] for row in rows] == [[client, server] for client in MODELS for server in MODELS]
    for row in rows:
        assert (row[2], row[6:]) == ("300", ["100/100", "20/20"])
        assert all(float(number) > 0 for number in row[3:6])
    # It has a directory of its own, and leaves nothing behind.
    assert listed(env) == []
    assert left_behind(env) == []


def test_demo_on_a_terminal(env: dict[str, str]) -> None:
    code, text = on_terminal(env, "demo", "--calls", "50")
    assert code == 0, text
    assert "everything answered" in text
    assert "│" in text


def test_demo_with_a_server_that_dies(env: dict[str, str]) -> None:
    with process(env, "demo", "--url", env["GREEN_ZMQ_URL"], "--calls", "50") as demo:
        assert demo.stdout is not None
        while "server gevent is listening" not in (line := demo.stdout.readline()):
            assert line
        # It tells the clients when to begin, one after the other: at most the first has been told by now.
        demo.send_signal(signal.SIGSTOP)
        os.kill(next(server["pid"] for server in listed(env) if server["model"] == "gevent"), signal.SIGKILL)
        demo.send_signal(signal.SIGCONT)
        out, err = demo.communicate(timeout=LIMIT)
    assert (demo.returncode, err) == (1, "")
    assert "server gevent ended early (exit code -9)" in out
    assert re.search(r"server gevent: \d+ of 50 calls of client threads were answered", out)
    assert listed(env) == []


def test_demo_interrupted(env: dict[str, str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with process(env, "demo", "--url", env["GREEN_ZMQ_URL"], "--calls", "20000") as demo:
            servers = wait_for(lambda: len(found := listed(env)) == 3 and found)
            # ps shows the arguments of all processes to everybody: the URL, which may hold a password, is none.
            for server in servers:
                assert env["GREEN_ZMQ_URL"].encode() not in Path(f"/proc/{server['pid']}/cmdline").read_bytes()
            demo.send_signal(number)
            _, err = demo.communicate(timeout=LIMIT)
            assert (demo.returncode, err) == (-9 if number == signal.SIGKILL else 130, "")
        # Even if it was killed, its processes end.
        wait_for(lambda: not listed(env))


def left_behind(env: Mapping[str, str]) -> list[Path]:
    return [path for path in Path(env["TMPDIR"]).iterdir() if path.name.startswith("green-zmq-demo")]


def on_terminal(env: Mapping[str, str], *args: str) -> tuple[int, str]:
    """Run it on a terminal of its own; its exit code and what it wrote there."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [*COMMAND, *args], env=dict(env) | {"TERM": "xterm", "COLUMNS": "150"}, stdout=slave, stderr=slave, stdin=slave
    )
    os.close(slave)
    written = b""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        if select.select([master], [], [], 0.1)[0]:
            try:
                written += os.read(master, 65536)
            except OSError:  # the other end is closed
                break
        elif child.poll() is not None:
            break
    code = child.wait(timeout=LIMIT)
    os.close(master)
    return code, written.decode(errors="replace")
