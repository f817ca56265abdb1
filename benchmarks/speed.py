# SPDX-License-Identifier: Apache-2.0
"""Calls per second of the driver and of a bare loop, in the same processes, round by round in turn."""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import tempfile
from collections.abc import Iterator
from statistics import median
from typing import Any

from processes import MODELS, Process

Result = dict[str, Any]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def one_round(client: Process, server: Process, url: str, callers: int, seconds: float) -> Result:
    before = client.ask("usage")["cpu"] + server.ask("usage")["cpu"]
    result: Result = client.ask("calls", url=url, callers=callers, seconds=seconds)
    used = client.ask("usage")["cpu"] + server.ask("usage")["cpu"] - before
    return {**result, "cpu": used / result["calls"] * 1000}


def measure(model: str, options: argparse.Namespace, contenders: dict[str, str]) -> Iterator[Result]:
    with contextlib.ExitStack() as stack:
        server, client = (stack.enter_context(Process(model)) for _ in range(2))
        if options.pids:
            print(f"{model}: server {server.pid}, client {client.pid}", flush=True)
        for url in contenders.values():
            server.ask("serve", url=url, servers=["one"])
            client.ask("calls", url=url, callers=max(options.callers), seconds=0.5)
        for callers in options.callers:
            rounds: dict[str, list[Result]] = {name: [] for name in contenders}
            for i in range(options.rounds):
                # Each goes first in turn, so that a drift of the machine favours none.
                for name in list(contenders)[:: -1 if i % 2 else 1]:
                    rounds[name].append(one_round(client, server, contenders[name], callers, options.seconds))
            result: Result = {"model": model, "callers": callers}
            for name, results in rounds.items():
                result[name] = {key: median(each[key] for each in results) for key in results[0]}
            if "bare" in rounds:
                for name, results in rounds.items():
                    if name != "bare":
                        ratios = [a["rate"] / b["rate"] for a, b in zip(results, rounds["bare"], strict=True)]
                        result[name] |= {"ratio": median(ratios), "least": min(ratios), "most": max(ratios)}
            yield result


def show(result: Result) -> None:
    for name, row in result.items():
        if isinstance(row, dict):
            ratio = f"{row['ratio']:.2f} ({row['least']:.2f}-{row['most']:.2f})" if "ratio" in row else ""
            print(
                f"{result['model']:9}{result['callers']:8}  {name:8}{row['rate']:8.0f}  {ratio:18}"
                f"{row['p50']:7.2f}{row['p99']:8.2f}{row['max']:8.2f}{row['cpu']:8.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="some of %(default)s")
    parser.add_argument("--callers", default="1,64", help="numbers of concurrent callers (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one round of one contender (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of each contender (%(default)s)")
    parser.add_argument("--url", help="a further contender: any transport URL")
    parser.add_argument("--only", help="names of contenders (driver,bare,url), to profile one alone")
    parser.add_argument("--query", default="", help="options of the driver, as in its URL: name=value&...")
    parser.add_argument("--pids", action="store_true", help="print the process ids, to attach a profiler to")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each model and number of callers")
    options = parser.parse_args()
    options.callers = [int(each) for each in options.callers.split(",")]
    if not options.json:
        print("model     callers  contender calls/s of the bare loop   p50 ms  p99 ms  max ms  CPU s/1000 calls")
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            contenders = {
                "driver": f"zmq://?directory_path={folder}/directory.sqlite&{options.query}".rstrip("&"),
                "bare": f"bare://127.0.0.1:{free_port()}",
            }
            if options.url:
                contenders["url"] = options.url
            if options.only:
                contenders = {name: contenders[name] for name in options.only.split(",")}
            for result in measure(model, options, contenders):
                if options.json:
                    print(json.dumps(result), flush=True)
                else:
                    show(result)


if __name__ == "__main__":
    main()
