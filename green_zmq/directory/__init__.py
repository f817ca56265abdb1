# SPDX-License-Identifier: Apache-2.0
"""Directories: who serves what. One is chosen by the scheme of the transport URL."""

from __future__ import annotations

import importlib

from green_zmq.config import Settings
from green_zmq.directory.base import Directory, Listing, Stale

__all__ = ["Directory", "Listing", "Stale", "load", "open_directory"]


def load(name: str) -> None:
    """Import a directory and its library: not in the native threads that use it, several of which might want to at once.

    Python's locks of modules are green ones in a patched process, and do not work between native threads.
    """
    importlib.import_module(f"green_zmq.directory.{name}")


def open_directory(settings: Settings) -> Directory:
    """The directory of a transport.

    :raises DirectoryError: it cannot be used.
    """
    module = importlib.import_module(f"green_zmq.directory.{settings.directory}")
    directory: Directory = module.open_directory(settings)
    return directory
