# SPDX-License-Identifier: Apache-2.0
"""The ROUTER that a process is reached at, once it listens. All of it runs in the loop's thread."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
from _socket import (
    AF_INET,
    AF_INET6,
    AF_UNIX,
    IPPROTO_IPV6,
    IPPROTO_TCP,
    IPV6_V6ONLY,
    SHUT_RD,
    SO_REUSEADDR,
    SOCK_STREAM,
    SOL_SOCKET,
    TCP_INFO,
    getaddrinfo,
    gethostname,
    if_nameindex,
)
from _socket import socket as TcpSocket  # noqa: N812 (not the class that green libraries replace)
from collections import Counter
from collections.abc import Callable
from ctypes import addressof, create_string_buffer
from math import inf
from struct import pack, unpack_from
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from green_zmq.config import ALL, Settings
from green_zmq.descriptors import no_descriptors, shortage
from green_zmq.errors import AddressError
from green_zmq.loop import Loop, OnMessage, Socket
from green_zmq.routing import is_address
from green_zmq.wire import OVERHEAD

LOG = logging.getLogger(__name__)

# Answers that libzmq holds for one connection that does not read; further ones are dropped, and asked for again.
_ANSWERS_HELD: Final = 10_000
# Connections that may wait to be accepted: a service of 500 nodes comes back at once.
_BACKLOG: Final = 1024
# How long a process out of descriptors shuts its door at least, in seconds.
_SHUT: Final = 1.0
# Linux's numbers; Python's socket module has no names for them.
_SO_ATTACH_FILTER: Final = 26
_SO_DETACH_FILTER: Final = 27
# What goes on is logged again after so many seconds.
_REMIND: Final = 300.0


class Router:
    """The socket that a process is reached at, once it listens.

    Its listening descriptor is made here, because libzmq alone spins when no descriptor is left for those who come: it
    accepts again and again, as fast as it can. So then the door is shut: the kernel drops who wants to come, those who have
    come already are sent away, and everybody comes again by himself later. Connections that stand are served meanwhile.

    None of it needs a descriptor, which others of the process would be as quick to take. Libzmq's number for the listening
    socket is given to another one, at which nobody ever comes; and a socket that ceases to listen sends away who waits.
    """

    def __init__(self, loop: Loop, settings: Settings, now: Callable[[], float]) -> None:
        self.due = inf
        self.counts: Counter[str] = Counter()
        self.on_message: OnMessage = lambda _: None
        self._loop = loop
        self._settings = settings
        self._now = now
        self._socket: Socket | None = None
        self._monitor: Socket | None = None
        self._listening: TcpSocket | None = None
        # Libzmq's number for the listening socket, and what it stands for while the door is shut.
        self._number = -1
        self._nobody: TcpSocket | None = None
        self._shut = False
        self._told = False
        self._told_at = -inf

    def open(self) -> tuple[str, int]:
        """Listen; the host and port that others are to connect to.

        :raises AddressError: there is no such address, no free port, or no descriptor.
        """
        reason = shortage()
        if reason:
            raise AddressError(f"Cannot listen: {reason}.")
        try:
            return self._open()
        except (OSError, zmq.ZMQError) as error:  # others of this process may have taken the last ones meanwhile
            raise AddressError(f"Cannot listen: {shortage() or error}.") from error

    def _open(self) -> tuple[str, int]:
        settings = self._settings
        address = self._address()
        # Senders that are gone without a word. What libzmq offers, HEARTBEAT_TTL, ends with any message behind a heartbeat.
        seconds = max(1, round(settings.heartbeat))
        with contextlib.ExitStack() as undo:
            listening = self._listen(address)
            undo.callback(listening.close)
            port: int = listening.getsockname()[1]
            nobody = TcpSocket(AF_UNIX, SOCK_STREAM)
            undo.callback(nobody.close)
            nobody.setblocking(False)
            nobody.bind(b"")  # the kernel gives it a name that nobody knows
            nobody.listen()
            socket = self._loop.open(zmq.ROUTER, self.on_message)
            undo.callback(self._loop.close, socket, 0)
            number = os.dup(listening.fileno())
            for option, value in (
                (zmq.LINGER, int(settings.linger * 1000)),
                (zmq.ROUTER_MANDATORY, 1),
                (zmq.SNDHWM, _ANSWERS_HELD),
                (zmq.MAXMSGSIZE, settings.limits.message_bytes + OVERHEAD),
                (zmq.TCP_KEEPALIVE, 1),
                (zmq.TCP_KEEPALIVE_IDLE, seconds),
                (zmq.TCP_KEEPALIVE_INTVL, seconds),
                (zmq.TCP_KEEPALIVE_CNT, 2),
                # Keepalive says nothing where something waits to be acknowledged, nor of who is stopped with its buffers full.
                (zmq.TCP_MAXRT, seconds * 3000),
                (zmq.USE_FD, number),
            ):
                socket.set(option, value)
            monitor = self._loop.monitor(socket, int(zmq.EVENT_ACCEPT_FAILED), self._on_failure)
            undo.callback(self._loop.close, monitor, 0)
            socket.bind(f"tcp://127.0.0.1:{port}")  # what counts is the descriptor
            undo.pop_all()
        self._socket, self._monitor, self._listening = socket, monitor, listening
        self._number, self._nobody = number, nobody
        self._loop.watch(socket)
        self._loop.watch(monitor)
        self._loop.timed.append(self)
        return settings.host or (gethostname() if address in ALL else address), port

    def write(self, route: bytes, frames: list[bytes]) -> bool:
        """Whether it could be written; if not, it is kept where it matters, and the sender asks for it when it is back."""
        return self._socket is not None and self._loop.send(self._socket, [route, *frames])

    def tick(self, now: float) -> None:
        """While the door is shut: are there descriptors again?"""
        self.due = now + _SHUT
        if shortage():
            self._remind()
        elif self._listening is not None:
            with contextlib.suppress(OSError):
                self._listening.setsockopt(SOL_SOCKET, _SO_DETACH_FILTER, 0)
            os.dup2(self._listening.fileno(), self._number)
            self._shut = False
            self.due = inf
            if self._told:
                self._told = False
                LOG.warning("There are descriptors again: other processes can connect to this one.")

    def close(self, linger: float) -> None:
        socket, monitor, listening, nobody = self._socket, self._monitor, self._listening, self._nobody
        self._socket = self._monitor = self._listening = self._nobody = None
        self.due = inf
        if socket is None or monitor is None or listening is None or nobody is None:
            return
        if self._shut:  # libzmq closes the socket that it was given
            os.dup2(listening.fileno(), self._number)
        # libzmq holds a lock while it waits for room for an event, and is not to hold it now.
        while self._loop.read(monitor, 1000):
            pass
        socket.disable_monitor()
        self._loop.close(monitor, 0)
        self._loop.close(socket, linger)
        listening.close()
        nobody.close()

    # Where to listen.

    def _address(self) -> str:
        """The address to bind: of the interface, if one is named."""
        address = self._settings.bind_address.strip("[]")
        if address in ALL or is_address(address):
            return address
        if address == "localhost":
            return "127.0.0.1"
        if address not in {name for _, name in if_nameindex()}:
            raise self._wrong(address, "this host has no such network interface, and it is no IP address")
        probe = self._loop.open(zmq.ROUTER, lambda _: None)
        try:
            for version_6 in (0, 1):
                probe.set(zmq.IPV6, version_6)
                with contextlib.suppress(zmq.ZMQError):
                    probe.bind(f"tcp://{address}:*")
                    bound = bytes(probe.get(zmq.LAST_ENDPOINT)).decode().rstrip("\0")
                    found = bound.removeprefix("tcp://").rpartition(":")[0].strip("[]")
                    if "%" not in found or self._settings.host:
                        return found
        finally:
            self._loop.close(probe, 0)
        raise self._wrong(address, "that network interface has no address that others could connect to")

    def _listen(self, address: str) -> TcpSocket:
        """Bind to some port of the range: a random one first, so that processes do not queue for the same."""
        settings = self._settings
        count = settings.max_port - settings.min_port
        start = random.randrange(count)
        for i in range(count):
            port = settings.min_port + (start + i) % count
            try:
                return self._listen_at(address, port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise self._wrong(f"{address}:{port}", error.strerror or str(error)) from error
            if i % 100 == 99:
                self._loop.model.pause()
        ports = f"port {start + settings.min_port} is" if count == 1 else f"all {count} ports from {settings.min_port} on are"
        raise AddressError(
            f"Cannot listen on {address}: {ports} in use. Widen rpc_zmq_min_port and rpc_zmq_max_port, or end who has them."
        )

    @staticmethod
    def _listen_at(address: str, port: int) -> TcpSocket:
        """With '*' for IPv4 and IPv6, if this host has that."""
        if address == "*":
            try:
                return Router._listen_at("::", port)
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
            address = "0.0.0.0"  # noqa: S104
        listening = TcpSocket(AF_INET6 if ":" in address else AF_INET, SOCK_STREAM)
        try:
            listening.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            if address == "::":
                listening.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, 0)
            listening.setblocking(False)
            # It is no name, so this asks nobody; but it knows the zone of a link-local address.
            listening.bind(getaddrinfo(address, port, 0, SOCK_STREAM)[0][4])
            listening.listen(_BACKLOG)
        except BaseException:
            listening.close()
            raise
        return listening

    @staticmethod
    def _wrong(where: str, reason: str) -> AddressError:
        return AddressError(
            f"Cannot listen on {where}: {reason}. "
            "rpc_zmq_bind_address must be an address or network interface of this host, or *."
        )

    # When no descriptor is left.

    def _on_failure(self, _: Socket, frames: list[bytes]) -> None:
        """Libzmq could not accept a connection."""
        listening, nobody = self._listening, self._nobody
        if self._shut or listening is None or nobody is None:
            return
        number = int(parse_monitor_message(frames)["value"])
        if number not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            return
        self._shut = True
        self.due = self._now() + _SHUT
        self.counts["times out of descriptors for those who connect"] += 1
        # Before anything else: libzmq gives up its process if it finds a socket that does not listen.
        os.dup2(nobody.fileno(), self._number)
        with contextlib.suppress(OSError):
            drop = create_string_buffer(pack("HBBI", 6, 0, 0, 0))  # a filter of packets (BPF): return 0
            listening.setsockopt(SOL_SOCKET, _SO_ATTACH_FILTER, pack("HL", 1, addressof(drop)))
        self.counts["connections refused for want of descriptors"] += _waiting(listening)
        with contextlib.suppress(OSError):
            listening.shutdown(SHUT_RD)
            listening.listen(_BACKLOG)
        self._remind()

    def _remind(self) -> None:
        now = self._now()
        if self._told_at + _REMIND <= now:
            self._told = True
            self._told_at = now
            LOG.error("No process can connect to this one any more: %s.", shortage() or no_descriptors(errno.EMFILE))


def _waiting(listening: TcpSocket) -> int:
    """Connections that wait to be accepted: of a socket that listens, the 5th number that tcp(7) tells."""
    number: int = unpack_from("8x5I", listening.getsockopt(IPPROTO_TCP, TCP_INFO, 28))[4]
    return number
