# SPDX-License-Identifier: Apache-2.0
"""``green-zmq ls``: who serves what, as the directory has it."""

from __future__ import annotations

import argparse
import logging
import sys

from green_zmq.cli.common import OK, as_failure, print_json, print_table, read_url, set_up_logging


def run(args: argparse.Namespace) -> int:
    set_up_logging(logging.ERROR)
    _, settings = read_url(args.url)
    from green_zmq.directory import open_directory
    from green_zmq.errors import DirectoryError

    try:
        directory = open_directory(settings)
        try:
            found = sorted(directory.listings(), key=lambda li: (li.exchange, li.topic, li.server, -li.age))
        finally:
            directory.close()
    except DirectoryError as error:
        raise as_failure(error) from None
    if args.topic is not None:
        found = [li for li in found if li.topic == args.topic]
    if not found:
        print("green-zmq: Nothing is registered.", file=sys.stderr)
    if args.json:
        records = [
            {
                "exchange": li.exchange,
                "topic": li.topic,
                "server": li.server,
                "address": li.node.address,
                **li.node._asdict(),
                "instance": li.node.instance.hex(),
                "age": round(li.age, 3),
            }
            for li in found
        ]
        print_json(records, indent=2 if records else None)
    elif found:
        rows = [
            (
                li.exchange,
                li.topic,
                li.server,
                li.node.address,
                li.node.hostname,
                li.node.model,
                str(li.node.pid),
                _duration(li.age),
            )
            for li in found
        ]
        print_table(("exchange", "topic", "server", "address", "host", "model", "pid", "age"), rows, numbers=2)
    return OK


def _duration(seconds: float) -> str:
    """In the two largest units, as 3d4h."""
    text, left = "", max(0, int(seconds))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if text or count or unit == "s":
            done = bool(text)
            text += f"{count}{unit}"
            if done:
                break
    return text
