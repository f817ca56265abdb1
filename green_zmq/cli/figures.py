# SPDX-License-Identifier: Apache-2.0
"""``green-zmq figures``: what the processes that listen have counted."""

from __future__ import annotations

import argparse
import logging
from typing import Final

from green_zmq.cli.common import OK, TIMEOUT, Failure, note, open_directory, print_records, print_table, set_up_logging
from green_zmq.cli.nodes import NOTHING, count, find, listings, record

# Of the connections that a process has made to others.
_COLUMNS: Final = ("open", "reused", "opened", "closed", "evicted", "failed")


def run(args: argparse.Namespace) -> int:
    set_up_logging(logging.ERROR)
    with open_directory(args.url) as directory:
        nodes = list(dict.fromkeys(li.node for li in listings(directory)))
    if args.nodes:
        nodes = find(nodes, args.nodes)
    elif not nodes:
        note(NOTHING)
    nodes.sort(key=lambda node: (node.hostname, node.port))
    from green_zmq.inspection import ask

    answers = ask(nodes, args.timeout)
    if args.json:
        print_records([{**record(node), "figures": answers.get(node)} for node in nodes])
    elif nodes:
        rows = []
        for node in nodes:
            counts = answers.get(node)
            cells = ["no answer", *[""] * (len(_COLUMNS) - 1)]
            if counts is not None:
                cells = [str(counts.get(f"connections {column}", 0)) for column in _COLUMNS]
            rows.append((node.address, node.hostname, node.model, str(node.pid), *cells))
        print_table(("address", "host", "model", "pid", *_COLUMNS), rows, numbers=1 + len(_COLUMNS))
    silent = len(nodes) - len(answers)
    if silent:
        raise Failure(
            TIMEOUT,
            f"{silent} of {count(len(nodes), 'process', 'processes')} did not answer within {args.timeout:g} s: stuck, out of "
            "reach from here, or of another release. One that is lost for good is removed by 'green-zmq evict'.",
        )
    return OK
