# SPDX-License-Identifier: Apache-2.0
"""What every directory must do, and what the one of a machine does beyond it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from green_zmq.config import Settings
from green_zmq.directory import Directory, open_directory
from green_zmq.errors import DirectoryError
from green_zmq.routing import Entry, Node, Topic
from tests.servers import RedisServer, SentinelCluster
from tests.test_config import read

fork = multiprocessing.get_context("fork")

# The directories that everything under "What every directory must do" is run over.
KINDS = ["memory", "sqlite", "redis", "sentinel"]


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    with RedisServer() as server, SentinelCluster() as cluster:
        yield {
            "memory": "zmq+memory://",
            "sqlite": "zmq://",
            "redis": f"zmq+redis://{server.address}/0",
            "sentinel": f"zmq+sentinel://{cluster.addresses}/{cluster.group}",
        }


def settings_of(url: str, path: Path, **changes: Any) -> Settings:
    settings = read(url)
    return dataclasses.replace(settings, directory_path=path, **changes)


def node(port: int = 5000, **fields: Any) -> Node:
    return Node(os.urandom(16), "127.0.0.1", port, "here", os.getpid(), "threads")._replace(**fields)


def wait_for(condition: Callable[[], object], limit: float = 10.0) -> None:
    """Look again and again, until it is true."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


class Opener:
    """Opens directories that see each other, and closes them in the end."""

    def __init__(self, url: str, path: Path) -> None:
        self.url = url
        self.path = path
        self.opened: list[Directory] = []

    def __call__(self, **changes: Any) -> Directory:
        directory = open_directory(settings_of(self.url, self.path, **changes))
        self.opened.append(directory)
        return directory


@pytest.fixture(params=KINDS)
def opener(request: pytest.FixtureRequest, urls: dict[str, str], tmp_path: Path) -> Iterator[Opener]:
    made = Opener(urls[request.param], tmp_path / "folder" / "directory.sqlite")
    yield made
    for directory in made.opened:
        directory.close()


@pytest.fixture
def directory(opener: Opener) -> Directory:
    return opener()


@pytest.fixture
def topic() -> Topic:
    """A new one for each test: the directory in memory is the same for all."""
    return Topic(f"ex-{os.urandom(4).hex()}", "topic")


def found(directory: Directory, topic: Topic) -> set[Entry]:
    entries = directory.look_up(topic)
    assert len(entries) == len(set(entries))
    return set(entries)


def listed(directory: Directory, topic: Topic) -> set[tuple[str, str, Node]]:
    return {(li.topic, li.server, li.node) for li in directory.listings() if li.exchange == topic.exchange}


# What every directory must do.


def test_nobody(directory: Directory, topic: Topic) -> None:
    assert directory.look_up(topic) == []
    assert not directory.is_alive(node())
    assert listed(directory, topic) == set()


def test_announced_is_found_at_once(directory: Directory, topic: Topic) -> None:
    one = node()
    directory.announce(one, [(topic, "server")])
    assert found(directory, topic) == {Entry("server", one)}
    assert directory.is_alive(one)
    assert listed(directory, topic) == {("topic", "server", one)}


def test_whole_record_comes_back(directory: Directory, topic: Topic) -> None:
    one = node(host="2001:db8::1", hostname="a.b-c", model="gevent", wire=7)
    directory.announce(one, [(topic, "s")])
    ((_, back),) = directory.look_up(topic)
    assert back == one
    assert isinstance(back, Node)
    assert isinstance(back.instance, bytes)


def test_several_of_everything(directory: Directory, topic: Topic) -> None:
    one, two = node(1), node(2)
    other = topic._replace(name="other")
    directory.announce(one, [(topic, "same"), (topic, "one"), (other, "same")])
    directory.announce(two, [(topic, "same")])
    assert found(directory, topic) == {Entry("same", one), Entry("one", one), Entry("same", two)}
    assert found(directory, other) == {Entry("same", one)}
    assert found(directory, topic._replace(exchange=topic.exchange + "x")) == set()
    assert len(listed(directory, topic)) == 4


