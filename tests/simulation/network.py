# SPDX-License-Identifier: Apache-2.0
"""A simulated network with the manners of TCP and libzmq: connections that are cut, stall, or die at one end only.

What is on its way in one direction of a connection arrives in order, or not at all. Between connections there is no order. An
end that has closed may leave behind what still arrives, much later, at the other.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import zmq

from tests.simulation.clock import Clock

if TYPE_CHECKING:
    from tests.simulation.process import Loop, Process

_UP = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
_REFUSED = int(zmq.EVENT_CLOSED)
_LOST = int(zmq.EVENT_DISCONNECTED)
_NO_HANDSHAKE = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
# As in green_zmq.connections: connecting must be done in this time.
_HANDSHAKE = 5.0
# Answers that a ROUTER holds for one connection.
_HELD = 10_000


class Socket:
    """A DEALER, a ROUTER or a monitor: what its owner has not read yet."""

    def __init__(self, loop: Loop, kind: int) -> None:
        self.loop = loop
        self.kind = kind
        self.inbox: deque[list[bytes]] = deque()
        self.closed = False
        self.connection: Connection | None = None
        self.monitor: Socket | None = None

    def set(self, option: int, value: int) -> None: ...

    def disable_monitor(self) -> None:
        self.monitor = None

    def connect(self, address: str) -> None:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self.loop.process.world.network.connect(self, host, int(port))

    def arrive(self, frames: list[bytes]) -> None:
        if not self.closed:
            self.inbox.append(frames)
            self.loop.wake()

    def tell(self, event: int) -> None:
        if self.monitor is not None:
            self.monitor.arrive([struct.pack("=hi", event, 0), b""])


class Stream:
    """One direction of a connection."""

    def __init__(self, network: Network, source: Process, target: Process, arrive: Callable[[list[bytes]], None]) -> None:
        self.network = network
        self.source = source
        self.target = target
        self.arrive = arrive
        self.moving: deque[tuple[float, list[bytes] | None]] = deque()
        self.last = 0.0
        self.over = False
        self.ended: Callable[[], None] | None = None

    @property
    def blocked(self) -> bool:
        return self.target.paused or self.network.lost(self.source.host, self.target.host)

    def send(self, frames: list[bytes] | None) -> None:
        """None: the end."""
        if self.over:
            return
        clock = self.network.clock
        self.last = max(self.last, clock.now + self.network.delay())
        self.moving.append((self.last, frames))
        clock.at(self.last, self.pump)

    def pump(self) -> None:
        now = self.network.clock.now
        while self.moving and self.moving[0][0] <= now and not self.blocked:
            _, frames = self.moving.popleft()
            if frames is None:
                self.drop(0)
                if self.ended is not None:
                    self.ended()
            elif self.target.alive:
                self.arrive(frames)

    def drop(self, keep: int) -> None:
        """What is on its way is lost, but for so many of the first; nothing follows."""
        self.over = True
        while len(self.moving) > keep:
            self.moving.pop()

    def repeat(self) -> None:
        """The latest message arrives twice."""
        if self.moving and not self.over:
            self.send(self.moving[-1][1])


class Connection:
    """A TCP connection between a DEALER and a ROUTER; each end knows only what it has heard."""

    def __init__(self, network: Network, dealer: Socket, server: Process) -> None:
        self.network = network
        self.dealer = dealer
        self.client, self.server = dealer.loop.process, server
        self.route = network.clock.random.randbytes(5)
        self.client_open = self.server_open = True
        assert server.router is not None
        router = server.router
        self.up = Stream(network, self.client, server, lambda frames: router.arrive(self, frames))
        self.down = Stream(network, server, self.client, dealer.arrive)
        self.up.ended = self.server_ends
        self.down.ended = self.client_ends
        router.routes[self.route] = self

    def client_ends(self) -> None:
        """The client notices that it is over."""
        if self.client_open:
            self.client_open = False
            self.dealer.tell(_LOST)
            self.network.forget(self)

    def server_ends(self) -> None:
        """The server notices, or is no more; what it has received stays to be read."""
        if self.server_open:
            self.server_open = False
            if self.server.router is not None:
                self.server.router.routes.pop(self.route, None)
            self.network.forget(self)

    def close(self) -> None:
        """The client closes it: with what is on its way delivered first, or not."""
        if self.client_open:
            self.client_open = False
            self.down.drop(0)
            self.shorten(self.up)
            self._tell_end(self.up)

    def cut(self) -> None:
        """It is reset in the middle: some of what is on its way still arrives, at each end."""
        for stream in (self.up, self.down):
            self.shorten(stream)
            self._tell_end(stream)

    def shorten(self, stream: Stream) -> None:
        random = self.network.clock.random
        stream.drop(random.choice((0, random.randrange(len(stream.moving) + 1), len(stream.moving))))

    def _tell_end(self, stream: Stream) -> None:
        stream.over = False
        stream.send(None)
        stream.over = True

    def half_open(self) -> None:
        """One end has lost it and the other will not hear of it, but by its heartbeats."""
        random = self.network.clock.random
        if random.random() < 0.5:
            self.down.drop(0)
            self.shorten(self.up)  # it may still come, late
            later = random.uniform(0.1, 8)
            for i, (when, frames) in enumerate(self.up.moving):
                self.up.moving[i] = (when + later, frames)
                self.network.clock.at(when + later, self.up.pump)
            self.client_ends()
            self.watch()
        else:
            self.lose_client()

    def lose_client(self) -> None:
        """The server has lost it, and the client will not hear of it."""
        self.up.drop(0)
        self.shorten(self.down)
        self.server_ends()
        self.watch()

    def watch(self) -> None:
        """Something may be in its way: each end gives up if that lasts for three heartbeats."""
        wait = self.network.heartbeat * self.network.clock.random.uniform(2, 3)
        self.network.clock.after(wait, self._look)

    def _look(self) -> None:
        silent_up = self.up.blocked or not self.client_open or self.client.paused or not self.client.alive
        silent_down = self.down.blocked or not self.server_open or self.server.paused or not self.server.alive
        if self.client_open and (silent_up or silent_down) and not self.client.paused:
            self.client_ends()
            self._leave(self.up)
        if self.server_open and silent_up and not self.server.paused:
            self.server_ends()
            self._leave(self.down)
        if (self.client_open and self.client.paused) or (self.server_open and self.server.paused):
            self.watch()  # who stands still notices when it goes on

    def _leave(self, stream: Stream) -> None:
        """An end has given up: what it had sent may still arrive, when it can, and then the end."""
        if self.network.clock.random.random() < 0.5:
            stream.drop(0)
        self._tell_end(stream)


class Network:
    """
    :ivar heartbeat: seconds between two heartbeats of a connection.
    :ivar slow: the most seconds that a message takes.
    """

    def __init__(self, clock: Clock, heartbeat: float) -> None:
        self.clock = clock
        self.heartbeat = heartbeat
        self.slow = 0.001
        self.connections: dict[Connection, None] = {}
        self.listening: dict[tuple[str, int], Process] = {}
        self._parted: dict[tuple[str, str], int] = {}
        self._left: dict[Connection, None] = {}

    def delay(self) -> float:
        return self.slow * (0.05 + self.clock.random.random())

    def lost(self, source: str, target: str) -> bool:
        """Whether what goes that way is lost; it is sent again until it is not."""
        return bool(self._parted.get((source, target)))

    def part(self, source: str, target: str) -> None:
        """From now on nothing gets from one host to the other."""
        self._parted[source, target] = self._parted.get((source, target), 0) + 1
        for connection in self.connections:
            if {connection.client.host, connection.server.host} == {source, target}:
                connection.watch()

    def join(self, source: str, target: str) -> None:
        self._parted[source, target] = max(0, self._parted.get((source, target), 0) - 1)
        self.pump()

    def heal(self) -> None:
        self._parted.clear()
        self.pump()

    def pump(self) -> None:
        """What was held up goes on; what closed connections have left behind maybe later than what new ones carry."""
        for connection in [*self._left, *self.connections]:
            for stream in (connection.up, connection.down):
                if connection in self._left:
                    self.clock.after(self.clock.random.uniform(0, 5), stream.pump)
                else:
                    stream.pump()
        self._left = {c: None for c in self._left if c.up.moving or c.down.moving}

    def forget(self, connection: Connection) -> None:
        if not connection.client_open and not connection.server_open and self.connections.pop(connection, 0) is None:
            self._left[connection] = None

    def of(self, process: Process) -> list[Connection]:
        return [connection for connection in self.connections if process in (connection.client, connection.server)]

    def connect(self, dealer: Socket, host: str, port: int) -> None:
        self.clock.after(self.delay(), self._arrived, dealer, host, port, self.clock.now)

    def _arrived(self, dealer: Socket, host: str, port: int, since: float) -> None:
        """The first packet is there, if it is not lost; else it is sent again and again."""
        client = dealer.loop.process
        server = self.listening.get((host, port))
        if dealer.closed or not client.alive:
            return
        lost = self.lost(client.host, host) or self.lost(host, client.host)
        if lost or (server is not None and server.paused):
            if since + _HANDSHAKE <= self.clock.now:
                dealer.tell(_REFUSED if lost else _NO_HANDSHAKE)
            else:
                self.clock.after(0.2, self._arrived, dealer, host, port, since)
        elif server is None or server.router is None:
            self.clock.after(self.delay(), dealer.tell, _REFUSED)
        else:
            connection = dealer.connection = Connection(self, dealer, server)
            self.connections[connection] = None
            self.clock.after(self.delay(), self._stands, connection)

    def _stands(self, connection: Connection) -> None:
        """The server's half of the handshake is there; unless the client has given up, whereof the server hears."""
        if connection.dealer.closed or not connection.client.alive:
            connection.close()
        elif connection.client_open:
            connection.dealer.tell(_UP)

    def died(self, process: Process) -> None:
        """Its kernel ends its connections."""
        for connection in self.of(process):
            if connection.client is process:
                connection.client_open = False
                connection.down.drop(0)
                connection.shorten(connection.up)
                connection._tell_end(connection.up)
            else:
                connection.server_ends()
                connection.up.drop(0)
                connection.shorten(connection.down)
                connection._tell_end(connection.down)

    def held(self, connection: Connection) -> bool:
        return len(connection.down.moving) < _HELD


