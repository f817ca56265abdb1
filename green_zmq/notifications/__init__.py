# SPDX-License-Identifier: Apache-2.0
"""Stores of notifications: they keep what is sent until listeners have processed it. One is chosen by the transport URL."""

from __future__ import annotations

import importlib
from typing import Final

from green_zmq.config import Settings
from green_zmq.notifications.base import Busy, Consumer, Dead, Pool, State, Store, Taken

__all__ = ["Busy", "Consumer", "Dead", "Pool", "State", "Store", "Taken", "load", "open_store"]

# By the directory that is in use.
_MODULES: Final = {"memory": "sqlite", "sqlite": "sqlite", "redis": "redis"}


def load(directory: str) -> None:
    """Import the store that goes with a directory, for the reasons of :func:`green_zmq.directory.load`."""
    importlib.import_module(f"green_zmq.notifications.{_MODULES[directory]}")


def open_store(settings: Settings) -> Store:
    """The store of a transport.

    :raises StoreError: it cannot be used.
    """
    module = importlib.import_module(f"green_zmq.notifications.{_MODULES[settings.directory]}")
    store: Store = module.open_store(settings)
    return store
