# SPDX-License-Identifier: Apache-2.0
"""``green-zmq sweep``: remove from the directory what is dead."""

from __future__ import annotations

import argparse
import logging

from green_zmq.cli.common import OK, note, open_directory, print_records, print_table, set_up_logging
from green_zmq.cli.nodes import count, shorten


def run(args: argparse.Namespace) -> int:
    set_up_logging(logging.ERROR)
    with open_directory(args.url) as directory:
        dead = sorted(directory.sweep(dry_run=args.dry_run))
    if args.json:
        print_records([{**stale._asdict(), "instance": stale.instance.hex()} for stale in dead])
    elif dead:
        rows = [(stale.exchange, stale.topic, stale.server, shorten(stale.instance)) for stale in dead]
        print_table(("exchange", "topic", "server", "instance"), rows, numbers=0)
    if dead:
        note(f"{count(len(dead), 'dead listener', 'dead listeners')} {'would be removed' if args.dry_run else 'removed'}.")
    else:
        note("Nothing is dead.")
    return OK
