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

# The server that nobody else has called; servers that do nothing.
ALONE = "alone"
IDLE = "idle"


class Caller:
    """A client, and the server that it calls."""

    def __init__(self, client: Process, topic: str) -> None:
        self.client = client
        self.topic = topic

    def rate(self, url: str, callers: int, seconds: float) -> float:
        """Calls a second."""
        how: dict[str, Any] = {"pattern": "call", "senders": callers, "size": 100, "seconds": seconds}
        sent = self.client.ask("send", url=url, topic=self.topic, **how)
        return float(sent["count"] / (sent["ended"] - sent["began"]))


def compare(what: str, crowded: Caller, alone: Caller, url: str, options: argparse.Namespace) -> None:
    """How much longer a call takes, in turn, as the machine changes meanwhile."""
    for callers in options.callers:
        found = []
        for i in range(options.rounds + 1):
            turn = (crowded, alone) if i % 2 else (alone, crowded)
            rates = {each: each.rate(url, callers, options.seconds) for each in turn}
            if i:  # the first warms up
                found.append((rates[alone] / rates[crowded] - 1) * 100)
        print(f"  {callers} callers, {what}: {median(found):+.1f} % ({min(found):+.1f} to {max(found):+.1f})", flush=True)


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
        server, lonely, client, other, *crowd = (stack.enter_context(Process(model, WORK)) for _ in range(len(shares) + 4))
        print(f"{model}: {options.peers} peers in {len(crowd)} processes", flush=True)
        server.ask("serve", url=url, topic=TOPIC, servers=["one"])
        lonely.ask("serve", url=url, topic=ALONE, servers=["one"])
        client.ask("reach", url=url, topic=TOPIC, servers=["one"])
        to_crowded, to_alone = Caller(client, TOPIC), Caller(client, ALONE)
        compare("before there is anybody else", to_crowded, to_alone, url, options)
        empty = server.ask("held")
        for process, share in zip(crowd, shares, strict=True):
            process.ask("call_once", url=url, count=len(share))
        compare("with idle clients at the server", to_crowded, to_alone, url, options)
        full = server.ask("held")
        for process in crowd:
            process.ask("hang_up")
        for what in ("MiB", "descriptors"):
            print(
                f"  the server with them: {full[what]:.1f} {what}, without {empty[what]:.1f}: {full[what] - empty[what]:+.1f}"
            )
        for process, share in zip(crowd, shares, strict=True):
            process.ask("serve", url=url, topic=IDLE, servers=share)
            client.ask("reach", url=url, topic=IDLE, servers=share)
        of_other = Caller(other, ALONE)
        compare("with idle servers at the client", to_alone, of_other, url, options)
        with standing_still(crowd):
            compare("with idle servers at the client, which stand still", to_alone, of_other, url, options)
        for process in crowd:
            process.ask("leave", topic=IDLE)
        compare("when they have left", to_alone, of_other, url, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="some of %(default)s")
    parser.add_argument("--peers", type=int, default=1000, help="%(default)s")
    parser.add_argument("--processes", type=int, default=4, help="that the peers are spread over (%(default)s)")
    parser.add_argument("--callers", default="1,64", help="numbers of concurrent callers (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.4, help="of one round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=11, help="%(default)s")
    options = parser.parse_args()
    options.callers = [int(each) for each in options.callers.split(",")]
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            measure(model, f"zmq://?directory_path={folder}/directory.sqlite", options)


if __name__ == "__main__":
    main()