def test_listeners_are_replaced_exactly(directory: Directory, topic: Topic) -> None:
    one, two = node(1), node(2)
    directory.announce(two, [(topic, "b")])
    directory.announce(one, [(topic, "a"), (topic, "b")])
    directory.announce(one, [(topic, "b"), (topic, "c")])
    assert found(directory, topic) == {Entry("b", one), Entry("c", one), Entry("b", two)}
    directory.announce(one, [])
    assert found(directory, topic) == {Entry("b", two)}
    assert directory.is_alive(one), "a process that listens to nothing now may have replies to send"


def test_announcing_the_same_again_changes_nothing(directory: Directory, topic: Topic) -> None:
    one = node()
    for _ in range(3):
        directory.announce(one, {(topic, "s")})
    assert found(directory, topic) == {Entry("s", one)}


def test_withdrawn_is_gone_at_once(directory: Directory, topic: Topic) -> None:
    one, two = node(1), node(2)
    directory.announce(one, [(topic, "s")])
    directory.announce(two, [(topic, "s")])
    directory.withdraw(one.instance)
    assert found(directory, topic) == {Entry("s", two)}
    assert not directory.is_alive(one)
    assert directory.is_alive(two)
    assert listed(directory, topic) == {("topic", "s", two)}
    directory.withdraw(one.instance)
    directory.withdraw(node().instance)


def test_withdrawn_may_come_back(directory: Directory, topic: Topic) -> None:
    one = node()
    directory.announce(one, [(topic, "s")])
    directory.withdraw(one.instance)
    directory.announce(one, [(topic, "s")])
    assert found(directory, topic) == {Entry("s", one)}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "host@backend#pool",
        "a/b",
        "a:b",
        "0.0.0.0",
        "ünïcödé \U0001f980",
        "a\0b",
        "%",
        "'; drop table nodes; --",
        "x" * 5000,
    ],
)
def test_names_are_opaque(directory: Directory, topic: Topic, name: str) -> None:
    one = node()
    odd = Topic(topic.exchange + name, name)
    directory.announce(one, [(odd, name), (topic, name)])
    assert found(directory, odd) == {Entry(name, one)}
    assert found(directory, topic) == {Entry(name, one)}
    assert directory.look_up(Topic(topic.exchange + name, name + "x")) == []


def test_names_that_are_alike_are_not_the_same(directory: Directory, topic: Topic) -> None:
    one = node()
    directory.announce(one, [(topic, "Server"), (topic, "server"), (topic, "server ")])
    assert {entry.server for entry in found(directory, topic)} == {"Server", "server", "server "}
    assert directory.look_up(topic._replace(name="TOPIC")) == []


def test_directories_see_each_other(opener: Opener, topic: Topic) -> None:
    writer, reader = opener(), opener()
    one = node()
    writer.announce(one, [(topic, "s")])
    assert found(reader, topic) == {Entry("s", one)}
    assert reader.is_alive(one)
    writer.withdraw(one.instance)
    assert found(reader, topic) == set()
    assert not reader.is_alive(one)


def take_news(directory: Directory) -> None:
    """What the native thread does while there is nothing to ask."""
    wake = os.eventfd(1)
    directory.wait(wake)
    os.close(wake)


def quiet(directory: Directory) -> bool:
    take_news(directory)
    changed = directory.changes()
    return changed is not None and not changed


def changed(directory: Directory, topic: Topic) -> bool:
    take_news(directory)
    topics = directory.changes()
    return topics is None or topic in topics


