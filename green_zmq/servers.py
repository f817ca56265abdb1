# SPDX-License-Identifier: Apache-2.0
"""Oslo.messaging's servers with the executor named ``gevent``, which its own functions refuse."""

from __future__ import annotations

from typing import Any

import oslo_messaging
from stevedore.driver import DriverManager


def _name_executor(server: Any, executor: str | None) -> Any:
    """Give a server, made with the executor that oslo.messaging would choose, the one that was named."""
    if executor == "gevent":
        server.executor_type = executor
        server._executor_cls = DriverManager("oslo.messaging.executors", executor).driver
    return server


def get_rpc_server(
    transport: Any,
    target: Any,
    endpoints: list[Any],
    executor: str | None = None,
    serializer: Any = None,
    access_policy: Any = None,
) -> Any:
    """As :func:`oslo_messaging.get_rpc_server`, with ``executor="gevent"`` too."""
    allowed = None if executor == "gevent" else executor
    server = oslo_messaging.get_rpc_server(transport, target, endpoints, allowed, serializer, access_policy)
    return _name_executor(server, executor)


def get_notification_listener(
    transport: Any,
    targets: list[Any],
    endpoints: list[Any],
    executor: str | None = None,
    serializer: Any = None,
    allow_requeue: bool = False,
    pool: str | None = None,
) -> Any:
    """As :func:`oslo_messaging.get_notification_listener`, with ``executor="gevent"`` too."""
    allowed = None if executor == "gevent" else executor
    server = oslo_messaging.get_notification_listener(transport, targets, endpoints, allowed, serializer, allow_requeue, pool)
    return _name_executor(server, executor)


def get_batch_notification_listener(
    transport: Any,
    targets: list[Any],
    endpoints: list[Any],
    executor: str | None = None,
    serializer: Any = None,
    allow_requeue: bool = False,
    pool: str | None = None,
    batch_size: int | None = None,
    batch_timeout: float | None = None,
) -> Any:
    """As :func:`oslo_messaging.get_batch_notification_listener`, with ``executor="gevent"`` too."""
    allowed = None if executor == "gevent" else executor
    server = oslo_messaging.get_batch_notification_listener(
        transport, targets, endpoints, allowed, serializer, allow_requeue, pool, batch_size, batch_timeout
    )
    return _name_executor(server, executor)
