# SPDX-License-Identifier: Apache-2.0
"""The delivery protocol without a socket or a clock: senders and receivers over a network that the test makes misbehave."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable
from math import inf
from typing import Any

import pytest
from oslo_messaging.exceptions import MessageDeliveryFailure, MessageUndeliverable, MessagingTimeout

from green_zmq import delivery, wire
from green_zmq.delivery import Limits, Link, Outgoing, Receiver, Record, Sender
from green_zmq.errors import DirectoryError, ServerGone, TransportClosed
from green_zmq.routing import Entry, Node, Table, Topic
from green_zmq.wire import ACCEPTED, ASK, BUSY, CALL, CAST, FAILURE, FANOUT, GIVEN_BACK, NOT_HERE, REPLY, Key, Request

TOPIC = Topic("ex", "t")
ANY = Key("ex", "t", "")


class Conn:
    """One connection: two queues of frames, and whether either end still looks at it."""

    def __init__(self, link: Link, server: Server, route: bytes) -> None:
        self.link = link
        self.server = server
        self.route = route
        self.up: deque[list[bytes]] = deque()
        self.down: deque[list[bytes]] = deque()
        self.client_open = True


class Server:
    """A process that listens: a receiver, and a queue of what it accepted and has not begun."""

    def __init__(self, world: World, port: int, name: str, topics: Iterable[Topic] = (TOPIC,)) -> None:
        self.world = world
        self.name = name
        self.instance = world.random.randbytes(16)
        self.node = Node(self.instance, "127.0.0.1", port, name, port, "threads")
        self.receiver = Receiver(self.instance, self.write)
        self.topics = set(topics)
        self.listening = True
        self.listed = True
        self.alive = True
        self.reachable = True
        self.reads = True
        self.answers = True  # run and answer at once what arrives
        self.window = 1000
        self.jobs: deque[tuple[Record, Request]] = deque()
        self.running: list[tuple[Record, Request]] = []
        self.seen: list[Request] = []

    def handles(self, key: Key) -> bool:
        return self.listening and Topic(*key[:2]) in self.topics and key.server in ("", self.name)

    def receive(self, conn: Conn, frames: list[bytes]) -> None:
        request = wire.decode_request(frames)
        self.seen.append(request)
        record = self.receiver.request(conn.route, request, self.world.now)
        if record is not None:
            if not self.handles(record.key):
                self.receiver.refuse(record, NOT_HERE)
            elif len(self.jobs) + len(self.running) >= self.window:
                self.receiver.refuse(record, BUSY)
            else:
                self.receiver.accept(record, self.world.now)
                self.jobs.append((record, request))
        self.flush()

    def begin(self) -> None:
        """What a worker does first; like the driver's, it does not begin what is too late."""
        record, request = self.jobs.popleft()
        if record.forgotten:
            return
        if record.deadline <= self.world.now:
            self.receiver.refuse(record, GIVEN_BACK)
            self.flush()
            return
        self.world.ran(self, request)
        if record.kind == CALL:
            self.running.append((record, request))
        else:
            self.receiver.started(record, self.world.now)

    def finish(self, kind: int = REPLY, which: int = 0) -> None:
        record, request = self.running.pop(which)
        self.receiver.reply(record, kind, wire.JSON, [b"re:", *request.body])
        self.flush()

    def work(self) -> None:
        while self.jobs:
            self.begin()
        while self.running:
            self.finish()

    def stop(self) -> None:
        """As the driver: out of the directory first, then everything that was not begun is given back."""
        self.listening = self.listed = False
        self.flush()
        while self.jobs:
            self.receiver.refuse(self.jobs.popleft()[0], GIVEN_BACK)
        self.flush()

    def tick(self) -> None:
        self.receiver.tick(self.world.now)
        self.flush()

    def flush(self) -> None:
        self.receiver.flush()

    def write(self, route: bytes, frames: list[bytes]) -> bool:
        conn = self.world.routes.get(route)
        if conn is None or not conn.client_open or not self.alive:
            return False
        conn.down.append(frames)
        return True


