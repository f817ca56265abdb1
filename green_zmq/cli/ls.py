# SPDX-License-Identifier: Apache-2.0
"""``green-zmq ls``: who serves what, as the directory has it."""

from __future__ import annotations

import argparse
import logging

from green_zmq.cli.common import OK, note, open_directory, print_records, print_table, set_up_logging
from green_zmq.cli.nodes import NOTHING, duration, listings, record, shorten


def run(args: argparse.Namespace) -> int:
    set_up_logging(logging.ERROR)
    with open_directory(args.url) as directory:
        found = [li for li in listings(directory) if args.topic in (None, li.topic)]
    if not found:
        note(NOTHING)
    if args.json:
        print_records(
            [
                {"exchange": li.exchange, "topic": li.topic, "server": li.server, **record(li.node), "age": round(li.age, 3)}
                for li in found
            ]
        )
    elif found:
        rows = [
            (
                li.exchange,
                li.topic,
                li.server,
                li.node.address,
                li.node.hostname,
                shorten(li.node.instance),
                li.node.model,
                str(li.node.pid),
                duration(li.age),
            )
            for li in found
        ]
        print_table(("exchange", "topic", "server", "address", "host", "instance", "model", "pid", "age"), rows, numbers=2)
    return OK
