# SPDX-License-Identifier: Apache-2.0
"""The pool of a process's connections to others.

It has one DEALER to each process that something is sent to. Made at the first send, used by every caller, closed
when idle for long, when the process is gone, or as the least recently used above a limit. All of it runs in the loop's
thread.

Reconnecting is ours, not libzmq's: after a loss the socket is read empty, closed, and replaced after a growing time. So
it is always known what was written to which connection, and nothing written to a dead one surfaces later. Host names are
ours as well: libzmq would resolve them in its only thread, and hold up every connection of the process.
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401 (resolving a name imports it, in native threads: see green_zmq.directory.load)
import errno
import logging
import random
from _queue import Empty, SimpleQueue  # the native ones: under a patched name, waiting would need a hub
from _socket import SOCK_STREAM, getaddrinfo
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from green_zmq.config import Settings
from green_zmq.delivery import Link, Sender
from green_zmq.descriptors import shortage
from green_zmq.errors import TransportClosed, WireError, WireVersionError
from green_zmq.loop import READING, Loop, Socket
from green_zmq.routing import endpoint, is_address
from green_zmq.wire import OVERHEAD, VERSION, decode_answer, unpack

LOG = logging.getLogger(__name__)

# Times between two attempts to connect: doubled from the first to the most, each with a random part of half of it.
_RETRY_FIRST: Final = 0.05
_RETRY_MOST: Final = 10.0
# TCP and ZMTP handshake together must be done in this time.
_HANDSHAKE: Final = 5.0
# And if libzmq does not see to that, it is given up.
_GIVEN_UP: Final = _HANDSHAKE + 1.0
_SILENT: Final = "it does not answer once connected; is it stopped or overloaded, or no server of ours?"
# Who takes longer to answer is waited for by nobody who can go elsewhere.
_SLOW: Final = 1.0
# libzmq is not to reconnect by itself; but with -1 it drops what has arrived and was not read when the peer closes.
_NEVER: Final = 2**31 - 1
_IDLE_LOOK: Final = 5.0
# Attempts that begin in one round of the loop: 300 peers that are lost at once are not to hold up everybody else.
_AT_ONCE: Final = 10
# Native threads that resolve host names at the same time.
_RESOLVERS: Final = 8
# What goes on is logged again after so many seconds.
_REMIND: Final = 300.0
# Things complained about that are remembered.
_COMPLAINTS: Final = 1000

_UP: Final = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
_UNREACHED: Final = int(zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED)
_DOWN: Final = _UNREACHED | int(
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

# There from the beginning; "open" and more are in the figures.
_FIGURES: Final = (
    "connections attempted",
    "connections opened",
    "connections reused",
    "connections closed",
    "connections evicted",
    "connections failed",
    "connections lost",
)

_OnAddresses = Callable[[list[str] | Exception], None]


def _addresses(name: str) -> list[str] | Exception:
    try:
        found = getaddrinfo(name.encode("idna"), None, 0, SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class _Names:
    """Host names into addresses. The system's resolver blocks, so native threads ask it, and end when nothing is left.

    Nothing is kept: whoever tries again asks again.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._asked: dict[str, list[_OnAddresses]] = {}
        self._queue: SimpleQueue[str] = SimpleQueue()
        self._threads = 0

    def resolve(self, name: str, then: _OnAddresses) -> None:
        """Have ``then`` called with the addresses, of which there is one at least, or with the error."""
        if name in self._asked:
            self._asked[name].append(then)
        else:
            self._asked[name] = [then]
            self._queue.put(name)
            self._help()

    def _help(self) -> None:
        if self._threads < _RESOLVERS and not self._queue.empty():
            self._threads += 1
            self._loop.model.start_native(self._work)

    def _work(self) -> None:
        """A native thread. It must not log: a handler's lock may be a green one, of another thread's hub."""
        with contextlib.suppress(TransportClosed):
            with contextlib.suppress(Empty):
                while True:
                    name = self._queue.get_nowait()
                    self._loop.post(self._answered, name, _addresses(name))
            self._loop.post(self._ended)

    def _answered(self, name: str, addresses: list[str] | Exception) -> None:
        for then in self._asked.pop(name):
            then(addresses)

    def _ended(self) -> None:
        self._threads -= 1
        self._help()  # something may have come after that thread had looked