class World:
    """One sender, some servers, a directory that tells the truth, and the network between them."""

    def __init__(self, limits: Limits | None = None, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        self.table = Table()
        self.sender = Sender(b"s" * 16, limits or Limits(), self.table, self.write)
        self.servers: list[Server] = []
        self.conns: dict[Link, Conn] = {}
        self.retrying: dict[Link, None] = {}
        self.routes: dict[bytes, Conn] = {}
        self.ledger: Counter[tuple[bytes, bytes]] = Counter()
        self.order: list[bytes] = []
        self.finished: list[Outgoing] = []
        self.lost: list[tuple[Outgoing, str]] = []
        self.directory: str | None = None  # why it does not answer
        self.numbers = 0

    def server(self, name: str = "a", port: int | None = None, topics: Iterable[Topic] = (TOPIC,)) -> Server:
        server = Server(self, 5000 + len(self.servers) if port is None else port, name, topics)
        self.servers.append(server)
        return server

    def ran(self, server: Server, request: Request) -> None:
        (body,) = request.body
        self.order.append(body)
        where = server.instance if request.kind == FANOUT else b""
        self.ledger[(body, where)] += 1
        assert self.ledger[(body, where)] == 1, f"request {body!r} was executed twice"

    def executed(self, request: Outgoing) -> int:
        return sum(n for (body, _), n in self.ledger.items() if [body] == request.body)

    def submit(self, kind: int = CALL, key: Key = ANY, body: bytes | None = None, **options: Any) -> Outgoing:
        self.numbers += 1
        if kind == CALL:
            options.setdefault("timeout", 60.0)
        request = Outgoing(kind, key, wire.JSON, [b"%d" % self.numbers if body is None else body], **options)
        self.sender.submit(request, self.now)
        self.sender.flush()
        return request

    def send(self, kind: int = CALL, key: Key = ANY, **options: Any) -> Outgoing:
        request = self.submit(kind, key, **options)
        self.settle()
        return request

    # The steps of which everything is made; the random test takes them one by one.

    def entries(self, topic: Topic) -> list[Entry]:
        return [Entry(s.name, s.node) for s in self.servers if s.listed and topic in s.topics]

    def look_up(self, topic: Topic) -> None:
        if self.directory is not None:
            self.sender.not_looked_up(topic, self.directory, self.now)
        else:
            self.table.update(topic, self.entries(topic))
            self.sender.looked_up(topic, self.now)
        self.sender.flush()

    def at(self, link: Link) -> Server | None:
        """Who answers at that address now."""
        found = [s for s in self.servers if s.alive and s.reachable and s.node.port == link.node.port]
        return found[-1] if found else None

    def connect(self, link: Link) -> None:
        server = self.at(link)
        if server is None:
            self.retrying[link] = None
            self.sender.disconnected(link, self.now)
        else:
            conn = Conn(link, server, self.random.randbytes(5))
            self.conns[link] = self.routes[conn.route] = link.socket = conn
            self.sender.connected(link, self.now)
            self.sender.flush()

    def retry(self, link: Link) -> None:
        del self.retrying[link]
        if link.idle and not self.sender.waiting:
            self.sender.closed(link)
        else:
            self.connect(link)

    def cut(self, link: Link, keep_up: int = 0, keep_down: int = 0) -> Conn:
        """The sender's end breaks. Of what is on its way so many frames still arrive, those to the server maybe late."""
        conn = self.conns[link]
        for _ in range(min(keep_down, len(conn.down))):
            self.deliver_down(conn)
        conn.client_open = False
        conn.down.clear()
        while len(conn.up) > keep_up:
            conn.up.pop()
        if self.conns.pop(link, None) is not None:
            self.retrying[link] = None
            self.sender.disconnected(link, self.now)
        return conn

    def deliver_up(self, conn: Conn) -> None:
        frames = conn.up.popleft()
        if conn.server.alive:
            for message in wire.unpack(frames):
                conn.server.receive(conn, message)

    def deliver_down(self, conn: Conn) -> None:
        for message in wire.unpack(conn.down.popleft()):
            self.sender.answered(conn.link, wire.decode_answer(message), self.now)
        self.sender.flush()

    def write(self, conn: Conn, frames: list[bytes]) -> bool:
        if not conn.client_open:
            return False
        conn.up.append(frames)
        return True

    def take_dropped(self) -> None:
        """Connections of processes that are gone for good are closed with them."""
        while self.sender.dropped:
            link = self.sender.dropped.pop()
            self.retrying.pop(link, None)
            conn = self.conns.pop(link, None)
            if conn is not None:
                conn.client_open = False
                conn.down.clear()

    def take_results(self) -> None:
        self.finished += self.sender.finished
        self.sender.finished = []
        self.lost += self.sender.lost
        self.sender.lost = []
        self.sender.failed = []

    def kill(self, server: Server) -> None:
        server.alive = server.listed = server.listening = False
        server.jobs.clear()
        server.running.clear()
        for conn in self.routes.values():
            if conn.server is server:
                conn.up.clear()

    # Everything at once, for tests of one thing.

    def settle(self) -> None:
        """Whatever can happen without time passing."""
        asked: set[tuple[Topic, tuple[Entry, ...]]] = set()
        for _ in range(1000):
            self.take_dropped()
            moved = [self.settle_directory(asked), self.settle_connections(), self.settle_frames()]
            if not any(moved):
                break
        else:
            raise AssertionError("it goes on for ever without time passing")
        self.take_results()

    def settle_directory(self, asked: set[tuple[Topic, tuple[Entry, ...]]]) -> bool:
        """What the sender wants to know is answered at once; whether anything was."""
        sender, moved = self.sender, False
        while sender.lookups:
            topic = sender.lookups.popitem()[0]
            if (topic, tuple(self.entries(topic))) not in asked:  # the same answer twice changes nothing
                asked.add((topic, tuple(self.entries(topic))))
                moved = True
                self.look_up(topic)
        while sender.doubtful:
            node = sender.doubtful.pop()
            if not any(s.alive and s.instance == node.instance for s in self.servers):
                sender.gone(node.instance, self.now)
                moved = True
        return moved

    def settle_connections(self) -> bool:
        """Connections that are wanted are made, or fail; whether there were any."""
        moved = False
        while self.sender.wanted:
            link = self.sender.wanted.popitem()[0]
            if link not in self.conns and link not in self.retrying:
                moved = True
                self.connect(link)
        for link in [link for link in self.retrying if self.at(link) is not None]:
            moved = True
            self.retry(link)
        return moved

    def settle_frames(self) -> bool:
        """What is on its way arrives, and is run; whether there was anything."""
        moved = False
        for conn in list(self.routes.values()):
            while conn.server.reads and conn.up:
                moved = True
                self.deliver_up(conn)
        for server in self.servers:
            if server.answers and server.jobs:
                moved = True
                server.work()
        for conn in list(self.routes.values()):
            while conn.client_open and conn.down:
                moved = True
                self.deliver_down(conn)
        return moved

    def tick(self) -> None:
        for _ in range(3):
            if self.sender.due <= self.now:
                self.sender.tick(self.now)
                self.sender.flush()
        assert self.sender.due > self.now, "it is due again and again although no time passes"
        for server in self.servers:
            if server.alive and server.receiver.due <= self.now:
                server.tick()
                assert server.receiver.due > self.now

    def advance(self, seconds: float) -> None:
        """Let time pass, with every timer at its time."""
        end = self.now + seconds
        self.settle()
        while True:
            due = min(self.sender.due, *(s.receiver.due for s in self.servers if s.alive), inf)
            if due > end:
                break
            self.now = max(self.now, due)
            self.tick()
            self.settle()
        self.now = end

    def link(self, server: Server) -> Link:
        return self.sender._links[server.instance]

    def conn(self, server: Server) -> Conn:
        return self.conns[self.link(server)]


def left_over(thing: object, *but: str) -> dict[str, object]:
    """The containers of an object that are not empty, and its sums that are not zero."""
    names = vars(thing) if hasattr(thing, "__dict__") else thing.__slots__  # type: ignore[attr-defined]
    found = {}
    for name in names:
        value = getattr(thing, name)
        if name in ("counts", *but) or not isinstance(value, dict | set | list | deque | tuple):
            continue
        if len(value):
            found[name] = value
    return found


def assert_clean(world: World) -> None:
    """After everything has ended nothing is left of any of it, in the sender or in its links."""
    world.take_results()
    world.take_dropped()
    sender = world.sender
    assert left_over(sender, "_links", "_routes") == {}
    assert sender._outbox_bytes == 0
    for link in sender._links.values():
        assert left_over(link, "node", "topics", "trouble", "busy") == {}, str(link.node)


def call_error(world: World, request: Outgoing) -> str:
    assert request in world.finished
    assert request.error is not None
    return str(request.error)


@pytest.fixture
def world() -> World:
    return World()


def test_topic_that_nobody_serves_is_not_asked_for_without_end(world: World) -> None:
    """An answer that nobody is there must not lead to the next question, or the directory is asked in a tight loop."""
    world.submit()
    world.sender.lookups.clear()
    world.look_up(TOPIC)
    assert world.sender.lookups == {}


# Promise 1: a call ends by its deadline, with what is known.


def test_call_is_answered(world: World) -> None:
    server = world.server()
    call = world.send()
    assert call in world.finished
    assert call.error is None
    assert call.outcome is not None
    assert (call.outcome.kind, call.outcome.codec, list(call.outcome.body)) == (REPLY, wire.JSON, [b"re:", b"1"])
    assert server.receiver.counts == Counter()
    assert_clean(world)


def test_failure_is_an_outcome(world: World) -> None:
    server = world.server()
    server.answers = False
    call = world.send()
    server.begin()
    server.finish(FAILURE)
    world.settle()
    assert call.outcome is not None
    assert call.outcome.kind == FAILURE
    assert call.error is None
    assert_clean(world)


def answers_to(world: World, server: Server) -> list[int]:
    """The kinds of the answers that are on their way."""
    return [wire.decode_answer(frames).kind for frames in world.conn(server).down]


def test_quick_call_is_not_acknowledged(world: World) -> None:
    server = world.server()
    world.send()
    server.answers = False
    world.send()
    world.now += delivery.ACK_DELAY / 2
    server.work()
    assert answers_to(world, server) == [REPLY]
    world.advance(1)
    assert_clean(world)


def test_slow_call_is_acknowledged_once_and_late(world: World) -> None:
    server = world.server()
    server.answers = False
    call = world.send()
    assert not call.accepted
    assert server.receiver.due == world.now + delivery.ACK_DELAY
    world.advance(delivery.ACK_DELAY * 0.9)
    assert not call.accepted
    world.advance(delivery.ACK_DELAY * 0.2)
    assert call.accepted
    assert call not in world.finished
    server.work()
    assert answers_to(world, server) == [REPLY]
    world.settle()
    assert call.outcome is not None


def test_timeout_says_that_no_server_is_registered(world: World) -> None:
    call = world.send(timeout=5.0)
    world.advance(4.9)
    assert call not in world.finished
    world.advance(0.2)
    assert isinstance(call.error, MessagingTimeout)
    assert "no server is registered" in call_error(world, call)
    assert_clean(world)


def test_timeout_says_that_the_directory_has_not_answered(world: World) -> None:
    call = world.submit(timeout=5.0)
    world.sender.lookups.clear()
    world.now += 5
    world.tick()
    world.sender.lookups.clear()
    world.take_results()
    assert "directory has not answered" in call_error(world, call)
    assert_clean(world)


def test_timeout_says_that_there_was_no_connection(world: World) -> None:
    server = world.server("far")
    server.reachable = False
    call = world.send(timeout=5.0)
    world.advance(5)
    assert "no connection to far" in call_error(world, call)
    assert isinstance(call.error, MessagingTimeout)
    assert_clean(world)


def test_timeout_says_that_a_connection_was_being_made(world: World) -> None:
    world.server("far")
    call = world.submit(timeout=5.0)
    world.sender.lookups.clear()
    world.look_up(TOPIC)
    world.now += 5
    world.tick()
    world.take_results()
    assert "no connection to far" in call_error(world, call)
    assert left_over(world.sender, "_links", "_routes", "wanted") == {}


def test_timeout_says_that_it_was_not_accepted(world: World) -> None:
    server = world.server("stuck")
    server.reads = False
    call = world.send(timeout=5.0)
    world.advance(5)
    assert "sent to stuck" in call_error(world, call)
    assert "did not accept" in call_error(world, call)
    assert_clean(world)


def test_timeout_says_who_accepted_it(world: World) -> None:
    server = world.server("slow")
    server.answers = False
    call = world.send(timeout=5.0)
    world.advance(5)
    assert "slow (pid 5000, tcp://127.0.0.1:5000) accepted it and did not reply" in call_error(world, call)
    assert not isinstance(call.error, ServerGone)
    server.answers = True
    world.settle()  # its late reply disturbs nobody
    assert world.executed(call) <= 1
    assert_clean(world)


def test_timeout_says_that_all_were_busy(world: World) -> None:
    for name in ("a", "b"):
        world.server(name).window = 0
    call = world.send(timeout=5.0)
    world.advance(5)
    text = call_error(world, call)
    assert "all its servers are busy" in text
    assert "a (pid" in text
    assert "b (pid" in text
    world.advance(2)
    assert_clean(world)


def test_timeout_says_that_servers_are_of_another_version(world: World) -> None:
    server = world.server("old")
    server.node = server.node._replace(wire=wire.VERSION + 1)
    call = world.send(timeout=5.0)
    world.advance(5)
    assert "another version" in call_error(world, call)


def test_call_without_timeout_waits(world: World) -> None:
    call = world.send(timeout=None)
    world.advance(100_000)
    assert call not in world.finished
    world.server()
    world.look_up(TOPIC)
    world.settle()
    assert call.outcome is not None


def test_timeout_of_zero_ends_at_once(world: World) -> None:
    world.server().reads = False
    call = world.send(timeout=0)
    world.tick()
    world.take_results()
    assert isinstance(call.error, MessagingTimeout)


def test_call_waits_for_its_server_to_appear(world: World) -> None:
    call = world.send()
    world.advance(30)
    assert call not in world.finished
    assert world.sender.awaited() == [TOPIC]
    world.server()
    world.look_up(TOPIC)
    world.settle()
    assert call.outcome is not None
    assert world.sender.awaited() == []
    assert_clean(world)


def test_request_too_late_is_not_run(world: World) -> None:
    server = world.server()
    server.reads = False
    call = world.send(timeout=5.0)
    world.now += 4.999
    (frames,) = world.conn(server).up
    assert wire.decode_request(frames).left == 5.0
    late = wire.encode_request(CALL, server.instance, b"x" * 16, 1, 1, 0.0, wire.encode_key(ANY), body=[b"late"])
    server.receive(world.conn(server), late)
    assert not server.jobs
    assert server.receiver.counts["requests too late"] == 1
    world.now += 0.01
    world.tick()
    world.take_results()
    assert call in world.finished


# Servers that are gone.


def test_call_that_was_accepted_ends_at_once_when_its_server_is_gone(world: World) -> None:
    server = world.server("dead")
    server.answers = False
    call = world.send()
    world.advance(0.1)
    link = world.link(server)
    world.kill(server)
    world.cut(link)
    world.retry(link)
    world.settle()
    assert isinstance(call.error, ServerGone)
    assert isinstance(call.error, MessagingTimeout)
    assert call.error.server == "dead (pid 5000, tcp://127.0.0.1:5000)"
    assert "accepted" in str(call.error)
    assert_clean(world)


def test_server_that_the_directory_lost_is_not_given_up_before_it_was_tried(world: World) -> None:
    server = world.server()
    server.answers = False
    call = world.send()
    world.advance(0.1)
    server.listed = False
    world.cut(world.link(server))
    world.sender.gone(server.instance, world.now)
    world.settle()
    assert call.error is None
    server.answers = True
    world.settle()
    assert call.outcome is not None
    world.advance(1)
    assert_clean(world)


def test_call_that_was_sent_ends_with_what_is_known(world: World) -> None:
    server, other = world.server("dead"), world.server("other")
    other.listed = False
    server.answers = False
    call = world.send()
    link = world.link(server)
    world.kill(server)
    other.listed = True
    world.cut(link)
    world.retry(link)
    world.settle()
    assert isinstance(call.error, ServerGone), "it may have run, so it must not go to another server"
    assert "whether it ran is not known" in str(call.error)
    assert world.executed(call) == 0
    assert_clean(world)


def test_call_that_was_only_queued_goes_to_another_server(world: World) -> None:
    server, other = world.server("dead"), world.server("other")
    server.reachable = False
    other.listed = False
    call = world.send()
    world.kill(server)
    other.listed = True
    world.sender.gone(server.instance, world.now)
    world.settle()
    assert call.outcome is not None
    assert call.outcome.server == other.instance
    assert_clean(world)


def test_cast_that_was_accepted_is_reported_when_its_server_is_gone(world: World) -> None:
    server = world.server("dead")
    server.answers = False
    cast = world.send(CAST)
    assert cast in world.finished
    link = world.link(server)
    world.kill(server)
    world.cut(link)
    world.retry(link)
    world.settle()
    ((lost, reason),) = world.lost
    assert lost is cast
    assert "dead" in reason
    assert "accepted" in reason
    assert world.sender.counts["messages lost"] == 1
    assert_clean(world)


@pytest.mark.parametrize("retry", [None, 0])
def test_cast_that_was_sent_is_reported_when_its_server_is_gone(world: World, retry: int | None) -> None:
    server = world.server("dead")
    server.reads = False
    cast = world.send(CAST, retry=retry)
    link = world.link(server)
    world.kill(server)
    world.cut(link)
    world.retry(link)
    world.settle()
    assert cast in world.finished
    if retry is None:
        assert cast.error is None
        assert [request for request, _ in world.lost] == [cast]
    else:
        assert isinstance(cast.error, MessageDeliveryFailure)
        assert world.lost == []
    assert_clean(world)


def test_wrong_instance_over_the_only_connection_goes_to_another_server(world: World) -> None:
    server, other = world.server("old"), world.server("other")
    other.listed = False
    world.kill(server)
    server.listed = True  # the directory is behind
    world.server("new", port=server.node.port, topics=()).listed = False
    call = world.submit()
    world.look_up(TOPIC)
    other.listed = True
    world.settle()
    assert world.sender.counts["answers wrong_instance"] == 1
    assert call.outcome is not None
    assert call.outcome.server == other.instance


def test_wrong_instance_after_two_connections_does_not(world: World) -> None:
    server, other = world.server("old"), world.server("other")
    other.listed = False
    server.reads = False
    call = world.send()
    link = world.link(server)
    world.kill(server)
    world.server("new", port=server.node.port, topics=())
    other.listed = True
    world.cut(link)
    world.sender.doubtful.clear()  # the directory is slower than the connection
    world.settle()
    assert isinstance(call.error, ServerGone)
    assert world.executed(call) == 0
    world.advance(3)
    assert_clean(world)


def test_written_request_of_a_live_server_that_the_directory_lost_goes_nowhere_else(world: World) -> None:
    """A directory that came back empty, or a process that was stopped for long: only its own answer is certain."""
    server, other = world.server("alive"), world.server("other")
    other.listed = False
    world.send()
    server.reads = False
    world.cut(world.link(server))
    node = world.sender.doubtful.pop()
    call = world.submit()
    world.settle()  # it is back, and has the request on its way
    other.listed = True
    world.look_up(TOPIC)
    world.sender.gone(node.instance, world.now)
    world.settle()
    server.reads = True
    world.settle()
    assert world.executed(call) <= 1


# Promise 2: never twice. Promise 6: connections that are lost and return.


def test_call_survives_a_cut_before_the_server_had_it(world: World) -> None:
    server = world.server()
    server.reads = False
    call = world.send()
    world.cut(world.link(server))
    server.reads = True
    world.settle()
    assert call.outcome is not None
    assert world.executed(call) == 1
    assert call.writes == 2
    assert_clean(world)


def test_what_was_not_written_when_the_connection_broke_goes_elsewhere(world: World) -> None:
    server = world.server()
    world.send()
    world.kill(server)
    world.conn(server).client_open = False  # libzmq knows, and the loop is still to hear of it
    cast = world.submit(kind=CAST)
    world.cut(world.link(server))
    world.settle()
    world.server()
    world.look_up(TOPIC)
    world.settle()
    assert not world.lost
    assert world.executed(cast) == 1


def test_reply_that_was_lost_comes_from_the_cache(world: World) -> None:
    server = world.server()
    server.answers = False
    call = world.send()
    server.work()
    world.cut(world.link(server))
    world.settle()
    assert call.outcome is not None
    assert list(call.outcome.body) == [b"re:", b"1"]
    assert world.executed(call) == 1
    assert server.receiver.counts["requests repeated"] == 1
    assert_clean(world)


def test_accepted_call_is_only_asked_for(world: World) -> None:
    server = world.server()
    server.answers = False
    call = world.send()
    world.advance(0.1)
    assert call.accepted
    world.cut(world.link(server))
    world.settle()
    assert server.seen[-1].kind == ASK
    assert list(server.seen[-1].body) == []
    assert server.seen[-1].id == call.id
    server.work()
    world.settle()
    assert call.outcome is not None
    assert world.executed(call) == 1


def test_ask_for_a_reply_that_is_ready(world: World) -> None:
    server = world.server()
    server.answers = False
    call = world.send()
    world.advance(0.1)
    server.work()
    world.cut(world.link(server))
    world.settle()
    assert server.seen[-1].kind == ASK
    assert call.outcome is not None
    assert world.executed(call) == 1


def test_ask_for_something_unknown_is_never_run(world: World) -> None:
    server = world.server()
    world.send()
    frames = wire.encode_request(ASK, server.instance, b"n" * 16, 7, 7, 5.0, wire.encode_key(ANY))
    server.receive(world.conn(server), frames)
    assert not server.jobs
    assert not server.running


def test_acknowledgement_that_was_lost_is_repeated(world: World) -> None:
    server = world.server()
    server.answers = False
    cast = world.submit(CAST)
    world.look_up(TOPIC)
    world.connect(world.sender.wanted.popitem()[0])
    world.deliver_up(world.conn(server))
    world.cut(world.link(server))
    world.settle()
    assert cast in world.finished
    assert cast.error is None
    server.work()
    world.advance(1)
    assert world.executed(cast) == 1
    assert_clean(world)


def test_done_that_was_lost_is_repeated(world: World) -> None:
    server = world.server()
    cast = world.send(CAST)
    link = world.link(server)
    assert list(link.taken.values()) == [cast]
    world.now += delivery.ACK_DELAY
    server.tick()
    assert answers_to(world, server) == [wire.DONE]
    world.cut(link)
    world.settle()
    assert not link.taken
    assert world.executed(cast) == 1
    assert_clean(world)


def test_done_that_was_lost_and_forgotten_leaves_nothing_behind() -> None:
    """The receiver forgets a cast when its time has run out: a sender that was away for longer must not keep it for ever."""
    world = World(Limits(time_to_live=10))
    server = world.server()
    world.send(CAST)
    link = world.link(server)
    world.cut(link, keep_up=0)
    world.sender.doubtful.clear()
    server.reachable = False
    world.advance(30)
    server.reachable = True
    world.settle()
    world.advance(30)
    assert not link.taken
    assert link.idle


def test_copy_that_comes_late_on_an_old_connection_is_not_run(world: World) -> None:
    server = world.server()
    server.reads = False
    call = world.send()
    old = world.cut(world.link(server), keep_up=1)
    late = list(old.up)
    old.up.clear()
    server.reads = True
    world.settle()
    assert call.outcome is not None
    for frames in late:
        server.receive(old, frames)
    assert not server.jobs
    world.send()  # which closes the first one
    for frames in late:
        server.receive(old, frames)
    assert not server.jobs
    assert world.executed(call) == 1


def test_copy_that_comes_late_does_not_take_the_reply_with_it(world: World) -> None:
    """An older connection's copy, read after the newer one's: the reply must go where the sender is."""
    server = world.server()
    world.send()
    server.reads = server.answers = False
    call = world.send()
    old = world.cut(world.link(server), keep_up=1)
    late = old.up.popleft()
    server.reads = True
    world.settle()
    server.receive(old, late)
    server.work()
    world.settle()
    assert call.outcome is not None


def test_repeat_of_a_refused_request_is_refused_again(world: World) -> None:
    server = world.server()
    server.window = 0
    world.submit()
    world.look_up(TOPIC)
    world.connect(world.sender.wanted.popitem()[0])
    conn = world.conn(server)
    frames = conn.up[0]
    world.deliver_up(conn)
    server.window = 10
    server.receive(conn, frames)
    assert answers_to(world, server) == [BUSY, BUSY]
    assert not server.jobs
    assert server.receiver.counts["requests repeated"] == 1


def test_duplicates_of_everything_are_harmless(world: World) -> None:
    server = world.server()
    server.answers = False
    requests = [world.submit(kind) for kind in (CALL, CAST, FANOUT) * 3]
    for _ in range(3):
        world.sender.lookups.clear()
        world.look_up(TOPIC)
        while world.sender.wanted:
            link = world.sender.wanted.popitem()[0]
            if link not in world.conns:
                world.connect(link)
        conn = world.conn(server)
        conn.up.extend(list(conn.up))
        while conn.up:
            world.deliver_up(conn)
        server.work()
        conn.down.extend(list(conn.down))
        while conn.down:
            world.deliver_down(conn)
    world.advance(1)
    assert [world.executed(r) for r in requests] == [1] * 9
    assert_clean(world)


def test_rewriting_keeps_the_order_and_comes_before_what_is_new(world: World) -> None:
    server = world.server()
    server.reads = False
    requests = [world.send() for _ in range(3)]
    world.cut(world.link(server))
    requests.append(world.submit())
    server.reads = True
    world.settle()
    assert world.order == [b"1", b"2", b"3", b"4"]
    assert all(r.outcome is not None for r in requests)


def test_answers_of_another_instance_are_ignored(world: World) -> None:
    server = world.server()
    server.answers = False
    call = world.send()
    answer = wire.Answer(REPLY, wire.JSON, b"e" * 16, (call.id,), [b"evil"])
    world.sender.answered(world.link(server), answer, world.now)
    assert call.outcome is None
    assert world.sender.counts["answers from a wrong instance"] == 1


def test_answers_nobody_waits_for_are_counted(world: World) -> None:
    server = world.server()
    world.send()
    for kind in (REPLY, ACCEPTED, BUSY, GIVEN_BACK, wire.HEARTBEAT):
        world.sender.answered(world.link(server), wire.Answer(kind, 0, server.instance, (99,), []), world.now)
    assert world.sender.counts["answers nobody waits for"] == 5
    assert_clean(world)


# What a receiver remembers.


def request_to(receiver: Receiver, id: int, floor: int | None = None, left: float | None = 60.0, kind: int = CALL) -> Request:
    lowest = id if floor is None else floor
    key = wire.encode_key(ANY)
    frames = wire.encode_request(kind, receiver.instance, b"p" * 16, id, lowest, left, key, codec=wire.JSON, body=[b"{}"])
    return wire.decode_request(frames)


class Alone(Receiver):
    """Its answers are kept."""

    def __init__(self) -> None:
        self.writes: list[tuple[bytes, list[bytes]]] = []
        super().__init__(b"r" * 16, self._keep)

    def _keep(self, route: bytes, frames: list[bytes]) -> bool:
        self.writes.append((route, frames))
        return True


def test_floor_lets_the_receiver_forget() -> None:
    receiver = Alone()
    records = []
    for id in range(1, 6):
        record = receiver.request(b"route", request_to(receiver, id, 1), 0.0)
        assert record is not None
        receiver.accept(record, 0.0)
        receiver.reply(record, REPLY, wire.JSON, [b"x" * 10])
        records.append(record)
    assert receiver._reply_bytes > 50
    assert receiver.request(b"route", request_to(receiver, 6, 6), 0.0) is not None
    assert all(r.forgotten and r.frames is None for r in records)
    assert not receiver._replies
    assert receiver._reply_bytes == 0
    assert receiver.request(b"route", request_to(receiver, 3, 3), 0.0) is None, "closed long ago"
    assert receiver.counts["requests closed long ago"] == 1


def test_reply_below_the_floor_is_not_sent() -> None:
    receiver = Alone()
    record = receiver.request(b"route", request_to(receiver, 1), 0.0)
    assert record is not None
    receiver.accept(record, 0.0)
    receiver.request(b"route", request_to(receiver, 2), 0.0)
    receiver.reply(record, REPLY, wire.JSON, [b"x"])
    assert receiver.writes == []
    assert receiver.counts["replies nobody waits for"] == 1
    receiver.heartbeat(record)
    assert receiver.writes == []


def test_reply_cache_is_bounded_and_keeps_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "REPLY_CACHE", 1000)
    receiver = Alone()
    for id in range(1, 20):
        record = receiver.request(b"route", request_to(receiver, id, 1), 0.0)
        assert record is not None
        receiver.accept(record, 0.0)
        receiver.reply(record, REPLY, wire.JSON, [b"x" * (5000 if id == 19 else 300)])
        assert receiver._reply_bytes <= 1000 or len(receiver._replies) == 1
        assert receiver._reply_bytes == sum(receiver._replies.values())
    receiver.writes.clear()
    assert receiver.request(b"new", request_to(receiver, 1, 1), 0.0) is None
    ((route, frames),) = receiver.writes
    assert wire.decode_answer(frames).kind == wire.FORGOTTEN, "a reply that was dropped cannot be repeated, nor is it run again"
    receiver.writes.clear()
    assert receiver.request(b"new", request_to(receiver, 19, 1), 0.0) is None
    ((route, frames),) = receiver.writes
    assert route == b"new"
    assert list(map(len, wire.decode_answer(frames).body)) == [5000]