class Router:
    """What a process is reached at, with the interface of green_zmq.router.Router."""

    def __init__(self, process: Process) -> None:
        self.due = float("inf")
        self.counts: Counter[str] = Counter()
        self.on_message: Callable[[list[bytes]], None] = lambda _: None
        self.routes: dict[bytes, Connection] = {}
        self._process = process
        self._socket: Socket | None = None

    def open(self) -> tuple[str, int]:
        process = self._process
        self._socket = process.loop.open(zmq.ROUTER, self.on_message)
        process.router = self
        process.world.network.listening[process.host, process.port] = process
        return process.host, process.port

    def arrive(self, connection: Connection, frames: list[bytes]) -> None:
        if self._socket is not None:
            self._socket.arrive([connection.route, *frames])

    def write(self, route: bytes, frames: list[bytes]) -> bool:
        connection = self.routes.get(route)
        if self._socket is None or connection is None or not self._process.world.network.held(connection):
            return False
        connection.down.send(frames)
        return True

    def close(self, linger: float) -> None:
        process = self._process
        process.world.network.listening.pop((process.host, process.port), None)
        if self._socket is not None:
            process.loop.close(self._socket, 0)
            self._socket = None
        for connection in list(self.routes.values()):
            connection.server_ends()
            connection._tell_end(connection.down)
        process.router = None


def closed(socket: Socket) -> None:
    """Its owner closes it."""
    socket.closed = True
    socket.inbox.clear()
    if socket.connection is not None:
        socket.connection.close()
