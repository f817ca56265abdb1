# SPDX-License-Identifier: Apache-2.0
"""Oslo.messaging's servers with the executor named ``gevent``, which its own functions refuse."""

from __future__ import annotations

from typing import Any

import oslo_messaging
from oslo_messaging.notify import dispatcher as notify_dispatcher
from oslo_messaging.notify.listener import NotificationServer
from oslo_messaging.rpc.server import RPCServer
from stevedore.driver import DriverManager


class _NamesExecutor:
    """Lets a server name any executor that is an ``oslo.messaging.executors`` entry point."""

    def __init__(self, *args: Any, executor: str | None = None, **kwargs: Any) -> None:
        gevent = executor == "gevent"
        super().__init__(*args, executor=None if gevent else executor, **kwargs)
        if gevent:
            self.executor_type = executor
            self._executor_cls = DriverManager("oslo.messaging.executors", "gevent").driver


class _RPCServer(_NamesExecutor, RPCServer):  # type: ignore[misc]
    pass


class _NotificationServer(_NamesExecutor, NotificationServer):  # type: ignore[misc]
    pass


def get_rpc_server(
    transport: Any,
    target: Any,
    endpoints: list[Any],
    executor: str | None = None,
    serializer: Any = None,
    access_policy: Any = None,
) -> Any:
    """As :func:`oslo_messaging.get_rpc_server`, with ``executor="gevent"`` too."""
    dispatcher = oslo_messaging.RPCDispatcher(endpoints, serializer, access_policy)
    return _RPCServer(transport, target, dispatcher, executor=executor)


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
    dispatcher = notify_dispatcher.NotificationDispatcher(endpoints, serializer)
    return _NotificationServer(transport, targets, dispatcher, executor=executor, allow_requeue=allow_requeue, pool=pool)
