# SPDX-License-Identifier: Apache-2.0
"""Oslo.messaging's servers with executors that cost less than its own, and with the one named ``gevent``, which it refuses."""

from __future__ import annotations

from typing import Any

import oslo_messaging

from green_zmq import executors


def _with_our_executor(server: Any, executor: str | None) -> Any:
    """Give a server, made with the executor that was named or that oslo.messaging would choose, ours of that kind."""
    name = executor or server.executor_type
    if name != "threading" or executors.detect() == "threads":  # the patched threads of a green model are not for ours
        server.executor_type = name
        server._executor_cls = executors.load("threads" if name == "threading" else name).Executor
    return server


def get_rpc_server(
    transport: Any,
    target: Any,
    endpoints: list[Any],
    executor: str | None = None,
    serializer: Any = None,
    access_policy: Any = None,
) -> Any:
    """As :func:`oslo_messaging.get_rpc_server`, with our executors; ``executor="gevent"`` too.

    :raises ModelError: the library of that executor is not installed.
    """
    allowed = None if executor == "gevent" else executor
    server = oslo_messaging.get_rpc_server(transport, target, endpoints, allowed, serializer, access_policy)
    return _with_our_executor(server, executor)


def get_notification_listener(
    transport: Any,
    targets: list[Any],
    endpoints: list[Any],
    executor: str | None = None,
    serializer: Any = None,
    allow_requeue: bool = False,
    pool: str | None = None,
) -> Any:
    """As :func:`oslo_messaging.get_notification_listener`, with our executors; ``executor="gevent"`` too.

    :raises ModelError: the library of that executor is not installed.
    """
    allowed = None if executor == "gevent" else executor
    server = oslo_messaging.get_notification_listener(transport, targets, endpoints, allowed, serializer, allow_requeue, pool)
    return _with_our_executor(server, executor)


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
    """As :func:`oslo_messaging.get_batch_notification_listener`, with our executors; ``executor="gevent"`` too.

    :raises ModelError: the library of that executor is not installed.
    """
    allowed = None if executor == "gevent" else executor
    server = oslo_messaging.get_batch_notification_listener(
        transport, targets, endpoints, allowed, serializer, allow_requeue, pool, batch_size, batch_timeout
    )
    return _with_our_executor(server, executor)
