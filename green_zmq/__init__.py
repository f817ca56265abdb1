# SPDX-License-Identifier: Apache-2.0
"""A brokerless ZeroMQ transport driver for oslo.messaging, under eventlet, gevent and native threads alike."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from green_zmq.inspection import figures
    from green_zmq.servers import get_batch_notification_listener, get_notification_listener, get_rpc_server

__all__ = ["__version__", "figures", "get_batch_notification_listener", "get_notification_listener", "get_rpc_server"]

try:
    __version__ = version("green_zmq")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0"


def __getattr__(name: str) -> Any:
    """The functions are imported when first used: importing oslo.messaging takes half a second."""
    if name in __all__:
        module = "inspection" if name == "figures" else "servers"
        return getattr(importlib.import_module(f"green_zmq.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