def test_remember_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "REMEMBER", 50)
    receiver = Alone()
    first = receiver.request(b"route", request_to(receiver, 1, 1), 0.0)
    assert first is not None
    receiver.accept(first, 0.0)  # runs for ever, so the floor does not move
    for id in range(2, 1000):
        record = receiver.request(b"route", request_to(receiver, id, 1), 0.0)
        assert record is not None
        receiver.accept(record, 0.0)
        receiver.reply(record, REPLY, wire.JSON, [b"x"])
    (peer,) = receiver._peers.values()
    assert len(peer.records) <= 51
    assert 1 in peer.records, "what runs is not forgotten"
    assert len(receiver._replies) <= 51
    assert receiver.request(b"route", request_to(receiver, 2, 1), 0.0) is None, "forgotten, but known to be old"


def test_sweep_forgets_what_has_run_out() -> None:
    receiver = Alone()
    record = receiver.request(b"route", request_to(receiver, 1, left=3.0), 0.0)
    assert record is not None
    receiver.accept(record, 0.0)
    receiver.reply(record, REPLY, wire.JSON, [b"x" * 100])
    running = receiver.request(b"route", request_to(receiver, 2, 1, left=3.0), 0.0)
    assert running is not None
    receiver.accept(running, 0.0)
    now = 0.0
    while now < 10:
        now = receiver.due
        receiver.tick(now)
    assert record.forgotten
    assert not running.forgotten
    assert not receiver._replies
    assert receiver._reply_bytes == 0
    assert receiver.request(b"route", request_to(receiver, 1, 1), now) is None