class _Connection:
    """A link's DEALER and its monitor; neither while its host name is resolved or while it waits for its next attempt."""

    __slots__ = ("attempts", "began", "dealer", "link", "monitor", "probing", "resolving", "retry_at", "turn", "up")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.dealer: Socket | None = None
        self.monitor: Socket | None = None
        self.resolving = False
        self.up = False
        # Attempts since the last answer; which of the host's addresses is to be tried.
        self.attempts = 0
        self.turn = 0
        self.retry_at = inf
        # It is tried although nothing waits for it: what comes is to go to others until it is known to be back.
        self.probing = False
        self.began = 0.0


class Connections:
    """The pool. What is in ``counts`` has happened; :meth:`figures` tells how it is now as well."""

    def __init__(self, loop: Loop, sender: Sender, settings: Settings, now: Callable[[], float]) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(_FIGURES, 0))
        self.due = inf
        self._loop = loop
        self._sender = sender
        self._settings = settings
        self._now = now
        self._names = _Names(loop)
        self._connections: dict[Link, _Connection] = {}
        # Those whose next attempt has its time, and those whose attempt is not to take longer.
        self._trying: dict[_Connection, None] = {}
        self._crowded = False
        self._look_at = inf
        self._complained: dict[str, float] = {}

    def figures(self) -> dict[str, int]:
        """What has happened, and how it is now; from any thread."""
        figures = dict(self.counts)
        figures["connections open"] = figures["connections opened"] - figures["connections closed"]
        for connection in list(self._connections.values()):
            figures["connections reused"] += max(0, connection.link.written - 1)
        return figures

    def want(self, link: Link) -> None:
        """Something waits to be sent there. Connects, or lets the attempt that is due anyway do it."""
        connection = self._connections.get(link)
        if connection is None:
            connection = self._connections[link] = _Connection(link)
            self._make_room()
        if connection.dealer is None and not connection.resolving and (connection.retry_at == inf or connection.probing):
            connection.attempts = 0
            self._try_at(connection, self._now())
        connection.probing = False

    def drop(self, link: Link) -> None:
        """That process is gone for good, or nobody is to send to it any more."""
        connection = self._connections.pop(link, None)
        if connection is not None:
            self._close(connection, 0)

    def tick(self, now: float) -> None:
        """Attempts that are due, or take long, and connections that nobody needs any more.

        One that was lost is tried for as long as the directory lists its process in a topic that is in use: taken for new, it
        would get the next message, which would wait for it while others could take it.
        """
        ready = [connection for connection in self._trying if connection.retry_at <= now]
        if ready:
            awaited = bool(self._sender.awaited())
            for connection in ready[:_AT_ONCE]:
                self._trying.pop(connection, None)
                connection.retry_at = inf
                if connection.dealer is not None or connection.resolving:
                    self._slow(connection, now)
                    continue
                connection.probing = connection.link.idle and not awaited
                if connection.link.idle and not connection.link.topics:
                    self._retire(connection)
                elif connection.link in self._connections:
                    self._connect(connection)
        if self._look_at <= now:
            self._look(now)
        self.due = min((connection.retry_at for connection in self._trying), default=inf)
        self.due = min(self.due, self._look_at)

    def close(self, linger: float) -> None:
        for connection in self._connections.values():
            self._close(connection, linger)
        self._connections.clear()
        self._look_at = self.due = inf

    def _look(self, now: float) -> None:
        """Close what was idle for long, and what became idle after the directory no longer listed it."""
        for connection in list(self._connections.values()):
            link = connection.link
            if link.idle and connection.dealer is not None:
                if not link.topics:
                    self._retire(connection)
                elif link.used + self._settings.idle_timeout <= now:
                    self.counts["connections closed: idle"] += 1
                    self._retire(connection)
        self._make_room()
        self._look_at = now + min(_IDLE_LOOK, self._settings.idle_timeout) if self._connections else inf

    def _make_room(self) -> None:
        """Above the limit the least recently used connections that nothing needs are closed.

        If all are needed none is: then as soon as one no longer is.
        """
        over = len(self._connections) - self._settings.max_connections
        if over > 0:
            unneeded = [c for c in self._connections.values() if c.link.idle and c.dealer is not None]
            unneeded.sort(key=lambda connection: (connection.up, connection.link.used))
            for connection in unneeded[:over]:
                self.counts["connections evicted"] += 1
                self._retire(connection)
        self._crowded = len(self._connections) > self._settings.max_connections

    def _slow(self, connection: _Connection, now: float) -> None:
        """It goes on being tried, and what is for any server goes to others.

        Not for ever: libzmq takes some who are none of its own for peers of its first release, and then has no time limit.
        """
        link = connection.link
        if connection.dealer is not None:
            if connection.began + _GIVEN_UP <= now:
                self._lost(connection, _SILENT)
                return
            self._try_at(connection, connection.began + _GIVEN_UP)
        if not link.down:
            link.trouble = link.trouble or "it has not answered yet"
            self._sender.disconnected(link, now)

    def _retire(self, connection: _Connection) -> None:
        del self._connections[connection.link]
        self._close(connection, self._settings.linger)
        self._sender.closed(connection.link)

    def _try_at(self, connection: _Connection, when: float) -> None:
        connection.retry_at = when
        self._trying[connection] = None
        self.due = min(self.due, when)

    def _connect(self, connection: _Connection) -> None:
        link = connection.link
        host = link.node.host
        connection.began = link.used = self._now()
        self.counts["connections attempted"] += 1
        reason = shortage()
        if reason:
            self._complain("descriptors", "no connection to %s can be made: %s", link.node, reason)
            self._lost(connection, reason)
        elif is_address(host):
            self._connect_to(connection, host)
        else:
            connection.resolving = True
            self._try_at(connection, connection.began + _SLOW)
            link.trouble = link.trouble or f"its host name {host} is still being resolved"
            self._names.resolve(host, partial(self._resolved, connection))

    def _resolved(self, connection: _Connection, addresses: list[str] | Exception) -> None:
        if not connection.resolving:
            return  # it was dropped meanwhile
        connection.resolving = False
        if isinstance(addresses, Exception):
            node = connection.link.node
            reason = shortage() or (
                f"the host name {node.host} cannot be resolved here ({getattr(addresses, 'strerror', None) or addresses}); set "
                f"rpc_zmq_host on {node.hostname} to an address that this host can reach, or make the name known here (DNS, "
                "/etc/hosts)"
            )
            keys = ", ".join(dict.fromkeys(str(request.key) for request in connection.link.queue)) or "nothing"
            self._complain(f"name {node.host}", "no connection to %s can be made, for which %s waits: %s", node, keys, reason)
            self._lost(connection, reason)
        else:
            # One that cannot be reached is not the first to be tried the next time either.
            self._connect_to(connection, addresses[connection.turn % len(addresses)])

    def _connect_to(self, connection: _Connection, address: str) -> None:
        node = connection.link.node
        connection.began = self._now()
        try:
            self._open(connection, address)
        except (zmq.ZMQError, OSError) as error:
            reason = shortage() if error.errno in (errno.EMFILE, errno.ENFILE) else ""
            self._complain(node.address, "no connection to %s can be made: %s", node, reason or error)
            self._lost(connection, reason or str(error))
        if self._look_at == inf:
            self._look_at = connection.link.used + min(_IDLE_LOOK, self._settings.idle_timeout)
            self.due = min(self.due, self._look_at)

    def _open(self, connection: _Connection, address: str) -> None:
        settings = self._settings
        dealer = self._loop.open(zmq.DEALER, partial(self._on_message, connection))
        connection.dealer = connection.link.socket = dealer
        milliseconds = int(settings.heartbeat * 1000)
        for option, value in (
            (zmq.LINGER, int(settings.linger * 1000)),
            (zmq.SNDHWM, 0),  # what is unanswered is bounded; a message that libzmq refuses would have to be kept as well
            (zmq.IPV6, int(":" in address)),
            (zmq.MAXMSGSIZE, settings.limits.message_bytes + OVERHEAD),
            (zmq.RECONNECT_IVL, _NEVER),
            (zmq.CONNECT_TIMEOUT, int(_HANDSHAKE * 1000)),
            (zmq.HANDSHAKE_IVL, int(_HANDSHAKE * 1000)),
            (zmq.HEARTBEAT_IVL, milliseconds),
            (zmq.HEARTBEAT_TIMEOUT, milliseconds * 2),
            (zmq.HEARTBEAT_TTL, milliseconds * 3),
            # Heartbeats wait behind what a peer that is stopped does not take.
            (zmq.TCP_MAXRT, milliseconds * 3),
        ):
            dealer.set(option, value)
        connection.monitor = self._loop.monitor(dealer, _UP | _DOWN, partial(self._on_event, connection))
        dealer.connect(endpoint(address, connection.link.node.port))
        self._try_at(connection, connection.began + _SLOW)
        self._loop.watch(dealer)
        self._loop.watch(connection.monitor)

    def _close(self, connection: _Connection, linger: float) -> None:
        dealer, monitor = connection.dealer, connection.monitor
        connection.dealer = connection.monitor = connection.link.socket = None
        connection.resolving = False
        connection.retry_at = inf
        self._trying.pop(connection, None)
        if connection.up:
            connection.up = False
            self.counts["connections closed"] += 1
        self.counts["connections reused"] += max(0, connection.link.written - 1)
        connection.link.written = 0
        if dealer is not None:
            if monitor is not None:
                dealer.disable_monitor()
            self._loop.close(dealer, linger)
        if monitor is not None:
            self._loop.close(monitor, 0)

    def _on_message(self, connection: _Connection, frames: list[bytes]) -> None:
        try:
            messages = unpack(frames)
        except WireError as error:
            self._not_ours(connection.link, error)
            return
        for message in messages:
            if connection.dealer is not None:  # else the last one was the end of it
                self._on_answer(connection, message)

    def _on_answer(self, connection: _Connection, frames: list[bytes]) -> None:
        link = connection.link
        try:
            answer = decode_answer(frames)
        except WireVersionError as error:
            node = link.node
            self.counts["answers of another wire version"] += 1
            self._complain(f"version of {node}", "cannot talk to %s: %s, we speak %d", node, error, VERSION)
            self._sender.gone(node.instance, self._now(), taken_over=True)
            return
        except WireError as error:
            self._not_ours(link, error)
            return
        now = link.used = self._now()
        connection.attempts = 0
        self._sender.answered(link, answer, now)
        if self._crowded and link.idle:
            self._make_room()

    def _not_ours(self, link: Link, error: WireError) -> None:
        self.counts["answers that are none of ours"] += 1
        self._complain(f"answers of {link.node}", "dropped an answer of %s: %s", link.node, error)

    def _on_event(self, connection: _Connection, monitor: Socket, frames: list[bytes]) -> None:
        if connection.monitor is not monitor:
            return  # of a socket that was replaced meanwhile
        event = int(parse_monitor_message(frames)["event"])
        if event == _UP:
            connection.up = True
            connection.probing = False
            connection.retry_at = inf
            self._trying.pop(connection, None)
            connection.link.trouble = ""
            self.counts["connections opened"] += 1
            self._sender.connected(connection.link, self._now())
        elif event & _DOWN:
            # What had arrived before the loss counts, however long it takes: others have their turn meanwhile.
            until = self._now() + READING
            while connection.dealer is not None and self._loop.read(connection.dealer, 1):
                if self._now() > until:
                    self._loop.post(self._on_event, connection, monitor, frames)
                    return
            if connection.monitor is monitor:
                self._lost(connection, self._trouble(connection, event))

    def _trouble(self, connection: _Connection, event: int) -> str:
        """Why there is no connection, as far as libzmq lets one know."""
        if connection.up:
            return "the connection was lost"
        seconds = self._now() - connection.began
        if event & _UNREACHED:
            no_answer = "it does not answer" if seconds >= _HANDSHAKE else "it refuses connections, or there is no way to it"
            return shortage() or no_answer
        if seconds >= _HANDSHAKE:
            return _SILENT
        return "it closes the connection at once; is it out of descriptors, or no server of ours?"

    def _lost(self, connection: _Connection, trouble: str) -> None:
        now = self._now()
        link = connection.link
        link.trouble = trouble
        if connection.up:
            if connection.attempts:
                self._complain(f"losses of {link.node.address}", "%s closes every connection to it", link.node)
            self.counts["connections lost"] += 1
        else:
            self.counts["connections failed"] += 1
            connection.turn += 1
        self._close(connection, 0)
        wait = min(_RETRY_FIRST * 2 ** min(connection.attempts, 30), _RETRY_MOST)
        connection.attempts += 1
        self._try_at(connection, now + wait * random.uniform(0.5, 1.0))
        self._sender.disconnected(link, now)

    def _complain(self, about: str, text: str, *arguments: object) -> None:
        """Each thing once, and again only if it goes on for long."""
        now = self._now()
        if self._complained.get(about, -inf) + _REMIND <= now:
            if len(self._complained) >= _COMPLAINTS:
                self._complained.clear()
            self._complained[about] = now
            LOG.warning(text, *arguments)
