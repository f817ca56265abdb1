# SPDX-License-Identifier: Apache-2.0
"""What the commands about processes share: what the directory lists, how it is shown, and which process is meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from green_zmq.cli.common import UNDELIVERED, USAGE, Failure

if TYPE_CHECKING:
    from green_zmq.directory import Directory, Listing
    from green_zmq.routing import Node

# Digits of an instance id: so many are shown, and so many are the least to name it by.
_SHOWN: Final = 8
_LEAST: Final = 4

NOTHING: Final = "Nothing is registered."


def listings(directory: Directory) -> list[Listing]:
    """Everything that is listed, in the order to show it."""
    return sorted(directory.listings(), key=lambda li: (li.exchange, li.topic, li.server, -li.age))


def find(nodes: Iterable[Node], words: Sequence[str]) -> list[Node]:
    """Those of the nodes that the words name: each all of a host, or one by its address or its instance id.

    :raises Failure: a word names none, or is the beginning of several ids.
    """
    known = list(dict.fromkeys(nodes))
    found: list[Node] = []
    for word in words:
        named = [node for node in known if word in _names(node)]
        if not named and re.fullmatch(rf"[0-9a-f]{{{_LEAST},}}", word.lower()):
            named = [node for node in known if node.instance.hex().startswith(word.lower())]
            if len(named) > 1:
                ids = ", ".join(node.instance.hex() for node in named)
                raise Failure(USAGE, f"The instance {word!r} is not clear: {ids} begin so; write more digits of the one.")
        if not named:
            raise Failure(
                UNDELIVERED,
                f"No process is registered whose host, HOST:PORT or instance (at least {_LEAST} digits) is {word!r}; "
                "'green-zmq ls' shows those that are.",
            )
        found += named
    return list(dict.fromkeys(found))


def _names(node: Node) -> set[str]:
    return {node.hostname, node.host, f"{node.hostname}:{node.port}", node.address, node.address.removeprefix("tcp://")}


def record(node: Node) -> dict[str, Any]:
    """All that is known of it, for JSON."""
    return {"address": node.address, **node._asdict(), "instance": node.instance.hex()}


def shorten(instance: bytes) -> str:
    """As much of an instance id as tells it from others, most likely."""
    return instance.hex()[:_SHOWN]


def count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def duration(seconds: float) -> str:
    """In the two largest units, as 3d4h."""
    text, left = "", max(0, int(seconds))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, size)
        if text or amount or unit == "s":
            done = bool(text)
            text += f"{amount}{unit}"
            if done:
                break
    return text
