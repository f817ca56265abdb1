# SPDX-License-Identifier: Apache-2.0
"""``green-zmq topics``: what is served, by how many, in which models and for how long."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from green_zmq.cli.common import OK, note, open_directory, print_records, print_table, set_up_logging
from green_zmq.cli.nodes import NOTHING, duration, listings, record

if TYPE_CHECKING:
    from green_zmq.directory import Listing


def run(args: argparse.Namespace) -> int:
    set_up_logging(logging.ERROR)
    with open_directory(args.url) as directory:
        found = listings(directory)
    if not found:
        note(NOTHING)
    topics: dict[tuple[str, str], list[Listing]] = {}
    for li in found:
        topics.setdefault((li.exchange, li.topic), []).append(li)
    if args.json:
        print_records([_record(*topic, servers) for topic, servers in topics.items()])
    elif found:
        print_table(
            ("exchange", "topic", "models", "servers", "names", "hosts", "oldest", "newest"),
            [_row(*topic, servers) for topic, servers in topics.items()],
            numbers=5,
        )
    return OK


def _record(exchange: str, topic: str, servers: Sequence[Listing]) -> dict[str, Any]:
    return {
        "exchange": exchange,
        "topic": topic,
        "names": sorted({li.server for li in servers}),
        "hosts": sorted({li.node.hostname for li in servers}),
        "models": _models(servers),
        "oldest": round(max(li.age for li in servers), 3),
        "newest": round(min(li.age for li in servers), 3),
        "servers": [{"server": li.server, **record(li.node), "age": round(li.age, 3)} for li in servers],
    }


def _row(exchange: str, topic: str, servers: Sequence[Listing]) -> tuple[str, ...]:
    return (
        exchange,
        topic,
        ", ".join(f"{model} {number}" for model, number in _models(servers).items()),
        str(len(servers)),
        str(len({li.server for li in servers})),
        str(len({li.node.hostname for li in servers})),
        duration(max(li.age for li in servers)),
        duration(min(li.age for li in servers)),
    )


def _models(servers: Sequence[Listing]) -> dict[str, int]:
    return dict(sorted(Counter(li.node.model for li in servers).items()))