def test_sender_that_is_away_is_forgotten() -> None:
    receiver = Alone()
    record = receiver.request(b"route", request_to(receiver, 1, left=30.0), 0.0)
    assert record is not None
    receiver.accept(record, 0.0)
    receiver.reply(record, REPLY, wire.JSON, [b"x"])
    receiver.flush()
    while receiver.due < delivery.FORGET + 20:
        receiver.tick(receiver.due)
    assert left_over(receiver, "writes") == {}
    assert receiver.due == inf
    assert receiver._reply_bytes == 0


def test_sender_whose_call_has_time_left_is_not_forgotten() -> None:
    """Or the copy that it writes when it is back would be run a second time."""
    receiver = Alone()
    request = request_to(receiver, 1, left=delivery.FORGET * 10)
    record = receiver.request(b"route", request, 0.0)
    assert record is not None
    receiver.accept(record, 0.0)
    receiver.reply(record, REPLY, wire.JSON, [b"x"])
    while receiver.due < delivery.FORGET + 20:
        receiver.tick(receiver.due)
    assert receiver.request(b"again", request._replace(left=1000.0), delivery.FORGET + 20) is None


def test_sender_whose_call_runs_is_not_forgotten() -> None:
    receiver = Alone()
    record = receiver.request(b"route", request_to(receiver, 1, left=None), 0.0)
    assert record is not None
    receiver.accept(record, 0.0)
    while receiver.due < delivery.FORGET * 2:
        receiver.tick(receiver.due)
    assert not record.forgotten
    receiver.flush()
    receiver.writes.clear()
    receiver.reply(record, REPLY, wire.JSON, [b"x"])
    receiver.flush()
    assert len(receiver.writes) == 1


def test_senders_without_end_are_forgotten_but_for_those_heard_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "REMEMBER_ALL", 100)
    receiver = Alone()
    running = receiver.request(b"route", request_to(receiver, 1)._replace(sender=b"runs".ljust(16)), 0.0)
    assert running is not None
    receiver.accept(running, 0.0)
    for number in range(1000):
        new = request_to(receiver, 1)._replace(sender=b"%16d" % number, left=None)
        record = receiver.request(b"route", new, number / 1000)
        assert record is not None
        receiver.refuse(record, NOT_HERE)
    receiver.tick(5.0)
    assert len(receiver._peers) + sum(len(peer.records) for peer in receiver._peers.values()) <= 100
    assert running.sender in receiver._peers
    last = request_to(receiver, 1)._replace(sender=b"%16d" % 999, left=None)
    assert receiver.request(b"route", last, 6.0) is None


def strange_request(chance: random.Random, to: bytes, senders: list[bytes], now: float) -> Request:
    """As no sender of ours would make it, most often."""
    soon = int(now * 1000) + chance.randrange(100)
    id = chance.choice((soon, soon, chance.randrange(1, 40), chance.randrange(1 << 64), 0, (1 << 64) - 1))
    return Request(
        chance.choice((CALL, CAST, FANOUT, ASK)),
        chance.randrange(256),
        chance.choice((to, to, to, chance.randbytes(16))),
        chance.choice(senders) if chance.random() < 0.9 else chance.randbytes(16),
        id,
        chance.choice((0, id, chance.randrange(id + 1), max(0, id - 5))),
        chance.choice((None, 0.0, 0.001, 5.0, 1e15)),
        chance.choice((0, 1, 1 << 63)),
        chance.choice((None, 0.001, 1e6)),
        Key("", "", ""),
        [b""] * chance.randrange(3),
    )


def end_somehow(chance: random.Random, receiver: Receiver, record: Record, now: float) -> None:
    if chance.random() < 0.3:
        receiver.heartbeat(record)
    if chance.random() < 0.2:
        receiver.refuse(record, GIVEN_BACK)
    elif record.kind == CALL:
        receiver.reply(record, chance.choice((REPLY, FAILURE)), wire.JSON, [b"x" * chance.randrange(100)])
    else:
        receiver.started(record, now)


@pytest.mark.parametrize("seed", range(10))
def test_receiver_takes_anything(seed: int) -> None:
    """Strange requests in any order, while whatever it took ends in any way: nothing is taken twice, and nothing is left."""
    chance = random.Random(seed)
    receiver = Alone()
    senders = [chance.randbytes(16) for _ in range(5)]
    took: Counter[tuple[bytes, int]] = Counter()
    begun: list[Record] = []
    now = 0.0
    for _ in range(3000):
        record = receiver.request(chance.randbytes(1), strange_request(chance, receiver.instance, senders, now), now)
        if record is not None:
            assert record.kind != ASK
            took[record.sender, record.id] += 1
            if chance.random() < 0.2:
                receiver.refuse(record, chance.choice((BUSY, NOT_HERE)))
            else:
                receiver.accept(record, now)
                begun.append(record)
        if begun and chance.random() < 0.7:
            end_somehow(chance, receiver, begun.pop(chance.randrange(len(begun))), now)
        if chance.random() < 0.1:
            now += chance.choice((0.001, 0.1, 1.0))
        receiver.tick(now)
        receiver.flush()
        for _, frames in receiver.writes:
            for message in wire.unpack(frames):
                wire.decode_answer(message)
        receiver.writes.clear()
    assert max(took.values()) == 1
    for record in begun:
        receiver.refuse(record, GIVEN_BACK)
    while receiver.due < inf:
        now = receiver.due
        receiver.tick(now)
        assert receiver.due > now
    receiver.flush()
    receiver.writes.clear()
    assert left_over(receiver) == {}
    assert receiver._reply_bytes == 0


def strange_answer(chance: random.Random, link: Link) -> wire.Answer:
    kind = chance.choice(list(wire.ANSWERS))
    if kind in (wire.WRONG_INSTANCE, wire.WRONG_VERSION) and chance.random() < 0.9:
        kind = wire.HEARTBEAT  # else there would be nobody there most of the time
    ids = chance.choices(
        [*link.open, *link.taken, 0, 5, (1 << 64) - 1], k=1 if kind in (REPLY, FAILURE) else chance.randrange(9)
    )
    server = link.node.instance if chance.random() < 0.8 else chance.randbytes(16)
    return wire.Answer(kind, chance.randrange(256), server, tuple(ids), [b"x"])


def submit_something(chance: random.Random, world: World) -> Outgoing:
    kind = chance.choice((CALL, CALL, CAST, FANOUT))
    if kind == FANOUT:
        return world.submit(kind)
    how = {"timeout": chance.choice((0.0, 1.0, 5.0)), "monitor": chance.choice((None, 2.0))} if kind == CALL else {}
    return world.submit(kind, retry=chance.choice((None, 0)), **how)


@pytest.mark.parametrize("seed", range(10))
def test_sender_takes_any_answers(seed: int) -> None:
    """Strange answers in any order: every request ends by its time, once, and nothing is left of it."""
    chance = random.Random(seed)
    limits = Limits(outbox_messages=50, time_to_live=20.0)
    world = World(limits, seed)
    for name in "abc":
        world.server(name).reads = False
    requests: list[Outgoing] = []
    for _ in range(700):
        if chance.random() < 0.2:
            requests.append(submit_something(chance, world))
        for link in list(world.conns):
            if link in world.conns:
                world.sender.answered(link, strange_answer(chance, link), world.now)
        if chance.random() < 0.05 and world.conns:
            world.cut(chance.choice(list(world.conns)))
        world.settle()
        world.advance(chance.choice((0.0, 0.0, 0.001, 0.1, 1.0)))
        assert world.sender.pending <= limits.outbox_messages + 3
        for link in world.sender._links.values():
            assert all(r.id == id and r.link is link and not r.over for id, r in link.open.items())
            assert all(not r.id for r in link.queue)
    for server in list(world.servers):
        world.kill(server)
    for conn in list(world.conns.values()):
        world.cut(conn.link)
    world.advance(60)
    assert_clean(world)
    ended = Counter(world.finished)
    assert all(ended[request] == 1 for request in requests)


