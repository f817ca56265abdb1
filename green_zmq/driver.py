# SPDX-License-Identifier: Apache-2.0
"""Oslo.messaging's words into ours, nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from oslo_config import cfg
from oslo_messaging import Target
from oslo_messaging._drivers import base
from oslo_messaging._drivers.common import deserialize_remote_exception
from oslo_messaging.exceptions import MessageUndeliverable
from oslo_messaging.transport import TransportURL

from green_zmq import config, directory, executors, wire
from green_zmq.engine import Engine, make_engine
from green_zmq.errors import WireError
from green_zmq.routing import Topic
from green_zmq.server import Listener
from green_zmq.subscriber import NotificationListener
from green_zmq.wire import Key


class ZmqDriver(base.BaseDriver):
    """The driver behind ``zmq://``. Until it is used it opens and starts nothing, so a service may fork after making it."""

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        url: TransportURL,
        default_exchange: str | None = None,
        allowed_remote_exmods: list[str] | None = None,
    ) -> None:
        """
        :raises InvalidTransportURL: see :func:`green_zmq.config.read`.
        :raises ConfigError: likewise.
        :raises ModelError: likewise.
        """
        super().__init__(conf, url, default_exchange, allowed_remote_exmods)
        self._settings = config.read(conf, url)
        self._model = executors.load(self._settings.model)
        directory.load(self._settings.directory)
        self._engine: Engine | None = None

    def send(
        self,
        target: Target,
        ctxt: Any,
        message: dict[str, Any],
        wait_for_reply: bool | None = None,
        timeout: float | None = None,
        call_monitor_timeout: float | None = None,
        retry: int | None = None,
        transport_options: Any = None,
    ) -> Any:
        engine = self._engine
        if engine is None or engine.over:
            engine = self._running()
        kind = wire.FANOUT if target.fanout else wire.CALL if wait_for_reply else wire.CAST
        try:
            answer = engine.client.send(
                kind,
                Key(
                    target.exchange or self._default_exchange or "",
                    target.topic,
                    "" if target.fanout else target.server or "",
                ),
                [ctxt if isinstance(ctxt, dict) else _context(ctxt), message],
                timeout=timeout,
                monitor=call_monitor_timeout,
                retry=retry,
                required=bool(transport_options is not None and transport_options.at_least_once),
            )
        except MessageUndeliverable as error:
            error.message = message
            raise
        if answer is None:
            return None
        value = wire.decode_body(answer.body, answer.codec, self._model.pause)
        if answer.kind == wire.FAILURE:
            raise self._failure(value)
        return value

    def send_notification(
        self,
        target: Target,
        ctxt: Any,
        message: dict[str, Any],
        version: float,  # noqa: ARG002 (whether there is an envelope: every message has ours)
        retry: int | None = None,
    ) -> None:
        """:raises Unserializable: the target, or something in the message, cannot be stored."""
        key = self._key(target, "")
        wire.encode_key(key)
        self._running().notifier.send(Topic(*key[:2]), [_context(ctxt), message], retry)

    def listen(self, target: Target, batch_size: int, batch_timeout: float | None) -> Listener:
        """:raises Unserializable: nobody could send to such a target."""
        key = self._key(target, target.server)
        wire.encode_key(key)
        return Listener(self._running().server, key, batch_size, batch_timeout)

    def listen_for_notifications(
        self,
        targets_and_priorities: Iterable[tuple[Target, str]],
        pool: str | None,
        batch_size: int | None,
        batch_timeout: float | None,
    ) -> NotificationListener:
        """:raises Unserializable: nobody could send to such a topic, or there can be no such pool."""
        keys = [
            Key(*self._key(target, "")[:1], f"{target.topic}.{level}", pool or "") for target, level in targets_and_priorities
        ]
        for key in keys:
            wire.encode_key(key)
        topics = [Topic(*key[:2]) for key in keys]
        return NotificationListener(self._running().subscriber, topics, pool or "", batch_size or 1, batch_timeout)

    def require_features(self, requeue: bool = False) -> None:
        """Notifications can be requeued."""

    def cleanup(self) -> None:
        """Close everything, within ``zmq_linger`` and little more. What uses the transport again begins anew."""
        engine, self._engine = self._engine, None
        if engine is not None and not engine.over:
            engine.close()

    def counts(self) -> dict[str, int]:
        """What this transport has counted since it was first used."""
        return {} if self._engine is None else self._engine.counts()

    def _failure(self, value: Any) -> Exception:
        """The exception of a call.

        :raises WireError: it is none: oslo.messaging would raise whatever it stumbles over.
        """
        try:
            failure: Exception = deserialize_remote_exception(value, self._allowed_remote_exmods)
        except Exception as error:
            raise WireError(f"A call has failed, and its exception cannot be made out: {error!r:.200}") from error
        return failure

    def _running(self) -> Engine:
        engine = self._engine
        if engine is None or engine.over:
            with self._model.LOCK:
                engine = self._engine
                if engine is None or engine.over:
                    engine = make_engine(self._settings, self._model)
                    engine.start()
                    self._engine = engine
        return engine

    def _key(self, target: Target, server: str | None) -> Key:
        return Key(target.exchange or self._default_exchange or "", target.topic, server or "")


def _context(ctxt: Any) -> Any:
    """Of a service that has no serializer for it."""
    return ctxt.to_dict() if hasattr(ctxt, "to_dict") else ctxt or {}
