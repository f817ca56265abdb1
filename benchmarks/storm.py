# SPDX-License-Identifier: Apache-2.0
"""What it costs a client that all its peers are away and come back at once, and that many come and go."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable

from benchmarks import TOPIC, WORK
from green_zmq.bench.processes import MODELS, Process
from green_zmq.bench.scenarios import spread

# How long the peers are away, and the most that it may take until all have answered, seconds.
AWAY, LIMIT = 10.0, 60.0


class Watch:
    """What the client does within some time."""

    def __init__(self, client: Process, cpu: float) -> None:
        self._client = client
        self._cpu = cpu
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def cpu(self) -> float:
        """It may be busy with a call, so the system is asked."""
        return cpu(self._client) - self._cpu


def cpu(process: Process) -> float:
    with open(f"/proc/{process.pid}/stat") as file:  # noqa: PTH123
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def watch(client: Process) -> Watch:
    return Watch(client, cpu(client))


def storm(client: Process, url: str, names: list[str], what: str, come_back: Callable[[], None]) -> None:
    """Call everybody while they are away, and have them come back."""
    while client.ask("counts")["connections open"]:
        time.sleep(0.05)
    before = client.ask("counts")
    client.tell("reach_together", url=url, servers=names, timeout=AWAY + LIMIT)
    time.sleep(1)  # what making so many calls costs is not what is looked for
    away = watch(client)
    time.sleep(AWAY - 1)
    share = away.cpu / away.seconds * 100
    back = watch(client)
    come_back()
    served = back.seconds
    reached = client.answer()
    seconds, used = back.seconds, back.cpu
    after = client.ask("counts")
    attempts = after["connections attempted"] - before["connections attempted"]
    print(
        f"  {what:8} away: {share:5.1f} % of a core; back within {served:4.1f} s, all answered after {seconds:4.1f} s "
        f"and {used:4.2f} CPU s; {attempts} attempts ({attempts / len(names):.1f} each), {reached['errors']} not reached",
        flush=True,
    )


def measure(model: str, url: str, peers: int, processes: int) -> None:
    parts = spread(peers, processes)
    everybody = [name for part in parts for name in part]
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(Process(model, WORK))
        servers = [stack.enter_context(Process(model, WORK)) for _ in parts]
        for server, some in zip(servers, parts, strict=True):
            server.ask("serve", url=url, topic=TOPIC, servers=some)
        client.ask("reach_together", url=url, servers=everybody, timeout=LIMIT)
        print(f"{model}: {peers} peers in {processes} processes", flush=True)

        def go_on() -> None:
            for server in servers:
                os.kill(server.pid, signal.SIGCONT)

        def start_anew() -> None:
            anew = [stack.enter_context(Process(model, WORK)) for _ in parts]
            for server, some in zip(anew, parts, strict=True):
                server.tell("serve", url=url, topic=TOPIC, servers=some)
            for server in anew:
                server.answer()

        for server in servers:
            os.kill(server.pid, signal.SIGSTOP)
        storm(client, url, everybody, "paused", go_on)
        for server in servers:
            os.kill(server.pid, signal.SIGKILL)
        storm(client, url, everybody, "killed", start_anew)


def come_and_go(model: str, url: str, rounds: int) -> None:
    with Process(model, WORK) as client, Process(model, WORK) as server:
        figures: list[dict[str, float]] = []
        for i in range(rounds + 2):  # two to warm up
            names = [f"server-{i}-{n}" for n in range(50)]
            server.ask("serve", url=url, topic=TOPIC, servers=names)
            client.ask("reach_together", url=url, servers=names, timeout=LIMIT)
            server.ask("leave", topic=TOPIC)
            while client.ask("counts")["connections open"]:
                time.sleep(0.01)
            if i:
                figures.append(client.ask("held"))
        for what in ("descriptors", "MiB"):
            values = [figure[what] for figure in figures]
            print(
                f"  {rounds * 50} peers come and go: {what} {values[0]:.5g}, then {values[-1]:.5g}, at most {max(values):.5g}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="some of %(default)s")
    parser.add_argument("--peers", type=int, default=300, help="%(default)s")
    parser.add_argument("--processes", type=int, default=4, help="that the peers are spread over (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="of 50 peers that come and go (%(default)s)")
    options = parser.parse_args()
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            url = f"zmq://?directory_path={folder}/directory.sqlite"
            measure(model, f"{url}&heartbeat_interval=1", options.peers, options.processes)
            come_and_go(model, url, options.rounds)


if __name__ == "__main__":
    main()