def test_several_acknowledgements_are_one_message() -> None:
    receiver = Alone()
    for id in range(1, 6):
        record = receiver.request(b"route", request_to(receiver, id, 1, kind=CAST), 0.0)
        assert record is not None
        receiver.accept(record, 0.0)
        receiver.started(record, 0.0)
    receiver.flush()
    ((_, frames),) = receiver.writes
    assert wire.decode_answer(frames)[:4] == (ACCEPTED, 0, receiver.instance, (1, 2, 3, 4, 5))
    receiver.writes.clear()
    receiver.tick(receiver.due)
    ((_, frames),) = receiver.writes
    assert wire.decode_answer(frames)[:4] == (wire.DONE, 0, receiver.instance, (1, 2, 3, 4, 5))


# Promise 3: casts, and the outbox.


def test_cast_returns_when_it_is_accepted(world: World) -> None:
    server = world.server()
    server.reads = False
    cast = world.send(CAST)
    assert cast not in world.finished
    server.reads, server.answers = True, False
    world.settle()
    assert cast in world.finished
    assert cast.error is None
    assert cast.outcome is None
    assert not server.running
    assert world.sender.pending == 0
    server.answers = True
    world.advance(1)
    assert world.executed(cast) == 1
    assert not world.link(server).taken, "once it is begun its sender need not keep it"
    assert_clean(world)


def test_cast_without_a_server_goes_to_the_outbox_and_is_delivered_when_one_appears(world: World) -> None:
    casts = [world.send(CAST) for _ in range(5)]
    world.advance(0.99)
    assert world.finished == []
    world.advance(0.02)
    assert world.finished == casts
    assert all(c.error is None for c in casts)
    assert world.sender.pending == 5
    world.advance(100)
    world.server()
    casts += [world.send(CAST) for _ in range(3)]
    world.look_up(TOPIC)
    world.settle()
    assert world.order == [b"%d" % n for n in range(1, 9)]
    assert world.sender.pending == 0
    world.advance(1)
    assert_clean(world)
    assert world.lost == []


@pytest.mark.parametrize("retry", [0, 1, 3])
@pytest.mark.parametrize("kind", [CALL, CAST])
def test_retry_gives_up_after_so_many_graces(world: World, kind: int, retry: int) -> None:
    request = world.send(kind, retry=retry)
    world.advance(retry + 0.99)
    assert request not in world.finished
    world.advance(0.02)
    assert isinstance(request.error, MessageDeliveryFailure)
    assert f"{retry + 1} tries" in call_error(world, request)
    assert "no server is registered" in call_error(world, request)
    assert world.lost == []
    assert_clean(world)


@pytest.mark.parametrize("retry", [0, 2])
def test_retry_does_not_end_a_call_that_was_accepted(world: World, retry: int) -> None:
    server = world.server()
    server.answers = False
    call = world.send(retry=retry)
    world.advance(30)
    assert call not in world.finished
    server.work()
    world.settle()
    assert call.outcome is not None


def test_retry_of_minus_one_is_none(world: World) -> None:
    cast = world.send(CAST, retry=-1)
    world.advance(2)
    assert cast in world.finished
    assert cast.error is None
    assert world.sender.pending == 1


def test_outbox_that_is_full_of_messages_holds_then_raises() -> None:
    world = World(Limits(outbox_messages=3))
    casts = [world.send(CAST) for _ in range(5)]
    world.advance(1.01)
    assert world.finished == casts[:3]
    world.advance(9.8)
    assert world.finished == casts[:3]
    world.advance(0.5)
    for cast in casts[3:]:
        assert isinstance(cast.error, MessageDeliveryFailure)
        assert "outbox is full" in call_error(world, cast)
    assert world.sender.pending == 3
    world.advance(300)
    assert len(world.lost) == 3
    assert_clean(world)


def test_outbox_that_is_full_lets_go_on_when_there_is_room() -> None:
    world = World(Limits(outbox_messages=3))
    casts = [world.send(CAST) for _ in range(5)]
    world.advance(3)
    world.server()
    world.look_up(TOPIC)
    world.settle()
    assert world.finished == casts
    assert all(c.error is None for c in casts)
    assert world.order == [b"1", b"2", b"3", b"4", b"5"]
    world.advance(1)
    assert_clean(world)


def test_outbox_that_is_full_of_bytes_holds_then_raises() -> None:
    world = World(Limits(outbox_bytes=100))
    first = world.send(CAST, body=b"x" * 60)
    second = world.send(CAST, body=b"y" * 60)
    third = world.send(CAST, body=b"z" * 40)
    world.advance(1.1)
    assert world.finished == [first, third]
    world.advance(11)
    assert isinstance(second.error, MessageDeliveryFailure)
    assert "outbox is full" in str(second.error)


def test_empty_outbox_takes_anything() -> None:
    world = World(Limits(outbox_bytes=100))
    cast = world.send(CAST, body=b"x" * 1000)
    world.advance(1.1)
    assert cast in world.finished
    assert cast.error is None


def test_message_whose_time_to_live_has_run_out_is_lost_with_a_reason(world: World) -> None:
    cast = world.send(CAST)
    world.advance(299)
    assert world.lost == []
    world.advance(1.1)
    ((lost, reason),) = world.lost
    assert lost is cast
    assert "time to live" in reason
    assert "no server is registered" in reason
    assert world.sender.counts["messages lost"] == 1
    assert_clean(world)


def test_order_is_kept_when_the_first_connection_fails(world: World) -> None:
    server = world.server()
    for _ in range(4):
        world.submit(CAST)
    world.look_up(TOPIC)
    for _ in range(4):  # these go straight to the connection that is being made
        world.submit(CAST)
    server.reachable = False
    world.settle()
    world.advance(5)
    server.reachable = True
    world.settle()
    assert world.order == [b"%d" % n for n in range(1, 9)]


def test_order_is_kept_when_a_server_is_busy(world: World) -> None:
    server = world.server()
    world.send()
    world.order.clear()
    server.window = 0
    for _ in range(4):
        world.submit(CAST)
    world.settle()
    server.window = 100
    world.advance(5)
    assert world.order == [b"2", b"3", b"4", b"5"]


def test_order_is_kept_when_messages_are_given_back(world: World) -> None:
    server = world.server()
    server.answers = False
    for _ in range(4):
        world.send(CAST)
    server.stop()
    world.settle()
    server.listening = server.listed = server.answers = True
    world.look_up(TOPIC)
    world.settle()
    world.advance(5)
    assert world.order == [b"1", b"2", b"3", b"4"]


def server_of_waiting_casts(world: World, count: int) -> Server:
    """One that appears when so many casts wait for it, and has not read the first that was written."""
    for _ in range(count):
        world.submit(CAST)
    server = world.server()
    server.reads = False
    world.settle()
    return server


def written_each_time(world: World, server: Server) -> list[int]:
    """How many requests are on their way to it at once, until none is."""
    conn, seen = world.conn(server), []
    while conn.up:
        seen.append(sum(len(wire.unpack(frames)) for frames in conn.up))
        while conn.up:
            world.deliver_up(conn)
        while conn.down:
            world.deliver_down(conn)
    return seen


def test_casts_that_waited_are_sent_twice_as_many_each_time(world: World) -> None:
    """One at a time would hold back everybody: while many send, something waits always."""
    server = server_of_waiting_casts(world, 12)
    assert written_each_time(world, server) == [1, 2, 4, 5]
    for _ in range(3):  # nothing waits any more
        world.submit(CAST)
    assert written_each_time(world, server) == [3]
    world.advance(1)
    assert world.order == [b"%d" % n for n in range(1, 16)]
    assert_clean(world)


def test_casts_that_are_given_while_others_that_waited_are_on_their_way_come_behind_them(world: World) -> None:
    server = server_of_waiting_casts(world, 2)
    conn = world.conn(server)
    assert len(conn.up) == 1
    world.deliver_up(conn)
    world.deliver_down(conn)
    assert len(conn.up) == 1  # there could be two
    for _ in range(3):
        world.submit(CAST)
    assert written_each_time(world, server) == [2, 2]
    server.work()
    assert world.order == [b"%d" % n for n in range(1, 6)]


def test_a_refusal_lets_only_one_of_those_that_wait_go_again(world: World) -> None:
    server = server_of_waiting_casts(world, 12)
    server.answers, server.window = False, 7
    assert written_each_time(world, server) == [1, 2, 4, 5]  # of which the last five are refused
    world.advance(delivery.BUSY_FIRST * 0.99)
    assert not world.conn(server).up
    server.window = 100
    world.advance(delivery.BUSY_FIRST)
    assert written_each_time(world, server) == [1, 2, 2]
    server.work()
    assert world.order == [b"%d" % n for n in range(1, 13)]
    server.answers = True
    world.advance(1)
    assert_clean(world)


def give(world: World, sizes: Iterable[int], kind: int = CAST) -> list[Outgoing]:
    """As many as come in one round of a loop, before anything is written."""
    requests = [Outgoing(kind, ANY, wire.JSON, [bytes(size)], timeout=60.0) for size in sizes]
    for request in requests:
        world.sender.submit(request, world.now)
    return requests


@pytest.mark.parametrize(
    ("sizes", "together"),
    [
        ([10], [1]),
        ([10] * 40, [32, 8]),
        ([10, 10, 5000, 10, 10], [2, 1, 2]),
        ([5000, 5000], [1, 1]),
    ],
)
def test_small_requests_of_one_round_are_written_together_and_all_in_order(
    world: World, sizes: list[int], together: list[int]
) -> None:
    server = world.server()
    world.send(CAST)
    conn = world.conn(server)
    requests = give(world, sizes)
    world.sender.flush()
    written = [wire.unpack(frames) for frames in conn.up]
    assert [len(messages) for messages in written] == together
    assert [wire.decode_request(m).id for messages in written for m in messages] == [request.id for request in requests]


def test_small_replies_of_one_round_are_written_together(world: World) -> None:
    server = world.server()
    server.answers = False
    for _ in range(40):
        world.submit()
    world.settle()
    assert len(server.jobs) == 40
    while server.jobs:
        record, _ = server.jobs.popleft()
        server.receiver.reply(record, REPLY, wire.JSON, [bytes(5000 if len(server.jobs) == 5 else 10)])
    conn = world.conn(server)
    assert [len(wire.unpack(frames)) for frames in conn.down] == [32, 1]
    server.flush()
    assert [len(wire.unpack(frames)) for frames in conn.down] == [32, 1, 7]
    world.settle()
    assert sum(request.outcome is not None for request in world.finished) == 40


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("kind", [CALL, CAST])
def test_what_was_not_written_when_the_connection_was_lost_goes_to_another_server(world: World, kind: int, told: bool) -> None:
    """:param told: libzmq tells of the loss before it is asked to write."""
    first, second = world.server("a"), world.server("b")
    for _ in range(2):
        world.send()
    requests = give(world, [10, 20, 30, 5000, 40], kind)
    first.reachable = False
    if not told:
        world.conn(first).client_open = False
        world.sender.flush()
    world.cut(world.link(first))
    world.settle()
    assert all(request.error is None and request in world.finished for request in requests)
    assert sum(len(body) > 1 for request in second.seen for body in request.body) == 5
    assert not first.running


