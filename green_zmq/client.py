# SPDX-License-Identifier: Apache-2.0
"""Calls, casts and fanouts: from the caller's thread into the loop, and back with the answer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, Final

from green_zmq import wire
from green_zmq.config import Settings
from green_zmq.connections import Connections
from green_zmq.delivery import Outgoing, Sender
from green_zmq.errors import MessageTooLarge, TransportClosed
from green_zmq.loop import Loop
from green_zmq.resolver import Resolver
from green_zmq.routing import Topic
from green_zmq.wire import Answer, Key

LOG = logging.getLogger(__name__)

# Messages that one line of the log names.
_NAMED: Final = 10


class Client:
    def __init__(
        self,
        loop: Loop,
        sender: Sender,
        connections: Connections,
        resolver: Resolver,
        settings: Settings,
        now: Callable[[], float],
    ) -> None:
        self._loop = loop
        self._sender = sender
        self._connections = connections
        self._resolver = resolver
        self._settings = settings
        self._now = now
        # Why nothing is sent any more, if so.
        self._closed = ""

    # For all threads.

    def send(
        self,
        kind: int,
        key: Key,
        value: object,
        *,
        timeout: float | None = None,
        monitor: float | None = None,
        retry: int | None = None,
        required: bool = False,
    ) -> Answer | None:
        """Send a message and wait: for its reply if it is a call, else until it is in good hands.

        :param value: anything that can be serialised.
        :param timeout: seconds until a call ends with MessagingTimeout; None: never.
        :param monitor: seconds without a heartbeat after which a call ends.
        :param retry: None or -1: as long as it takes; N: N + 1 tries, then MessageDeliveryFailure.
        :param required: MessageUndeliverable at once if no server is registered.
        :raises Unserializable: the value cannot be put on the wire.
        :raises MessageTooLarge: it is larger than ``max_message_bytes``.
        :raises TransportClosed: the transport is being cleaned up.
        """
        model = self._loop.model
        body = wire.encode_body(value, self._settings.codec, model.pause)
        request = Outgoing(
            kind,
            key,
            self._settings.codec,
            body,
            timeout=timeout,
            monitor=monitor,
            retry=retry,
            required=required,
            waiter=model.Event(),
            began=self._now(),
        )
        most = self._settings.limits.message_bytes
        if request.size > most:
            raise MessageTooLarge(f"The message to {key} has {request.size} bytes; max_message_bytes allows {most}.")
        try:
            alone = not self._sender.anybody_waits and request.size <= wire.INLINE
            if not (alone and self._loop.call(self._submit_at_once, request)):
                self._loop.post(self._submit, request)
            request.waiter.wait()
        except BaseException:  # the caller was killed
            with contextlib.suppress(TransportClosed):
                self._loop.post(self._cancel, request)
            raise
        if request.error is not None:
            raise request.error
        return request.outcome

    # For the loop's thread.

    def gone(self, instance: bytes) -> None:
        """The directory no longer has that process."""
        self._sender.gone(instance, self._now())

    def settle(self) -> None:
        """Do what was decided, until nothing is left to do."""
        sender = self._sender
        while sender.dropped or sender.lookups or sender.doubtful or sender.wanted:
            self._carry_out()
        sender.flush()
        if sender.finished:
            self._let_go()
        if sender.waiting:
            self._resolver.watch(self._now())
        if sender.lost or sender.failed:
            self._log_ends()

    def close(self, reason: str = "the transport was closed") -> None:
        """End what is pending, and whatever comes from now on."""
        self._closed = reason
        self._sender.close(self._now())
        self.settle()

    def _submit_at_once(self, request: Outgoing) -> None:
        """If nothing is to be looked for first. Whichever step of it is the last, :meth:`_cancel` mends what is left."""
        now, sender = self._now(), self._sender
        strictly = request.required or request.kind == wire.FANOUT
        key = request.key
        if self._closed or not sender.has_route(key) or not self._resolver.is_fresh(key[:2], now, strictly=strictly):
            self._loop.post(self._submit, request)
        else:
            sender.submit(request, now)
            sender.flush()
            if sender.finished:  # a fanout
                self._let_go()

    def _let_go(self) -> None:
        finished, self._sender.finished = self._sender.finished, []
        for request in finished:
            request.waiter.set()

    def _cancel(self, request: Outgoing) -> None:
        self._sender.cancel(request)
        if not request.heard:  # it was not submitted yet: maybe its caller was killed while it asked whether there is news
            self._resolver.doubt()

    def _submit(self, request: Outgoing) -> None:
        if self._closed:
            request.error = TransportClosed(f"The message to {request.key} was not sent: {self._closed}.")
            request.waiter.set()
            return
        now = self._now()
        strictly = request.required or request.kind == wire.FANOUT
        topic = Topic(request.key.exchange, request.key.topic)
        if not strictly and self._resolver.is_fresh(topic, now, strictly=False):
            self._sender.submit(request, now)
            return
        fresh = self._resolver.refresh(topic, now, strictly=strictly)
        if strictly and fresh and not self._sender.table.nodes(request.key):
            # News that is pushed may be on its way: nobody is said to be there before the directory has said so itself.
            self._resolver.look_up(topic)
            fresh = False
        # Fanouts, and what must know that nobody is registered, wait for news of their topic that is under way.
        self._sender.submit(request, now, hold=strictly and not fresh)

    def _carry_out(self) -> None:
        sender = self._sender
        while sender.dropped:
            self._connections.drop(sender.dropped.pop())
        while sender.lookups:
            self._resolver.look_up(sender.lookups.popitem()[0])
        while sender.doubtful:
            self._resolver.verify(sender.doubtful.pop())
        while sender.wanted:
            self._connections.want(sender.wanted.popitem()[0])

    def _log_ends(self) -> None:
        """Those that ended for the same reason are told of in one line."""
        sender = self._sender
        failed, sender.failed = sender.failed, []
        lost, sender.lost = sender.lost, []
        for level, text, ended in (
            (logging.INFO, "failed %d %s to %s: %s%s", failed),
            (logging.ERROR, "lost %d %s to %s: %s%s", lost),
        ):
            names: dict[Any, list[str]] = {}
            for request, reason in ended:
                names.setdefault((request.kind, request.key, reason), []).append(sender.name(request))
            for (kind, key, reason), each in names.items():
                sent = [name for name in each if name]
                which = f" (messages {', '.join(sent[:_NAMED])}{', ...' if len(sent) > _NAMED else ''})" if sent else ""
                LOG.log(level, text, len(each), wire.kind_name(kind), key, reason, which)
