# SPDX-License-Identifier: Apache-2.0
"""The yardstick: what oslo.messaging over ZeroMQ costs without any protocol.

One ROUTER at each server, one DEALER at the client, each owned by one loop with a mailbox; JSON in one frame; the addresses are
fixed by the URL, ``bare://127.0.0.1:PORT,127.0.0.1:PORT``, and each server has one of them. A cast is answered when it has
come, a call when it was run. No directory, no retries, no time limits. It uses the concurrency models of green_zmq, so that
both have the same ground under them, and nothing else of it.

It is what one writes with the public interfaces of pyzmq and oslo.serialization. With what lies below those, an encoder
made once and no look for further frames it would be faster still by a quarter; ``doc/performance.rst`` has the figures.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq
from oslo_messaging._drivers import base
from oslo_messaging._drivers.common import deserialize_remote_exception, serialize_remote_exception
from oslo_serialization import jsonutils

from green_zmq import executors

# Pyzmq's own methods: those of the green sockets look for waiters that there are none of.
_send, _recv, _get = zmq.Socket.send_multipart, zmq.Socket.recv_multipart, zmq.Socket.getsockopt


class _Loop:
    """Owns one socket: sends what is posted, hands what arrives to ``on_message(route, body)``."""

    def __init__(self, kind: zmq.SocketType, addresses: list[str], on_message: Callable[[bytes, bytes], None]) -> None:
        self.model = executors.load(executors.detect())
        self._context = self.model.Context()
        self._socket: Any = self._context.socket(kind)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._routed = kind == zmq.ROUTER
        for address in addresses:
            (self._socket.bind if self._routed else self._socket.connect)(address)
        self._on_message = on_message
        self._mailbox: deque[tuple[bytes, bytes]] = deque()
        self._sleeping = self._stopping = False
        self._poller: Any = None
        self._ended = self.model.Event()
        self.model.spawn(self._run)

    def post(self, route: bytes, body: bytes) -> None:
        self._mailbox.append((route, body))
        if self._sleeping:
            self._sleeping = False
            self._poller.wake()

    def close(self) -> None:
        self._stopping = True
        if self._poller is not None:
            self._poller.wake()
        self._ended.wait()

    def _run(self) -> None:
        socket, mailbox, routed, on_message = self._socket, self._mailbox, self._routed, self._on_message
        poller = self._poller = self.model.Poller()
        poller.register(socket)
        wait = poller.wait
        while not self._stopping:
            while mailbox:
                route, body = mailbox.popleft()
                _send(socket, [route, body] if routed else [body], zmq.NOBLOCK)
            # The last look at EVENTS comes after the last operation, so it arms the edge that ends the wait.
            while int(_get(socket, zmq.EVENTS)) & zmq.POLLIN:
                *routing, body = _recv(socket, zmq.NOBLOCK)
                on_message(routing[0] if routed else b"", body)
            self._sleeping = True
            if not mailbox:
                wait(None)
            self._sleeping = False
        poller.unregister(socket)
        socket.close()
        poller.close()
        self._ended.set()


class _Call:
    __slots__ = ("answer", "waiter")

    def __init__(self, waiter: Any) -> None:
        self.waiter = waiter
        self.answer: Any = None


class _Incoming(base.RpcIncomingMessage):
    def __init__(self, listener: _Listener, route: bytes | None, id: int, ctxt: Any, message: Any) -> None:
        super().__init__(ctxt, message, id)
        self._listener = listener
        # None: it is a cast.
        self._route = route

    def reply(self, reply: Any = None, failure: Any = None) -> None:
        if self._route is not None:
            error = None if failure is None else serialize_remote_exception(failure)
            self._listener.loop.post(self._route, jsonutils.dump_as_bytes([self.msg_id, reply, error]))

    def requeue(self) -> None: ...

    def heartbeat(self) -> None: ...


class _Listener(base.Listener):
    loop: _Loop

    def __init__(self, address: str) -> None:
        super().__init__(1, None)
        self._address = address

    def start(self, on_incoming_callback: Callable[[list[Any]], None]) -> None:
        super().start(on_incoming_callback)
        self.loop = _Loop(zmq.ROUTER, [self._address], self._on_message)

    def cleanup(self) -> None:
        self.loop.close()

    def _on_message(self, route: bytes, body: bytes) -> None:
        id, is_call, ctxt, message = jsonutils.loads(body)
        if not is_call:
            self.loop.post(route, jsonutils.dump_as_bytes([id, None, None]))
        self.on_incoming_callback([_Incoming(self, route if is_call else None, id, ctxt, message)])


class BareDriver(base.BaseDriver):
    """Not registered anywhere: make ``oslo_messaging.transport.RPCTransport(BareDriver(conf, url))``."""

    def __init__(self, conf: Any, url: Any, default_exchange: Any = None, allowed_remote_exmods: Any = None) -> None:
        super().__init__(conf, url, default_exchange, allowed_remote_exmods)
        self._addresses = [f"tcp://{host.hostname}:{host.port}" for host in url.hosts]
        self._loop: _Loop | None = None
        self._calls: dict[int, _Call] = {}
        self._ids = itertools.count()

    def send(
        self,
        target: Any,  # noqa: ARG002 (any server will do)
        ctxt: Any,
        message: Any,
        wait_for_reply: bool | None = None,
        *_: Any,
        **__: Any,
    ) -> Any:
        loop = self._loop
        if loop is None:
            loop = self._loop = _Loop(zmq.DEALER, self._addresses, self._on_message)
        id = next(self._ids)
        call = self._calls[id] = _Call(loop.model.Event())
        loop.post(b"", jsonutils.dump_as_bytes([id, bool(wait_for_reply), ctxt, message]))
        call.waiter.wait()
        reply, error = call.answer
        if error is not None:
            raise deserialize_remote_exception(error, self._allowed_remote_exmods)
        return reply

    def listen(self, target: Any, batch_size: int, batch_timeout: float | None) -> _Listener:  # noqa: ARG002
        return _Listener(self._addresses[int(target.server.rpartition("-")[2])])

    def send_notification(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    def listen_for_notifications(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    def cleanup(self) -> None:
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _on_message(self, _: bytes, body: bytes) -> None:
        id, reply, error = jsonutils.loads(body)
        call = self._calls.pop(id)
        call.answer = reply, error
        call.waiter.set()
