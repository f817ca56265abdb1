# SPDX-License-Identifier: Apache-2.0
"""What many peers that do nothing cost: the memory of a server, and the time that a call of somebody else takes."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from benchmarks import TOPIC, WORK
from green_zmq.bench.processes import MODELS, Process
from green_zmq.bench.scenarios import spread

# Of other servers, which the client that calls has called once.
OTHERS = "others"


def rates(client: Process, url: str, options: argparse.Namespace) -> dict[int, float]:
    """Calls a second, by the number of callers."""
    found: dict[int, list[float]] = {callers: [] for callers in options.callers}
    for _ in range(options.rounds):
        for callers, each in found.items():
            how: dict[str, Any] = {"pattern": "call", "senders": callers, "size": 100, "seconds": options.seconds}
            sent = client.ask("send", url=url, topic=TOPIC, **how)
            each.append(sent["count"] / (sent["ended"] - sent["began"]))
    return {callers: median(each) for callers, each in found.items()}


def report(what: str, before: dict[int, float], now: dict[int, float], after: dict[int, float]) -> None:
    """The machine changes meanwhile: what is now is compared to the mean of what was before, and is afterwards."""
    for callers, rate in now.items():
        without = (before[callers] + after[callers]) / 2
        print(
            f"  {callers} callers, {what}: {rate:,.0f} calls/s, without {before[callers]:,.0f} and {after[callers]:,.0f}: "
            f"{(without / rate - 1) * 100:+.1f} % time for one",
            flush=True,
        )


@contextlib.contextmanager
def standing_still(processes: Sequence[Process]) -> Iterator[None]:
    """What is done for their connections is done, and what they do themselves on the same cores is not: their own upkeep."""
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)


def measure(model: str, url: str, options: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        shares = spread(options.peers, options.processes)
        server, client, *crowd = (stack.enter_context(Process(model, WORK)) for _ in range(len(shares) + 2))
        print(f"{model}: {options.peers} peers in {len(crowd)} processes", flush=True)
        server.ask("serve", url=url, topic=TOPIC, servers=["one"])
        rates(client, url, options)  # warm up
        before, empty = rates(client, url, options), server.ask("held")
        for process, share in zip(crowd, shares, strict=True):
            process.ask("call_once", url=url, count=len(share))
        now, full = rates(client, url, options), server.ask("held")
        for process in crowd:
            process.ask("hang_up")
        after = rates(client, url, options)
        report("with idle clients at the server", before, now, after)
        for what in ("MiB", "descriptors"):
            print(
                f"  the server with them: {full[what]:.1f} {what}, without {empty[what]:.1f}: {full[what] - empty[what]:+.1f}"
            )
        for process, share in zip(crowd, shares, strict=True):
            process.ask("serve", url=url, topic=OTHERS, servers=share)
            client.ask("reach", url=url, topic=OTHERS, servers=share)
        now = rates(client, url, options)
        with standing_still(crowd):
            still = rates(client, url, options)
        for process in crowd:
            process.ask("leave", topic=OTHERS)
        without = rates(client, url, options)
        report("with idle servers at the client", after, now, without)
        report("with idle servers at the client, which stand still", after, still, without)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="some of %(default)s")
    parser.add_argument("--peers", type=int, default=1000, help="%(default)s")
    parser.add_argument("--processes", type=int, default=4, help="that the peers are spread over (%(default)s)")
    parser.add_argument("--callers", default="1,64", help="numbers of concurrent callers (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s")
    options = parser.parse_args()
    options.callers = [int(each) for each in options.callers.split(",")]
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            measure(model, f"zmq://?directory_path={folder}/directory.sqlite", options)


if __name__ == "__main__":
    main()