@pytest.mark.parametrize("what", ["appears", "adds a topic", "drops a topic", "withdraws"])
def test_changes_are_noticed(opener: Opener, topic: Topic, what: str) -> None:
    writer, reader = opener(), opener()
    one = node()
    if what != "appears":
        writer.announce(one, [(topic._replace(name="other"), "s"), *([] if what == "adds a topic" else [(topic, "s")])])
    reader.look_up(topic)
    wait_for(lambda: quiet(reader))
    if what == "withdraws":
        writer.withdraw(one.instance)
    elif what == "drops a topic":
        writer.announce(one, [(topic._replace(name="other"), "s")])
    else:
        writer.announce(one, [(topic._replace(name="other"), "s"), (topic, "s")])
    wait_for(lambda: changed(reader, topic), 2.0)
    assert len(found(reader, topic)) == (0 if what in ("withdraws", "drops a topic") else 1)
    wait_for(lambda: quiet(reader))


def test_each_directory_is_told_of_changes(opener: Opener, topic: Topic) -> None:
    writer, readers = opener(), [opener() for _ in range(3)]
    for reader in readers:
        reader.look_up(topic)
        wait_for(lambda reader=reader: quiet(reader))
    writer.announce(node(), [(topic, "s")])
    for reader in readers:
        wait_for(lambda reader=reader: changed(reader, topic), 2.0)


def test_first_question_for_changes_says_that_anything_may_have(opener: Opener) -> None:
    assert opener().changes() is None


def test_asking_for_changes_is_cheap(opener: Opener) -> None:
    reader = opener()
    wait_for(lambda: quiet(reader))
    begun = time.perf_counter()
    for _ in range(1000):
        reader.changes()
    assert time.perf_counter() - begun < 0.5, "it is asked before sends"


def test_changes_are_asked_in_another_thread(opener: Opener, topic: Topic) -> None:
    """All else is done by one native thread, while the loop's asks for changes."""
    shared = opener()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for n in range(100):
                shared.announce(node(n), [(topic, str(n))])
                shared.look_up(topic)
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        shared.changes()
        worker.join(0.0005)
    assert errors == []
    assert len(found(shared, topic)) == 100


def test_record_expires(opener: Opener, topic: Topic) -> None:
    short, reader = opener(expire=0.2), opener()
    one = node(pid=0)  # a process that nobody here can tell anything of
    short.sweep()
    short.announce(one, [(topic, "s")])
    assert found(reader, topic) == {Entry("s", one)}
    wait_for(lambda: not reader.look_up(topic), 2.0)
    assert not reader.is_alive(one)
    assert listed(reader, topic) == set()
    short.announce(one, [(topic, "s")])
    assert found(reader, topic) == {Entry("s", one)}, "it comes back when it is announced again"


def test_record_that_is_refreshed_does_not_expire(opener: Opener, topic: Topic) -> None:
    short = opener(expire=0.4)
    one = node()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        short.announce(one, [(topic, "s")])
        assert found(short, topic) == {Entry("s", one)}
        threading.Event().wait(0.05)
    assert short.is_alive(one)


def test_expiry_is_that_of_who_announced(opener: Opener, topic: Topic) -> None:
    short, long = opener(expire=0.2), opener(expire=60)
    one, two = node(1), node(2)
    long.announce(two, [(topic, "long")])
    short.announce(one, [(topic, "short")])
    wait_for(lambda: found(short, topic) == {Entry("long", two)}, 2.0)
    assert found(long, topic) == {Entry("long", two)}


def test_sweep_removes_what_has_expired(opener: Opener, topic: Topic) -> None:
    long, short = opener(expire=60), opener(expire=0.1)
    long.sweep()
    stays = node()
    long.announce(stays, [(topic, "stays")])
    for n in range(3):
        short.announce(node(n), [(topic, "goes")])
    wait_for(long.sweep, 2.0)
    wait_for(lambda: found(long, topic) == {Entry("stays", stays)}, 2.0)
    threading.Event().wait(0.1)
    long.sweep()
    assert long.sweep() == []
    assert long.is_alive(stays)