def test_what_was_to_be_written_to_a_server_that_is_gone_is_no_call_of_unknown_fate(world: World) -> None:
    server = world.server("dies")
    world.send()
    calls = give(world, [10, 20], CALL)
    world.kill(server)
    world.sender.gone(server.instance, world.now, taken_over=True)
    world.server("lives")
    world.look_up(TOPIC)
    world.settle()
    assert all(call.outcome is not None for call in calls)


def test_turns_go_on_where_they_were_when_another_server_leaves(world: World) -> None:
    servers = [world.server(name) for name in "abcd"]
    for _ in range(6):
        world.send()
    turns = [len(server.seen) for server in servers]
    last = [server for server, seen in zip(servers, turns, strict=True) if seen == 1]
    assert sorted(turns) == [1, 1, 2, 2]
    servers[0].stop()
    world.look_up(TOPIC)
    world.settle()
    for _ in range(2 - (servers[0] in last)):
        world.send()
    assert all(len(server.seen) == 2 for server in servers[1:])


def test_lost_head_of_the_outbox_does_not_stop_those_behind_it(world: World) -> None:
    """The message whose answer the others wait for was written over two connections, and its server is gone."""
    casts = [world.send(CAST) for _ in range(3)]
    world.advance(2)
    server = world.server("dies")
    server.reads = False
    world.look_up(TOPIC)
    world.settle()
    world.cut(world.link(server))
    world.settle()
    link = world.link(server)
    world.kill(server)
    world.cut(link)
    world.retry(link)
    world.settle()
    assert [request for request, _ in world.lost] == casts[:1]
    world.server("lives")
    world.look_up(TOPIC)
    world.settle()
    assert world.order == [b"2", b"3"]
    world.advance(5)
    assert_clean(world)


def test_abandoned_head_of_the_outbox_does_not_stop_those_behind_it(world: World) -> None:
    casts = [world.send(CAST) for _ in range(3)]
    server = world.server()
    server.reads = False
    world.look_up(TOPIC)
    world.settle()
    world.sender.cancel(casts[0])
    server.reads = True
    world.settle()
    world.advance(5)
    assert world.executed(casts[1]) == world.executed(casts[2]) == 1
    assert_clean(world)


def test_full_graces_are_not_counted_against_other_addresses(world: World) -> None:
    world.send(CAST, Key("ex", "nobody", ""))
    world.server()
    call = world.send()
    cast = world.send(CAST)
    assert call.outcome is not None
    assert cast in world.finished


# Promise 4: another server only when it is certain.


def test_busy_server_is_left_for_another(world: World) -> None:
    busy, idle = world.server("busy"), world.server("idle")
    busy.window = 0
    calls = [world.send() for _ in range(4)]
    assert all(c.outcome is not None and c.outcome.server == idle.instance for c in calls)
    assert world.sender.counts["answers busy"] >= 1
    world.advance(2)
    assert_clean(world)


def test_all_busy_backs_off_and_tries_again(world: World) -> None:
    server = world.server()
    server.window = 0
    call = world.send()
    world.advance(10)
    tries = len(server.seen)
    assert 8 <= tries <= 25, "doubled from 10 ms to a second"
    server.window = 1
    world.advance(1.1)
    assert call.outcome is not None
    assert world.executed(call) == 1
    assert_clean(world)


def test_not_here_goes_to_another_and_has_the_directory_asked(world: World) -> None:
    left, other = world.server("left"), world.server("other")
    other.listed = False
    call = world.submit()
    world.look_up(TOPIC)
    world.sender.lookups.clear()
    left.listening = left.listed = False
    other.listed = True
    world.settle()
    assert call.outcome is not None
    assert call.outcome.server == other.instance
    assert world.sender.counts["answers not_here"] == 1
    world.advance(2)
    assert_clean(world)


def test_directory_that_is_behind_does_not_make_a_storm(world: World) -> None:
    server = world.server()
    server.listening = False
    call = world.send()
    for _ in range(100):
        world.look_up(TOPIC)
        world.settle()
        world.advance(0.1)
    assert len(server.seen) < 40
    server.listening = True
    world.look_up(TOPIC)
    world.advance(2)
    assert call.outcome is not None


def test_stranger_at_the_address_of_a_server_that_the_directory_has_does_not_make_a_storm(world: World) -> None:
    server = world.server("old")
    world.kill(server)
    server.listed = True
    stranger = world.server("new", port=server.node.port, topics=())
    stranger.listed = False
    call = world.send(timeout=20.0)
    for _ in range(100):
        world.look_up(TOPIC)
        world.settle()
        world.advance(0.1)
    assert 10 <= world.sender.counts["answers wrong_instance"] < 40
    stranger.alive = False
    server.alive = server.listening = True
    world.advance(2)
    assert call.outcome is not None
    world.send(timeout=1.0)
    stranger.alive = True
    server.alive = False
    world.cut(world.link(server))
    call = world.send(timeout=5.0)
    world.look_up(TOPIC)
    world.advance(6)
    assert "another process or version answers at its address" in call_error(world, call)
    world.server("other")
    world.look_up(TOPIC)
    assert world.send().outcome is not None
    world.advance(3)
    assert_clean(world)


def test_given_back_calls_go_to_another_server(world: World) -> None:
    stops, other = world.server("stops"), world.server("other")
    other.listed = stops.answers = False
    calls = [world.send() for _ in range(3)]
    world.advance(0.1)
    assert all(c.accepted for c in calls)
    other.listed = True
    world.look_up(TOPIC)
    stops.stop()
    world.settle()
    assert all(c.outcome is not None and c.outcome.server == other.instance for c in calls)
    world.advance(2)
    assert_clean(world)


def test_given_back_casts_go_to_another_server_although_their_caller_has_left(world: World) -> None:
    stops = world.server("stops")
    stops.answers = False
    casts = [world.send(CAST) for _ in range(3)]
    assert world.finished == casts
    assert world.sender.pending == 0
    stops.stop()
    world.settle()
    assert world.sender.pending == 3
    world.advance(100)
    world.server("other")
    world.look_up(TOPIC)
    world.settle()
    assert [world.executed(c) for c in casts] == [1, 1, 1]
    assert world.finished == casts, "each caller is told once"
    world.advance(2)
    assert world.lost == []
    assert_clean(world)


def test_given_back_after_a_cut_is_learnt_when_the_connection_returns(world: World) -> None:
    stops, other = world.server("stops"), world.server("other")
    other.listed = stops.answers = False
    cast, call = world.send(CAST), world.send()
    world.advance(0.1)
    other.listed = True
    world.look_up(TOPIC)
    world.cut(world.link(stops))
    stops.stop()
    world.settle()
    assert world.executed(cast) == world.executed(call) == 1
    assert call.outcome is not None
    world.advance(2)
    assert_clean(world)


def test_given_back_cast_whose_time_is_over_is_lost_with_a_reason() -> None:
    world = World(Limits(time_to_live=10))
    server = world.server()
    server.answers = False
    cast = world.send(CAST)
    world.advance(11)
    assert world.lost == []
    server.stop()
    world.settle()
    world.advance(0.1)
    assert [request for request, _ in world.lost] == [cast]
    assert_clean(world)


def test_queued_requests_go_to_another_server_when_the_connection_fails(world: World) -> None:
    far, near = world.server("far"), world.server("near")
    far.reachable = False
    calls = [world.send() for _ in range(4)]
    assert all(c.outcome is not None and c.outcome.server == near.instance for c in calls)
    assert_clean(world)


def test_server_of_a_name_is_the_only_one_it_goes_to(world: World) -> None:
    world.server("a@x/#1")
    b = world.server("b@x/#1")
    calls = [world.send(key=Key("ex", "t", "b@x/#1")) for _ in range(4)]
    assert all(c.outcome is not None and c.outcome.server == b.instance for c in calls)
    b.stop()
    call = world.send(key=Key("ex", "t", "b@x/#1"), timeout=3.0)
    world.advance(3)
    assert "'b@x/#1'" in call_error(world, call)


def test_idle_servers_take_turns(world: World) -> None:
    servers = [world.server(n) for n in "abc"]
    for _ in range(9):
        world.send()
    assert [len(s.seen) for s in servers] == [3, 3, 3]


def test_turn_goes_on_after_news(world: World) -> None:
    servers = [world.server(n) for n in "abc"]
    for _ in range(9):
        world.send()
        world.look_up(TOPIC)
    assert [len(s.seen) for s in servers] == [3, 3, 3]


# Promise 5: fanout.


def test_fanout_reaches_everybody_once(world: World) -> None:
    servers = [world.server(n) for n in "abc"]
    fanout = world.submit(FANOUT)
    world.look_up(TOPIC)
    world.take_results()
    assert fanout in world.finished, "nobody waits for the slowest"
    assert fanout.error is None
    world.settle()
    assert world.executed(fanout) == 3
    assert [len(s.seen) for s in servers] == [1, 1, 1]
    world.advance(1)
    assert_clean(world)


def test_fanout_with_nobody_returns_at_once(world: World) -> None:
    fanout = world.send(FANOUT)
    assert fanout in world.finished
    assert fanout.error is None
    world.server()
    world.look_up(TOPIC)
    world.settle()
    assert world.executed(fanout) == 0
    assert_clean(world)


def test_fanout_names_those_that_do_not_take_it(world: World) -> None:
    world.server("good")
    stuck = world.server("stuck")
    stuck.reads = False
    fanout = world.send(FANOUT)
    assert fanout in world.finished
    world.advance(301)
    ((_, reason),) = world.lost
    assert "stuck" in reason
    assert world.executed(fanout) == 1
    world.advance(1)
    assert_clean(world)


def test_fanout_tells_of_a_server_that_is_gone(world: World) -> None:
    world.server("good")
    dead = world.server("dead")
    dead.reachable = False
    world.send(FANOUT)
    world.kill(dead)
    world.sender.gone(dead.instance, world.now)
    world.settle()
    ((_, reason),) = world.lost
    assert "dead" in reason
    world.advance(1)
    assert_clean(world)


def test_fanout_to_a_busy_server_is_tried_there_again(world: World) -> None:
    server = world.server()
    server.window = 0
    fanout = world.send(FANOUT)
    world.advance(3)
    assert world.executed(fanout) == 0
    assert world.sender.pending == 1
    server.window = 1
    world.advance(1.1)
    assert world.executed(fanout) == 1
    assert_clean(world)


def test_fanout_to_one_that_has_left_ends(world: World) -> None:
    server = world.server()
    server.answers = False
    world.send(FANOUT)
    server.stop()
    world.settle()
    assert world.sender.pending == 0
    world.advance(2)
    assert_clean(world)


