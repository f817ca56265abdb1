# SPDX-License-Identifier: Apache-2.0
"""The sockets: the ROUTER that a process is reached at, and the pool of its connections to others.

The pool has one DEALER to each process that something is sent to. Made at the first send, used by every caller, closed
when idle for long, when the process is gone, or as the least recently used above a limit. All of it runs in the loop's
thread.

Reconnecting is ours, not libzmq's: after a loss the socket is read empty, closed, and replaced after a growing time. So
it is always known what was written to which connection, and nothing written to a dead one surfaces later.
"""

from __future__ import annotations

import errno
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from green_zmq.config import Settings
from green_zmq.delivery import Link, Sender
from green_zmq.errors import AddressError, WireError, WireVersionError
from green_zmq.loop import Loop, OnMessage, Socket
from green_zmq.routing import Node
from green_zmq.wire import VERSION, decode_answer

LOG = logging.getLogger(__name__)

# Times between two attempts to connect: doubled from the first to the most, each with a random part of half of it.
_RETRY_FIRST: Final = 0.05
_RETRY_MOST: Final = 10.0
# TCP and ZMTP handshake together must be done in this time.
_HANDSHAKE: Final = 5.0
# libzmq is not to reconnect by itself; but with -1 it drops what has arrived and was not read when the peer closes.
_NEVER: Final = 2**31 - 1
_IDLE_LOOK: Final = 5.0
# What a frame may have beyond the limit of a message: the header and the address.
_OVERHEAD: Final = 1 << 18
# Answers that libzmq holds for one connection that does not read; further ones are dropped, and asked for again.
_ANSWERS_HELD: Final = 10_000
# Connections that may wait to be accepted: a service of 500 nodes comes back at once.
_BACKLOG: Final = 1024

_UP: Final = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
_DOWN: Final = int(
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

# Monitors need an address of their own each, in the context that all loops of the process share.
_monitors = itertools.count()


class Router:
    """The socket that a process is reached at, once it listens."""

    def __init__(self, loop: Loop, settings: Settings, on_message: OnMessage) -> None:
        self._loop = loop
        self._settings = settings
        self._on_message = on_message
        self._socket: Socket | None = None

    def open(self) -> int:
        """Listen; the port.

        :raises AddressError: there is no such address, or no free port.
        """
        settings = self._settings
        socket = self._loop.open(zmq.ROUTER, self._on_message)
        for option, value in (
            (zmq.LINGER, int(settings.linger * 1000)),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.SNDHWM, _ANSWERS_HELD),
            (zmq.MAXMSGSIZE, settings.limits.message_bytes + _OVERHEAD),
            (zmq.IPV6, int(":" in settings.bind_address)),
            (zmq.BACKLOG, _BACKLOG),
        ):
            socket.set(option, value)
        try:
            port = self._bind(socket)
        except BaseException:
            self._loop.close(socket, 0)
            raise
        self._socket = socket
        self._loop.watch(socket)
        return port

    def write(self, route: bytes, frames: list[bytes]) -> bool:
        """Whether it could be written; if not, it is kept where it matters, and the sender asks for it when it is back."""
        return self._socket is not None and self._loop.send(self._socket, [route, *frames])

    def close(self, linger: float) -> None:
        if self._socket is not None:
            self._loop.close(self._socket, linger)
            self._socket = None

    def _bind(self, socket: Socket) -> int:
        """Bind to some port of the range: a random one first, so that processes do not queue for the same."""
        settings = self._settings
        address = f"[{settings.bind_address}]" if ":" in settings.bind_address else settings.bind_address
        count = settings.max_port - settings.min_port
        start = random.randrange(count)
        for i in range(count):
            port = settings.min_port + (start + i) % count
            try:
                socket.bind(f"tcp://{address}:{port}")
            except zmq.ZMQError as error:
                if error.errno != errno.EADDRINUSE:
                    raise AddressError(
                        f"Cannot listen on {address}:{port}: {error}. "
                        "rpc_zmq_bind_address must be an address or network interface of this host, or *."
                    ) from error
                if i % 100 == 99:
                    self._loop.model.pause()
            else:
                return port
        ports = f"port {start + settings.min_port} is" if count == 1 else f"all {count} ports from {settings.min_port} on are"
        raise AddressError(
            f"Cannot listen on {address}: {ports} in use. Widen rpc_zmq_min_port and rpc_zmq_max_port, or end who has them."
        )