def test_age_is_that_of_the_listener(opener: Opener, topic: Topic) -> None:
    shared = opener()
    one = node()
    shared.announce(one, [(topic, "old")])
    threading.Event().wait(0.1)
    shared.announce(one, [(topic, "old"), (topic, "new")])
    ages = {li.server: li.age for li in shared.listings() if li.exchange == topic.exchange}
    assert 0.1 <= ages["old"] < 60
    assert 0 <= ages["new"] < ages["old"]


def test_many_nodes(directory: Directory, topic: Topic) -> None:
    nodes = [node(n) for n in range(200)]
    for one in nodes:
        directory.announce(one, [(topic, f"server-{one.port}"), (topic, "common")])
    assert len(found(directory, topic)) == 400
    for one in nodes:
        directory.withdraw(one.instance)
    assert found(directory, topic) == set()


# Forked children, and what lies in memory.


def in_child(fn: Callable[[], Any]) -> Any:
    """What a function returns in a forked child."""
    here, there = fork.Pipe(duplex=False)

    def work() -> None:
        try:
            there.send((True, fn()))
        except BaseException as error:
            there.send((False, repr(error)))

    child = fork.Process(target=work)
    child.start()
    there.close()
    assert here.poll(30)
    well, result = here.recv()
    child.join(30)
    assert well, result
    return result


def test_memory_is_not_inherited(tmp_path: Path, topic: Topic) -> None:
    opener = Opener("zmq+memory://", tmp_path)
    opener().announce(node(), [(topic, "s")])
    assert in_child(lambda: opener().look_up(topic)) == []
    assert len(opener().look_up(topic)) == 1


# The directory of one machine.


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Opener]:
    made = Opener("zmq://", tmp_path / "folder" / "directory.sqlite")
    yield made
    for opened in made.opened:
        opened.close()


@contextlib.contextmanager
def processes(count: int, work: Callable[[int, Any], None]) -> Iterator[list[Any]]:
    """Forked children that run ``work(number, say)`` and then stay until they are killed."""
    here, there = fork.Pipe(duplex=False)
    children = []

    def run(number: int) -> None:
        try:
            work(number, there.send)
        except BaseException as error:
            there.send(repr(error))
        signal.pause()

    for number in range(count):
        child = fork.Process(target=run, args=(number,), daemon=True)
        child.start()
        children.append(child)
    try:
        yield [here, *children]
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
            child.join(10)


def said(here: Any, count: int) -> list[Any]:
    words = []
    for _ in range(count):
        assert here.poll(30)
        words.append(here.recv())
    return words


def test_other_processes_are_seen(machine: Opener, topic: Topic) -> None:
    reader = machine()

    def work(number: int, say: Callable[[Any], None]) -> None:
        machine().announce(node(number), [(topic, f"s{number}")])
        say("ready")

    with processes(3, work) as (here, *_):
        assert said(here, 3) == ["ready"] * 3
        assert {e.server for e in found(reader, topic)} == {"s0", "s1", "s2"}
        assert len({e.node.pid for e in found(reader, topic)}) == 3


