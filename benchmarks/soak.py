# SPDX-License-Identifier: Apache-2.0
"""Many calls from many callers, each with a value of its own: is each executed once, answered once and rightly, in time?

Ends with 1 if anything is wrong: a call lost, executed twice, answered wrongly or twice, or slower than a second.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

from benchmarks import TOPIC, WORK
from green_zmq.bench.processes import MODELS, Process

# What the driver counts when an answer comes a second time.
_TWICE = "answers nobody waits for"


def soak(model: str, url: str, calls: int, callers: int, part: int) -> bool:
    """Whether all is well."""
    problems = 0
    worst = seconds = 0.0
    medians = []
    with Process(model, WORK) as server, Process(model, WORK) as client:
        print(f"{model}: {calls} calls by {callers} callers; server {server.pid}, client {client.pid}", flush=True)
        server.ask("serve", url=url, topic=TOPIC, servers=["one"])
        # In parts, so that what goes wrong is shown when it happens.
        for first in range(1, calls + 1, part):
            count = min(part, calls + 1 - first)
            result = client.ask("soak", url=url, callers=callers, first=first, count=count)
            done = server.ask("executed", first=first, count=count)
            seconds += result["seconds"]
            worst = max(worst, result["max"])
            medians.append(result["median"])
            for what, found in (
                ("lost", result["lost"]),
                ("answered wrongly", result["wrong"]),
                ("executed twice", done["twice"]),
                ("never executed", done["never"]),
                ("slower than 1 s (latency, begun at, value)", result["slow"]),
            ):
                if found:
                    problems += len(found)
                    print(f"  {what}: {len(found)} of the calls from {first} on, such as {found[:5]}", flush=True)
        counts = {"client": client.ask("counts"), "server": server.ask("counts")}
    twice = counts["client"].get(_TWICE, 0)
    problems += twice
    print(
        f"  {calls / seconds:.0f} calls/s, median {sorted(medians)[len(medians) // 2] * 1000:.1f} ms, max {worst * 1000:.1f} ms"
    )
    print(f"  answered twice: {twice}; problems: {problems}")
    for name, counted in counts.items():
        print(f"  the {name}'s driver counted: {counted}", flush=True)
    return not problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, help="each in turn if not given")
    parser.add_argument("--calls", type=int, default=100_000, help="%(default)s")
    parser.add_argument("--callers", type=int, default=64, help="%(default)s")
    parser.add_argument("--part", type=int, default=10_000, help="calls between two looks (%(default)s)")
    parser.add_argument("--url", help="instead of zmq:// with a directory of its own")
    options = parser.parse_args()
    well = True
    for model in [options.model] if options.model else MODELS:
        with tempfile.TemporaryDirectory() as folder:
            url = options.url or f"zmq://?directory_path={folder}/directory.sqlite"
            well &= soak(model, url, options.calls, options.callers, options.part)
    sys.exit(not well)


if __name__ == "__main__":
    main()