def test_fanout_survives_cuts(world: World) -> None:
    server = world.server()
    server.reads = False
    fanout = world.send(FANOUT)
    world.cut(world.link(server))
    server.reads = True
    world.settle()
    assert world.executed(fanout) == 1
    world.advance(1)
    assert_clean(world)


def answers_of(server: Server) -> list[wire.Answer]:
    """What it writes from now on."""
    written: list[wire.Answer] = []
    write = server.receiver._send

    def note(route: bytes, frames: list[bytes]) -> bool:
        written.append(wire.decode_answer(frames))
        return write(route, frames)

    server.receiver._send = note
    return written


def test_fanouts_that_have_begun_are_acknowledged_together_and_once(world: World) -> None:
    server = world.server()
    answers = answers_of(server)
    fanouts = [world.send(FANOUT) for _ in range(5)]
    assert [world.executed(fanout) for fanout in fanouts] == [1] * 5
    assert answers == []
    assert world.sender.pending == 5
    world.advance(delivery.FANOUT_DELAY)
    assert [(answer.kind, len(answer.ids)) for answer in answers] == [(wire.DONE, 5)]
    assert_clean(world)


def test_fanouts_that_have_not_begun_are_acknowledged_and_then_done(world: World) -> None:
    server = world.server()
    server.answers = False
    answers = answers_of(server)
    world.send(FANOUT)
    world.send(FANOUT)
    server.begin()
    world.advance(delivery.FANOUT_DELAY)
    assert [(answer.kind, answer.ids) for answer in answers] == [(wire.DONE, (1,)), (ACCEPTED, (2,))]
    assert world.sender.pending == 0
    assert list(world.link(server).taken) == [2]
    server.begin()
    world.advance(delivery.FANOUT_DELAY)
    assert [(answer.kind, answer.ids) for answer in answers[2:]] == [(wire.DONE, (2,))]
    assert_clean(world)


def test_a_fanout_that_is_given_back_before_it_was_acknowledged_is_not_acknowledged(world: World) -> None:
    server = world.server()
    server.answers = False
    answers = answers_of(server)
    world.send(FANOUT)
    server.stop()
    world.advance(1)
    assert [answer.kind for answer in answers] == [GIVEN_BACK]
    assert_clean(world)


def test_no_more_fanouts_are_written_than_a_server_begins() -> None:
    world = World(Limits(ahead=3))
    slow, other = world.server("slow"), world.server("other")
    slow.answers = False
    fanouts = [world.send(FANOUT) for _ in range(10)]
    world.advance(1)
    assert [request.id for request in slow.seen] == sorted(request.id for request in slow.seen)
    assert len(slow.seen) == 3
    assert len(other.seen) == 10, "one that is slow does not hold up the others"
    assert all(fanout in world.finished for fanout in fanouts)
    slow.begin()
    slow.begin()
    world.advance(1)
    assert len(slow.seen) == 5
    slow.answers = True
    world.advance(1)
    assert [world.executed(fanout) for fanout in fanouts] == [2] * 10
    assert_clean(world)


def test_fanouts_that_wait_hold_up_nothing_else() -> None:
    world = World(Limits(ahead=3))
    elsewhere = Topic("ex", "elsewhere")
    server = world.server("a", topics=(TOPIC, elsewhere))
    server.answers = False
    for _ in range(5):
        world.send(FANOUT)
    world.send(CALL)
    world.send(FANOUT, Key(*elsewhere, ""))
    assert [request.kind for request in server.seen] == [FANOUT] * 3 + [CALL, FANOUT]
    assert len(world.link(server).held[ANY]) == 2
    server.answers = True
    world.advance(1)
    assert_clean(world)


def test_fanouts_that_wait_survive_a_cut() -> None:
    world = World(Limits(ahead=2))
    server = world.server()
    server.answers = False
    fanouts = [world.send(FANOUT) for _ in range(6)]
    world.cut(world.link(server))
    world.advance(1)
    assert len({request.id for request in server.seen}) == 2
    server.answers = True
    world.advance(1)
    assert [world.executed(fanout) for fanout in fanouts] == [1] * 6
    assert_clean(world)


def test_fanouts_that_wait_for_a_server_that_is_gone_are_told_of() -> None:
    world = World(Limits(ahead=2))
    server = world.server("dead")
    server.answers = False
    for _ in range(6):
        world.send(FANOUT)
    link = world.link(server)
    world.kill(server)
    world.cut(link)
    world.retry(link)
    world.settle()
    assert len(world.lost) == 6
    assert all("dead" in reason for _, reason in world.lost)
    world.advance(1)
    assert_clean(world)


def test_fanouts_that_wait_end_with_their_time() -> None:
    world = World(Limits(ahead=2, time_to_live=5.0))
    server = world.server("stuck")
    server.answers = False
    for _ in range(6):
        world.send(FANOUT)
    world.advance(6)
    assert len(world.lost) == 4
    assert all("stuck" in reason for _, reason in world.lost)
    assert not world.link(server).held


def test_fanout_waits_for_room_in_the_outbox() -> None:
    world = World(Limits(outbox_messages=3))
    servers = [world.server(n) for n in "ab"]
    for server in servers:
        server.reachable = False
    first = world.send(FANOUT)
    assert first in world.finished
    second = world.send(FANOUT)
    assert second not in world.finished
    world.advance(5)
    assert second not in world.finished
    for server in servers:
        server.reachable = True
    world.settle()
    world.advance(0.2)
    assert second in world.finished
    assert second.error is None
    assert world.executed(first) == world.executed(second) == 2
    world.advance(1)
    assert_clean(world)


def test_fanout_raises_when_the_outbox_stays_full() -> None:
    world = World(Limits(outbox_messages=3))
    for name in "ab":
        world.server(name).reachable = False
    world.send(FANOUT)
    fanout = world.send(FANOUT)
    world.advance(11.1)
    assert isinstance(fanout.error, MessageDeliveryFailure)
    assert "outbox is full" in str(fanout.error)
    world.advance(300)
    assert_clean(world)


def test_fanout_behind_casts_that_wait_does_not_spin() -> None:
    """It waited for room behind a cast of the same topic, and there is room before the cast can go."""
    world = World(Limits(outbox_messages=2))
    server = world.server()
    server.window = 0
    other = Key("ex", "other", "")
    for _ in range(2):
        world.send(CAST, other)
    world.advance(1.5)
    assert world.sender.pending == 2
    world.send(CAST)
    fanout = world.send(FANOUT)
    world.advance(0.2)
    world.server("o", topics=[Topic("ex", "other")])
    world.look_up(Topic("ex", "other"))
    world.advance(5)
    server.window = 100
    world.advance(10)
    assert world.executed(fanout) == 1


def test_fanout_waits_for_the_directory_and_goes_on_in_the_outbox(world: World) -> None:
    world.directory = "down"
    fanout = world.send(FANOUT)
    world.advance(1.1)
    assert fanout in world.finished
    assert fanout.error is None
    assert world.sender.pending == 1
    world.directory = None
    world.server()
    world.look_up(TOPIC)
    world.settle()
    assert world.executed(fanout) == 1
    world.advance(1)
    assert_clean(world)


# Promise 7: required.


def test_cast_that_was_not_begun_in_time_says_so_and_its_server_stays_known(world: World) -> None:
    server = world.server()
    server.answers = False
    world.send(CAST)
    world.now += Limits().time_to_live + 1
    server.begin()
    world.settle_frames()
    world.take_results()
    ((_, reason),) = world.lost
    assert "did not begin it in time" in reason
    assert world.table.nodes(ANY) == [server.node]


def test_who_was_refused_is_not_undeliverable_before_the_directory_has_said_so(world: World) -> None:
    """What a listener that restarts refuses may be heard of when it is registered again."""
    server = world.server()
    world.send()
    server.listening = False
    calls = [world.submit(required=True) for _ in range(2)]
    while world.conn(server).up:
        world.deliver_up(world.conn(server))
    server.listening = True
    world.settle()
    world.advance(delivery.BUSY_FIRST)
    assert [call.error for call in calls] == [None, None]
    assert [world.executed(call) for call in calls] == [1, 1]
    assert_clean(world)


@pytest.mark.parametrize("kind", [CALL, CAST, FANOUT])
def test_required_with_nobody_fails_at_once(world: World, kind: int) -> None:
    request = world.send(kind, required=True)
    assert isinstance(request.error, MessageUndeliverable)
    assert request.error.exchange == "ex"
    assert request.error.routing_key == "t"
    assert request in world.finished
    assert_clean(world)


@pytest.mark.parametrize("kind", [CALL, CAST, FANOUT])
def test_required_with_nobody_fails_at_once_although_others_wait(world: World, kind: int) -> None:
    world.send(CAST)
    world.send(CALL)
    request = world.send(kind, required=True)
    assert isinstance(request.error, MessageUndeliverable)


def test_required_that_outlived_its_caller_is_kept_for_whoever_appears(world: World) -> None:
    cast = world.submit(CAST, required=True)
    world.sender.lookups.clear()  # a directory that takes long
    world.now += 1.5
    world.tick()
    world.look_up(TOPIC)
    world.take_results()
    assert world.finished == [cast]
    assert cast.error is None
    world.server()
    world.look_up(TOPIC)
    world.settle()
    assert world.executed(cast) == 1
    world.advance(1)
    assert_clean(world)


@pytest.mark.parametrize("kind", [CALL, CAST, FANOUT])
def test_required_with_a_server_is_delivered(world: World, kind: int) -> None:
    world.server()
    request = world.send(kind, required=True)
    assert request.error is None
    assert world.executed(request) == 1


def test_required_to_a_server_of_a_name(world: World) -> None:
    world.server("a")
    request = world.send(CAST, Key("ex", "t", "b"), required=True)
    assert isinstance(request.error, MessageUndeliverable)
    assert request.error.routing_key == "t.b"


# The directory does not answer.


def test_unknown_topic_and_no_directory(world: World) -> None:
    world.directory = "it is on fire"
    call, required, cast = world.send(), world.send(CAST, required=True), world.send(CAST)
    for request in (call, required):
        assert isinstance(request.error, DirectoryError)
        assert "on fire" in str(request.error)
    assert cast not in world.finished
    world.advance(2)
    assert cast in world.finished
    assert cast.error is None
    world.directory = None
    world.server()
    world.look_up(TOPIC)
    world.settle()
    assert world.executed(cast) == 1
    world.advance(1)
    assert_clean(world)


def test_known_servers_are_used_without_the_directory(world: World) -> None:
    world.server()
    world.send()
    world.directory = "down"
    world.look_up(TOPIC)
    assert world.send().outcome is not None


def test_cast_with_retries_says_that_the_directory_failed(world: World) -> None:
    world.directory = "down"
    cast = world.send(CAST, retry=0)
    world.advance(1.1)
    assert "directory does not answer (down)" in call_error(world, cast)


# Promise 8: call_monitor.


