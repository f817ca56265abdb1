# SPDX-License-Identifier: Apache-2.0
"""The concurrency models: eventlet, gevent, native threads. Each is a module with the names of :mod:`.base`.

A model's library is imported only when that model is loaded: there are services that make ``import eventlet`` fail on
purpose. What a process is patched for is told from what it has imported already.
"""

from __future__ import annotations

import importlib
import sys
from typing import cast

from green_zmq.errors import ModelError
from green_zmq.executors.base import Model

__all__ = ["NAMES", "choose", "detect", "load", "patch"]

NAMES = ("eventlet", "gevent", "threads")

# The models that this process has loaded, by name.
loaded: dict[str, Model] = {}


def detect() -> str:
    """The model this process was patched for; ``threads`` if for none.

    :raises ModelError: it was patched for two.
    """
    patched = []
    eventlet = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        patched.append("eventlet")
    gevent = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        patched.append("gevent")
    if len(patched) > 1:
        raise ModelError("This process is patched by eventlet and by gevent; patch it with one of them.")
    return patched[0] if patched else "threads"


def patch(name: str) -> None:
    """Monkey-patch this process for a model: for programs that let their user choose one, before they import anything else.

    :raises ImportError: its library is not installed.
    """
    if name == "eventlet":
        importlib.import_module("eventlet").monkey_patch()
    elif name == "gevent":
        importlib.import_module("gevent.monkey").patch_all()


def choose(asked: str) -> str:
    """The name of the model to use.

    :param asked: one of :data:`NAMES`, ``threading`` (as oslo.messaging calls it), or ``auto``.
    :raises ModelError: that model cannot work in this process.
    """
    found = detect()
    if asked == "auto":
        return found
    if asked == "threading":
        asked = "threads"
    if found == "threads" or asked == found:
        return asked
    raise ModelError(
        f"executor={asked} cannot work here, because this process is monkey-patched by {found}, under which "
        f"{'native threads block everybody' if asked == 'threads' else 'the hub of ' + asked + ' never runs'}. "
        f"Leave the executor out, or name {found}, or do not patch."
    )


def load(name: str) -> Model:
    """The model of that name.

    :raises ModelError: its library is not installed.
    """
    try:
        model = loaded[name] = cast("Model", importlib.import_module(f"green_zmq.executors.{name}"))
    except ImportError as error:
        raise ModelError(
            f"executor={name} needs a library that this process cannot import ({error}); "
            f"install it with: pip install 'green_zmq[{name}]'"
        ) from error
    return model
