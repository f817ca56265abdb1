# SPDX-License-Identifier: Apache-2.0
"""CPU use and context switches of processes that have many peers and nothing to do."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time

from benchmarks import TOPIC, WORK
from green_zmq.bench.processes import MODELS, Process
from green_zmq.bench.scenarios import spread


def measure(model: str, url: str, peers: int, processes: int, seconds: float) -> None:
    with contextlib.ExitStack() as stack:
        names = spread(peers, processes)
        everybody = [name for some in names for name in some]
        control, client, *servers = (stack.enter_context(Process(model, WORK)) for _ in range(len(names) + 2))
        for server, some in zip(servers, names, strict=True):
            server.ask("serve", url=url, topic=TOPIC, servers=some)
        start = time.monotonic()
        client.ask("reach", url=url, topic=TOPIC, servers=everybody)
        print(f"{model}: {peers} peers reached in {time.monotonic() - start:.1f} s", flush=True)
        time.sleep(2)  # what follows a call: acknowledgements, garbage
        watched = {"client": client, "without a driver": control}
        watched |= {f"server {i} of {len(names[i])}": server for i, server in enumerate(servers)}
        before = {name: process.ask("usage") for name, process in watched.items()}
        start = time.monotonic()
        time.sleep(seconds)
        for name, process in watched.items():
            after, passed = process.ask("usage"), time.monotonic() - start
            cpu = (after["cpu"] - before[name]["cpu"]) / passed * 100
            switches = (after["switches"] - before[name]["switches"]) / passed
            print(f"  {name:20} {cpu:6.2f} % of a core {switches:8.1f} voluntary switches/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="some of %(default)s")
    parser.add_argument("--peers", type=int, default=100, help="%(default)s")
    parser.add_argument("--processes", type=int, default=4, help="that the peers are spread over (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="%(default)s")
    options = parser.parse_args()
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            url = f"zmq://?directory_path={folder}/directory.sqlite"
            measure(model, url, options.peers, options.processes, options.seconds)


if __name__ == "__main__":
    main()