def test_heartbeats_keep_a_call_alive_and_their_absence_ends_it(world: World) -> None:
    server = world.server()
    server.answers = False
    call = world.send(timeout=1000.0, monitor=10.0)
    record = server.jobs[0][0]
    assert record.monitor == 10.0
    server.begin()
    for _ in range(10):
        world.advance(9)
        assert call not in world.finished
        server.receiver.heartbeat(record)
        server.flush()
        world.settle()
    world.advance(9.9)
    assert call not in world.finished
    world.advance(0.2)
    assert isinstance(call.error, MessagingTimeout)
    assert "No heartbeat" in str(call.error)
    assert "10 s" in str(call.error)
    assert_clean(world)


def test_heartbeat_takes_the_place_of_the_acknowledgement(world: World) -> None:
    server = world.server()
    server.answers = False
    call = world.send(monitor=10.0)
    record = server.jobs[0][0]
    server.begin()
    server.receiver.heartbeat(record)
    server.flush()
    assert answers_to(world, server) == [wire.HEARTBEAT]
    world.settle()
    assert call.accepted
    world.now += 1
    server.tick()
    assert answers_to(world, server) == []
    server.work()
    server.receiver.heartbeat(record)  # the server's timer may be late
    server.flush()
    assert answers_to(world, server) == [REPLY]


def test_call_ends_at_its_deadline_whatever_heartbeats_say(world: World) -> None:
    server = world.server()
    server.answers = False
    call = world.send(timeout=5.0, monitor=10.0)
    record = server.jobs[0][0]
    server.begin()
    for _ in range(6):
        server.receiver.heartbeat(record)
        server.flush()
        world.settle()
        world.advance(1)
    assert isinstance(call.error, MessagingTimeout)
    assert "accepted" in str(call.error)


# Cancelling and closing.


@pytest.mark.parametrize("state", ["unknown", "nobody", "connecting", "down", "busy", "written", "accepted"])
@pytest.mark.parametrize("kind", [CALL, CAST])
def test_cancel_leaves_nothing_behind(world: World, state: str, kind: int) -> None:
    server = world.server()
    server.answers = False
    if state == "nobody":
        server.listed = False
    if state == "down":
        server.reachable = False
    if state == "busy":
        server.window = 0
    if state == "written":
        server.reads = False
    request = world.submit(kind)
    if state == "connecting":
        world.sender.lookups.clear()
        world.look_up(TOPIC)
    elif state != "unknown":
        world.settle()
    if state == "accepted":
        world.advance(0.1)
    world.sender.cancel(request)
    world.sender.cancel(request)
    world.sender.lookups.clear()
    server.reads = server.reachable = server.answers = True
    server.window = 10
    world.settle()
    world.advance(3)
    assert world.finished == ([] if (kind, state) != (CAST, "accepted") else [request])
    assert_clean(world)


def test_close_ends_everything() -> None:
    world = World()
    a = world.server("a")
    a.answers = False
    b = world.server("b", topics=[Topic("ex", "far")])
    b.reachable = False
    far = Key("ex", "far", "")
    requests = [
        world.send(),
        world.send(CALL, far),
        world.send(CAST, far),
        world.send(CALL, Key("ex", "nobody", "")),
        world.send(CAST, Key("ex", "nobody", "")),
    ]
    kept = world.send(CAST, far)
    world.advance(0.5)
    assert world.finished == []
    world.sender.close(world.now)
    world.take_results()
    for request in [*requests, kept]:
        assert isinstance(request.error, TransportClosed)
        assert "closed" in str(request.error)
    assert set(world.finished) == {*requests, kept}
    assert left_over(world.sender, "_links", "_routes", "wanted", "_draining") == {}


def test_close_tells_what_was_left_in_the_outbox(world: World) -> None:
    cast = world.send(CAST)
    world.advance(2)
    assert world.finished == [cast]
    world.sender.close(world.now)
    world.take_results()
    ((lost, reason),) = world.lost
    assert lost is cast
    assert "closed" in reason
    assert world.sender.pending == 0


def test_topic_that_is_unknown_is_asked_for_by_whoever_needs_it(world: World) -> None:
    server = world.server()
    server.answers = False
    world.send(timeout=900.0)
    world.sender.forget(TOPIC)
    server.window = 0
    world.kill(server)
    world.sender.lookups.clear()
    link = world.link(server)
    world.conn(server).down.append(wire.encode_answer(BUSY, server.instance, (1,)))
    world.deliver_down(world.conn(server))
    assert link.idle
    assert list(world.sender.lookups) == [TOPIC]


def test_fanout_that_was_not_begun_in_time_is_not_lost_in_silence() -> None:
    world = World(Limits(time_to_live=5.0))
    server = world.server()
    server.answers = False
    world.send(FANOUT)
    world.now += 6
    server.begin()
    world.settle()
    ((_, reason),) = world.lost
    assert "did not begin it" in reason
    assert str(server.node) in reason
    world.advance(10)
    assert_clean(world)


@pytest.mark.parametrize("kind", [CALL, FANOUT])
def test_held_for_news_ends_in_time_all_the_same(world: World, kind: int) -> None:
    world.look_up(TOPIC)
    request = Outgoing(kind, ANY, wire.JSON, [b"1"], timeout=0.5, required=kind == CALL)
    world.sender.submit(request, world.now, hold=True)
    world.sender.lookups.clear()
    world.now += 1.5
    world.tick()
    world.take_results()
    assert request in world.finished
    assert (kind == CALL) == isinstance(request.error, MessagingTimeout)


def test_held_for_news_has_the_news(world: World) -> None:
    world.look_up(TOPIC)
    request = Outgoing(CALL, ANY, wire.JSON, [b"1"], timeout=9.0, required=True)
    world.server()
    world.sender.submit(request, world.now, hold=True)
    world.settle()
    assert request.outcome is not None
    gone = Outgoing(CALL, ANY, wire.JSON, [b"2"], timeout=9.0, required=True)
    world.servers[0].listed = False
    world.sender.submit(gone, world.now, hold=True)
    world.look_up(TOPIC)
    world.settle()
    assert isinstance(gone.error, MessageUndeliverable)
    world.advance(1)
    assert_clean(world)


# Promise 9: nothing grows.


def test_instances_that_are_gone_are_forgotten(world: World) -> None:
    for n in range(20):
        server = world.server("s", port=7000)
        world.look_up(TOPIC)
        assert world.send().outcome is not None
        cast = world.send(CAST)
        world.advance(1)
        link = world.link(server)
        world.kill(server)
        world.cut(link)
        world.settle()
        assert world.executed(cast) == 1
        assert len(world.sender._links) <= 1, n
    world.advance(2)
    assert world.sender._links == {}
    assert_clean(world)


def test_connections_of_servers_that_left_are_dropped(world: World) -> None:
    server = world.server()
    world.send()
    link = world.link(server)
    server.stop()
    world.look_up(TOPIC)
    assert world.sender._links == {}
    assert world.sender.dropped == [link]
    world.settle()
    assert world.conns == {}


def test_connections_that_are_needed_outlast_the_directory(world: World) -> None:
    server = world.server()
    server.answers = False
    call = world.send()
    link = world.link(server)
    server.listed = False
    world.look_up(TOPIC)
    assert (world.sender.dropped, link.topics) == ([], set())
    server.answers = True
    world.settle()
    assert call.outcome is not None
    # The owner closes it once it sees that it is idle.
    assert link.idle
    world.conns.pop(link)
    world.sender.closed(link)
    assert world.sender._links == {}


def test_connections_are_kept_as_long_as_one_topic_lists_their_server(world: World) -> None:
    second = Topic("ex", "second")
    server = world.server(topics=[TOPIC, second])
    world.send()
    world.send(key=Key("ex", "second", ""))
    link = world.link(server)
    server.topics = {second}
    world.look_up(TOPIC)
    assert (world.sender.dropped, link.topics) == ([], {second})
    server.topics = set()
    world.look_up(second)
    assert world.sender.dropped == [link]


def test_link_that_is_forgotten_is_listed_nowhere(world: World) -> None:
    """So that a connection that is still being tried is closed, also if another process has taken that address."""
    server, other = world.server("old"), world.server("other")
    world.send(key=Key("ex", "t", "old"))
    link = world.link(server)
    world.kill(server)
    world.sender.disconnected(link, world.now)
    other.listed = True
    world.look_up(TOPIC)
    assert server.instance not in world.sender._links
    assert link.topics == set()


def test_forgetting_a_topic_says_nothing_of_its_servers(world: World) -> None:
    server = world.server()
    world.send()
    link = world.link(server)
    world.sender.forget(TOPIC)
    assert (world.sender.dropped, link.topics) == ([], {TOPIC})
    server.stop()
    world.look_up(TOPIC)
    assert world.sender.dropped == [link]


def test_who_cannot_be_reached_is_forgotten_with_the_last_topic_that_leads_there(world: World) -> None:
    """His connection is tried for as long as his link has topics."""
    server = world.server()
    world.send()
    link = world.link(server)
    world.cut(link)
    assert link.topics == {TOPIC}
    world.sender.forget(TOPIC)
    assert link.topics == set()


def test_timeout_says_why_there_was_no_connection(world: World) -> None:
    server = world.server()
    server.reachable = False
    call = world.submit(timeout=5.0)
    world.settle()
    world.link(server).trouble = "the name cannot be resolved"
    world.advance(6)
    assert ": the name cannot be resolved" in call_error(world, call)


def test_old_link_does_not_take_the_new_one_of_its_instance_with_it(world: World) -> None:
    """A process that was taken for gone and is back has a new link, while the old one's connection still closes."""
    server = world.server()
    world.send()
    old = world.link(server)
    world.sender.gone(server.instance, world.now, taken_over=True)
    world.look_up(TOPIC)
    world.send()
    new = world.link(server)
    assert new is not old
    world.sender.closed(old)
    assert world.sender._links.get(server.instance) is new


def test_addresses_without_a_server_are_forgotten(world: World) -> None:
    world.server()
    for n in range(100):
        world.send(CALL, Key("ex", "t", f"nobody-{n}"), timeout=1.0)
        world.advance(2)
    world.look_up(TOPIC)
    assert len(world.sender._routes) < 50


def test_error_texts_make_no_links(world: World) -> None:
    """Looking what is known of servers must not leave anything behind."""
    good = world.server("good")
    good.reachable = False
    old = world.server("old")
    old.node = old.node._replace(wire=wire.VERSION + 1)
    world.send(timeout=1.0)
    world.advance(2)
    assert old.instance not in world.sender._links


def test_floor_moves_with_what_is_open(world: World) -> None:
    server = world.server()
    for _ in range(50):
        world.send()
    (peer,) = server.receiver._peers.values()
    assert len(peer.records) <= 2
    server.answers = False
    world.send(CAST)
    for _ in range(5):
        world.send()
    assert server.seen[-1].floor == 51, "a cast that may be given back is still open"