class _Connection:
    """A link's DEALER and its monitor; neither while it waits for its next attempt."""

    __slots__ = ("attempts", "connecting_until", "dealer", "link", "monitor", "retry_at", "used")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.dealer: Socket | None = None
        self.monitor: Socket | None = None
        self.attempts = 0
        self.retry_at = inf
        self.used = 0.0


class Connections:
    def __init__(self, loop: Loop, sender: Sender, settings: Settings, now: Callable[[], float]) -> None:
        self.counts: Counter[str] = Counter()
        self.due = inf
        self._loop = loop
        self._sender = sender
        self._settings = settings
        self._now = now
        self._connections: dict[Link, _Connection] = {}
        self._complained: Counter[str] = Counter()

    @property
    def open(self) -> int:
        return sum(connection.dealer is not None for connection in self._connections.values())

    def want(self, link: Link) -> None:
        """Something waits to be sent there. Connects, or lets the attempt that is due anyway do it."""
        connection = self._connections.get(link)
        if connection is None:
            connection = self._connections[link] = _Connection(link)
            self._make_room()
        if connection.dealer is None and connection.retry_at == inf:
            self._connect(connection)

    def write(self, link: Link, frames: list[bytes]) -> None:
        connection = self._connections.get(link)
        if connection is None or connection.dealer is None:
            return  # lost in this very round: what is open is written again over the next one
        connection.used = self._now()
        self._loop.send(connection.dealer, frames)

    def drop(self, link: Link) -> None:
        """That process is gone for good."""
        connection = self._connections.pop(link, None)
        if connection is not None:
            self._close(connection, 0)

    def tick(self, now: float) -> None:
        """Attempts that are due, and connections that were idle for long."""
        for connection in list(self._connections.values()):
            link = connection.link
            if connection.retry_at <= now:
                if link.idle and not self._sender.awaited():
                    self._retire(connection)
                else:
                    self._connect(connection)
            elif link.idle and connection.dealer is not None and connection.used + self._settings.idle_timeout <= now:
                self.counts["connections closed: idle"] += 1
                self._retire(connection)
        self._set_due(now)

    def close(self, linger: float) -> None:
        for connection in self._connections.values():
            self._close(connection, linger)
        self._connections.clear()

    def _set_due(self, now: float) -> None:
        self.due = min((c.retry_at for c in self._connections.values()), default=inf)
        if self._connections:
            self.due = min(self.due, now + min(_IDLE_LOOK, self._settings.idle_timeout))

    def _make_room(self) -> None:
        """Above the limit the least recently used connection that nothing needs is closed; if all are needed, none."""
        if len(self._connections) <= self._settings.max_connections:
            return
        unneeded = [c for c in self._connections.values() if c.link.idle and c.dealer is not None]
        if unneeded:
            self.counts["connections closed: over the limit"] += 1
            self._retire(min(unneeded, key=lambda connection: connection.used))

    def _retire(self, connection: _Connection) -> None:
        del self._connections[connection.link]
        self._close(connection, self._settings.linger)
        self._sender.closed(connection.link)

    def _connect(self, connection: _Connection) -> None:
        node = connection.link.node
        connection.retry_at = inf
        connection.used = self._now()
        self.counts["connections attempted"] += 1
        try:
            self._open(connection, node)
        except zmq.ZMQError as error:
            self._close(connection, 0)
            if error.errno == errno.EMFILE:
                self._complain(
                    "descriptors",
                    "out of descriptors: no connection to %s can be made; raise the limit of open files "
                    "(ulimit -n, LimitNOFILE=), each peer takes 4",
                    node,
                )
            else:
                self._complain(node.address, "no connection to %s can be made: %s", node, error)
            self._lost(connection)
        self._set_due(self._now())

    def _open(self, connection: _Connection, node: Node) -> None:
        settings = self._settings
        dealer = self._loop.open(zmq.DEALER, partial(self._on_message, connection))
        connection.dealer = dealer
        milliseconds = int(settings.heartbeat * 1000)
        for option, value in (
            (zmq.LINGER, int(settings.linger * 1000)),
            (zmq.SNDHWM, 0),  # what is unanswered is bounded; a message that libzmq refuses would have to be kept as well
            (zmq.IPV6, 1),
            (zmq.MAXMSGSIZE, settings.limits.message_bytes + _OVERHEAD),
            (zmq.RECONNECT_IVL, _NEVER),
            (zmq.CONNECT_TIMEOUT, int(_HANDSHAKE * 1000)),
            (zmq.HANDSHAKE_IVL, int(_HANDSHAKE * 1000)),
            (zmq.HEARTBEAT_IVL, milliseconds),
            (zmq.HEARTBEAT_TIMEOUT, milliseconds * 2),
            (zmq.HEARTBEAT_TTL, milliseconds * 3),
        ):
            dealer.set(option, value)
        address = f"inproc://green_zmq/monitor/{next(_monitors)}"
        dealer.monitor(address, _UP | _DOWN)
        monitor = self._loop.open(zmq.PAIR, lambda frames: self._on_event(connection, monitor, frames))
        connection.monitor = monitor
        monitor.connect(address)
        dealer.connect(node.address)
        self._loop.watch(dealer)
        self._loop.watch(monitor)

    def _close(self, connection: _Connection, linger: float) -> None:
        dealer, monitor = connection.dealer, connection.monitor
        connection.dealer = connection.monitor = None
        connection.retry_at = inf
        if dealer is not None:
            if monitor is not None:
                dealer.disable_monitor()
            self._loop.close(dealer, linger)
        if monitor is not None:
            self._loop.close(monitor, 0)

    def _on_message(self, connection: _Connection, frames: list[bytes]) -> None:
        node = connection.link.node
        try:
            answer = decode_answer(frames)
        except WireVersionError as error:
            self.counts["answers of another wire version"] += 1
            self._complain(f"version of {node}", "cannot talk to %s: %s, we speak %d", node, error, VERSION)
            self._sender.gone(node.instance, self._now(), taken_over=True)
            return
        except WireError as error:
            self.counts["answers that are none of ours"] += 1
            self._complain(f"answers of {node}", "dropped an answer of %s: %s", node, error)
            return
        connection.used = self._now()
        connection.attempts = 0
        self._sender.answered(connection.link, answer, connection.used)

    def _on_event(self, connection: _Connection, monitor: Socket, frames: list[bytes]) -> None:
        if connection.monitor is not monitor:
            return  # of a socket that was replaced meanwhile
        event = int(parse_monitor_message(frames)["event"])
        if event == _UP:
            self.counts["connections made"] += 1
            self._sender.connected(connection.link, self._now())
        elif event & _DOWN:
            # What had arrived before the loss counts.
            while connection.dealer is not None and self._loop.read(connection.dealer, 100):
                pass
            if connection.monitor is monitor:
                self._lost(connection)

    def _lost(self, connection: _Connection) -> None:
        now = self._now()
        if connection.link.up and connection.attempts:
            self._complain(
                f"losses of {connection.link.node.address}", "%s closes every connection to it", connection.link.node
            )
        self.counts["connections lost" if connection.link.up else "connections failed"] += 1
        self._close(connection, 0)
        wait = min(_RETRY_FIRST * 2 ** min(connection.attempts, 30), _RETRY_MOST)
        connection.attempts += 1
        connection.retry_at = now + wait * random.uniform(0.5, 1.0)
        self._sender.disconnected(connection.link, now)
        self._set_due(now)

    def _complain(self, about: str, text: str, *arguments: object) -> None:
        """Each thing once; then only every hundredth time."""
        if self._complained[about] % 100 == 0:
            LOG.warning(text, *arguments)
        self._complained[about] += 1
