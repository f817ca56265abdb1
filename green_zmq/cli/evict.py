# SPDX-License-Identifier: Apache-2.0
"""``green-zmq evict``: remove processes from the directory that will not come back, without waiting for their records to
expire.
"""

from __future__ import annotations

import argparse
import logging

from green_zmq.cli.common import OK, note, open_directory, print_records, print_table, set_up_logging
from green_zmq.cli.nodes import count, find, listings, record, shorten


def run(args: argparse.Namespace) -> int:
    set_up_logging(logging.ERROR)
    with open_directory(args.url) as directory:
        found = listings(directory)
        nodes = find((li.node for li in found), args.nodes)
        if not args.dry_run:
            for node in nodes:
                directory.withdraw(node.instance)
    served = {node: [li for li in found if li.node == node] for node in nodes}
    if args.json:
        print_records(
            [
                {
                    **record(node),
                    "listeners": [{"exchange": li.exchange, "topic": li.topic, "server": li.server} for li in served[node]],
                }
                for node in nodes
            ]
        )
    else:
        rows = [
            (node.address, node.hostname, shorten(node.instance), node.model, str(node.pid), str(len(served[node])))
            for node in nodes
        ]
        print_table(("address", "host", "instance", "model", "pid", "listeners"), rows, numbers=2)
    what = count(len(nodes), "process", "processes")
    if args.dry_run:
        note(f"{what} would be removed.")
    else:
        note(f"{what} removed; if one still runs, it registers again within zmq_target_update seconds.")
    return OK