@pytest.mark.parametrize("reaped", [True, False])
def test_killed_process_is_not_looked_up_any_more(machine: Opener, topic: Topic, reaped: bool) -> None:
    reader = machine()

    def work(number: int, say: Callable[[Any], None]) -> None:
        machine().announce(node(number), [(topic, "s")])
        say("ready")

    with processes(2, work) as (here, killed, stays):
        said(here, 2)
        assert len(found(reader, topic)) == 2
        dead = next(e.node for e in found(reader, topic) if e.node.pid == killed.pid)
        os.kill(killed.pid, signal.SIGKILL)
        if reaped:
            killed.join(10)
        else:
            wait_for(lambda: Path(f"/proc/{killed.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        assert {e.node.pid for e in found(reader, topic)} == {stays.pid}
        assert not reader.is_alive(dead)
        assert {n.pid for _, _, n in listed(reader, topic)} == {stays.pid}
        assert len(reader.sweep()) == 1
        assert reader.sweep() == []


def test_stopped_process_is_still_there(machine: Opener, topic: Topic) -> None:
    reader = machine()

    def work(number: int, say: Callable[[Any], None]) -> None:
        machine().announce(node(number), [(topic, "s")])
        say("ready")

    with processes(1, work) as (here, child):
        said(here, 1)
        os.kill(child.pid, signal.SIGSTOP)
        try:
            assert len(found(reader, topic)) == 1
        finally:
            os.kill(child.pid, signal.SIGCONT)


def test_stopped_process_is_not_gone_when_its_record_expires(machine: Opener, topic: Topic) -> None:
    """Its calls go on when it does. Nobody is sent there meanwhile."""
    reader, writer = machine(), machine()

    def work(number: int, say: Callable[[Any], None]) -> None:
        one = node(number)
        machine(expire=0.2).announce(one, [(topic, "s")])
        say(one)

    with processes(1, work) as (here, child):
        (one,) = said(here, 1)
        os.kill(child.pid, signal.SIGSTOP)
        wait_for(lambda: not reader.look_up(topic), 2.0)
        writer.announce(node(), [(topic, "other")])  # which removes the records of the dead
        assert reader.is_alive(one)
        os.kill(child.pid, signal.SIGKILL)
        wait_for(lambda: not reader.is_alive(one), 2.0)


def test_kill_in_the_middle_of_writing_harms_nobody(machine: Opener, topic: Topic) -> None:
    reader = machine()

    def work(number: int, say: Callable[[Any], None]) -> None:
        mine, me = machine(), node(number)
        say("ready")
        n = 0
        while True:
            n += 1
            mine.announce(me, [(topic, f"{number}-{n % 7}"), (topic, f"{number}")])

    for _ in range(3):
        with processes(4, work) as (here, *children):
            said(here, 4)
            wait_for(lambda: len(found(reader, topic)) >= 4)
            for child in children:
                os.kill(child.pid, signal.SIGKILL)
            for child in children:
                child.join(10)
            assert found(reader, topic) == set()
            mine = node()
            reader.announce(mine, [(topic, "survivor")])
            assert found(reader, topic) == {Entry("survivor", mine)}
            reader.withdraw(mine.instance)


def test_new_file_opened_by_several_at_once(tmp_path: Path) -> None:
    """Whoever comes second while the first makes the file must wait for it, not fail."""
    errors: list[DirectoryError] = []

    def work(path: Path) -> None:
        try:
            open_directory(settings_of("zmq://", path)).close()
        except DirectoryError as error:
            errors.append(error)

    for n in range(50):
        threads = [threading.Thread(target=work, args=(tmp_path / f"{n}.sqlite",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


def test_twenty_processes_at_once(machine: Opener, topic: Topic) -> None:
    barrier = fork.Barrier(20)

    def work(number: int, say: Callable[[Any], None]) -> None:
        barrier.wait(30)
        begun = time.monotonic()
        machine().announce(node(number), [(topic, f"s{number}")])
        say(time.monotonic() - begun)

    with processes(20, work) as (here, *_):
        times = said(here, 20)
        assert all(isinstance(t, float) for t in times), times
        assert max(times) < 10
        assert {e.server for e in found(machine(), topic)} == {f"s{n}" for n in range(20)}


def test_pid_that_was_given_to_another_process(machine: Opener, topic: Topic) -> None:
    reader = machine()
    one = node()
    reader.announce(one, [(topic, "s")])
    edit(machine, "update nodes set process = substr(process, 1, instr(process, ' ')) || ? || ' 1'", os.getpid())
    assert found(reader, topic) == set()
    assert not reader.is_alive(one)


def edit(machine: Opener, statement: str, *values: Any) -> None:
    with contextlib.closing(sqlite3.connect(machine.path)) as database, database:
        database.execute(statement, values)


def test_process_of_another_pid_namespace_expires(machine: Opener, topic: Topic) -> None:
    reader = machine(expire=0.3)
    one = node(pid=1 << 22)
    reader.announce(one, [(topic, "s")])
    edit(machine, "update nodes set process = '1 1 1'")
    assert found(reader, topic) == {Entry("s", one)}, "its pid says nothing here"
    wait_for(lambda: not reader.look_up(topic), 2.0)


def test_records_of_another_boot(machine: Opener, topic: Topic) -> None:
    reader = machine()
    old = node()
    reader.announce(old, [(topic, "old")])
    edit(machine, "update nodes set boot = 'another', expires = 1e15")
    assert found(reader, topic) == set()
    assert not reader.is_alive(old)
    assert listed(reader, topic) == set()
    assert len(reader.sweep()) == 1
    new = node()
    reader.announce(new, [(topic, "new")])
    assert found(reader, topic) == {Entry("new", new)}


def test_record_of_a_newer_release_that_says_more(machine: Opener, topic: Topic) -> None:
    reader = machine()
    one = node()
    reader.announce(one, [(topic, "s")])
    record = {k: v for k, v in one._asdict().items() if k != "instance"} | {"zone": "b", "keys": ["x"]}
    edit(machine, "update nodes set record = ?", json.dumps(record))
    assert found(reader, topic) == {Entry("s", one)}


@pytest.mark.parametrize("record", ["no json", "[]", "{}", '{"host": 1}'])
def test_record_that_is_none(machine: Opener, topic: Topic, record: str) -> None:
    reader = machine()
    reader.announce(node(), [(topic, "s")])
    edit(machine, "update nodes set record = ?", record)
    with pytest.raises(DirectoryError):
        list(reader.look_up(topic))
    with pytest.raises(DirectoryError):
        list(reader.listings())


def test_folder_is_made_for_its_user_only(machine: Opener) -> None:
    machine()
    assert machine.path.parent.stat().st_mode & 0o777 == 0o700


def advice(fail: Callable[[], object]) -> str:
    with pytest.raises(DirectoryError) as caught:
        fail()
    return str(caught.value)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file / "directory.sqlite", file / "folder" / "directory.sqlite"):
        text = advice(Opener("zmq://", path))
        assert str(path) in text
        assert "directory_path" in text


def test_folder_that_cannot_be_written() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o555)

        def attempt() -> str:
            if os.getuid() == 0:
                os.setuid(65534)  # to whom permissions apply
            return advice(Opener("zmq://", folder / "directory.sqlite"))

        text = in_child(attempt)
        assert str(folder) in text
        assert "permissions" in text
        assert "directory_path" in text
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


def test_path_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "directory.sqlite").mkdir()
    assert "directory_path" in advice(Opener("zmq://", tmp_path / "directory.sqlite"))


@pytest.mark.parametrize("content", [b"this is no database, " * 100, os.urandom(8192), b"SQLite format 3\0" + b"\xff" * 4096])
def test_file_that_is_corrupt(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "directory.sqlite"
    path.write_bytes(content)
    text = advice(Opener("zmq://", path))
    assert str(path) in text
    assert "damaged" in text
    assert "remove it" in text
    assert path.read_bytes() == content, "somebody else's file must stay as it is"


def test_file_that_is_another_database(tmp_path: Path, topic: Topic) -> None:
    path = tmp_path / "directory.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("create table nodes (something text)")
    text = advice(lambda: Opener("zmq://", path)().look_up(topic))
    assert "directory_path" in text


def test_file_of_a_newer_release(machine: Opener) -> None:
    machine().close()
    machine.opened.clear()
    edit(machine, "pragma user_version = 99")
    text = advice(machine)
    assert "newer release" in text
    assert "99" in text
    assert "directory_path" in text


def test_folder_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "green_zmq-1000"
    folder.mkdir()
    if os.getuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 54321)
    text = advice(Opener("zmq://", folder / "directory.sqlite"))
    assert "another user" in text
    assert "directory_path" in text


def remove(machine: Opener) -> None:
    for path in machine.path.parent.iterdir():
        path.unlink()


def test_deleted_file_is_made_again(machine: Opener, topic: Topic) -> None:
    writer, reader = machine(), machine()
    one = node()
    writer.announce(one, [(topic, "s")])
    remove(machine)
    writer.announce(one, [(topic, "s")])
    assert found(reader, topic) == {Entry("s", one)}
    two = node()
    reader.announce(two, [(topic, "s")])
    assert found(writer, topic) == {Entry("s", one), Entry("s", two)}


def test_deleted_file_is_followed_by_the_one_who_only_reads(machine: Opener, topic: Topic) -> None:
    """A sender that knows its servers asks only whether something has changed."""
    writer, reader = machine(), machine()
    writer.announce(node(), [(topic, "s")])
    reader.look_up(topic)
    wait_for(lambda: quiet(reader))
    remove(machine)
    two = node()
    writer.announce(two, [(topic, "s")])
    wait_for(lambda: changed(reader, topic), 2.0)
    assert found(reader, topic) == {Entry("s", two)}


@pytest.mark.parametrize("asked", ["is_alive", "listings", "withdraw", "sweep"])
def test_deleted_file_is_followed_by_every_question(machine: Opener, topic: Topic, asked: str) -> None:
    writer, reader = machine(), machine()
    remove(machine)
    one = node()
    writer.announce(one, [(topic, "s")])
    if asked == "is_alive":
        assert reader.is_alive(one)
    elif asked == "listings":
        assert listed(reader, topic) == {("topic", "s", one)}
    elif asked == "withdraw":
        reader.withdraw(one.instance)
        assert found(writer, topic) == set()
    else:
        edit(machine, "update nodes set expires = 0")
        assert len(reader.sweep()) == 1


def test_live_process_is_not_dead_because_its_record_was_deleted(machine: Opener, topic: Topic) -> None:
    """A directory that comes back empty must not end calls to servers that have not registered again yet."""
    writer, reader = machine(), machine()
    one = node()
    writer.announce(one, [(topic, "s")])
    remove(machine)
    assert reader.look_up(topic) == []
    assert reader.is_alive(one)


def test_deleted_folder_is_made_again(machine: Opener, topic: Topic) -> None:
    writer, reader = machine(), machine()
    one = node()
    writer.announce(one, [(topic, "s")])
    shutil.rmtree(machine.path.parent)
    writer.announce(one, [(topic, "s")])
    assert found(reader, topic) == {Entry("s", one)}


def test_file_that_is_damaged_in_use(machine: Opener, topic: Topic) -> None:
    writer = machine()
    writer.announce(node(), [(topic, "s")])
    for path in machine.path.parent.iterdir():
        path.write_bytes(b"x" * 8192)
    with contextlib.suppress(DirectoryError):
        writer.announce(node(), [(topic, "s")])
    with contextlib.suppress(DirectoryError):
        writer.look_up(topic)
    writer.changes()


def test_locked_file_is_an_error_in_the_end(machine: Opener, topic: Topic) -> None:
    writer = machine()
    with contextlib.closing(sqlite3.connect(machine.path, isolation_level=None)) as other:
        other.execute("begin immediate")
        begun = time.monotonic()
        assert writer.look_up(topic) == [], "reading waits for nobody"
        assert writer.changes() in (None, ())
        assert time.monotonic() - begun < 1
        other.execute("rollback")
    writer.announce(node(), [(topic, "s")])


def test_descriptors_are_given_back(machine: Opener, topic: Topic) -> None:
    first = machine()
    first.look_up(topic)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        opened = open_directory(settings_of("zmq://", machine.path))
        opened.look_up(topic)
        opened.changes()
        opened.close()
    for _ in range(5):
        remove(machine)
        first.look_up(topic)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
