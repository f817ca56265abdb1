# SPDX-License-Identifier: Apache-2.0
"""How late a green thread that wakes every 10 ms is at most, while the driver does what could block the hub."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from benchmarks import TOPIC, WORK
from green_zmq.bench.processes import Process

# Nobody listens at the one; packets to the other, of a network for examples (RFC 5737), get no answer or no route.
_CLOSED = ("127.0.0.1", 1)
_UNROUTABLE = ("192.0.2.1", 49999)


def watch(what: str, name: str, processes: dict[str, Process], **arguments: Any) -> None:
    """Have the client do something; how late were the tickers of these processes?"""
    for process in processes.values():
        process.ask("start_ticker")
    result = processes["client"].ask(name, **arguments)
    print(f"  {what}{': ' if result else ''}{result}")
    for who, process in processes.items():
        late = process.ask("stop_ticker")
        print(
            f"    {who}: {late['max']:.1f} ms late at most; {late['above 10 ms']} of {late['ticks']} ticks above 10 ms",
            flush=True,
        )


def measure(model: str, url: str, seconds: float) -> None:
    print(model)
    with Process(model, WORK) as server, Process(model, WORK) as client:
        both = {"client": client, "server": server}
        alone = {"client": client}
        for process in both.values():
            process.ask("make_large")
            process.ask("freeze")
        watch("without the driver", "idle", alone, seconds=seconds)
        server.ask("serve", url=url, topic=TOPIC, servers=["one"])
        client.ask("reach", url=url, topic=TOPIC, servers=["one"])
        watch("idle", "idle", both, seconds=seconds)
        watch("64 callers", "load", both, url=url, callers=64, seconds=seconds)
        for name, (host, port) in (("closed", _CLOSED), ("unroutable", _UNROUTABLE)):
            client.ask("announce_dead", url=url, host=host, port=port, server=name)
            watch(f"call to a port that is {name}", "call_dead", alone, url=url, server=name, timeout=seconds)
        for _ in range(2):
            watch("64 MiB sent", "send_large", both, url=url, server="one")
            watch("64 MiB received", "receive_large", both, url=url, server="one")
        print("  " + client.ask("cast_dead", url=url, server="unroutable", size=1 << 20, count=20))
        watch("shutdown with 20 MiB pending", "clean_up", alone, url=url)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="eventlet,gevent", help="some of %(default)s")
    parser.add_argument("--seconds", type=float, default=5, help="of those that have no end of their own (%(default)s)")
    options = parser.parse_args()
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            measure(model, f"zmq://?directory_path={folder}/directory.sqlite", options.seconds)


if __name__ == "__main__":
    main()
