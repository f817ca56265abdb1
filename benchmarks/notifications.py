# SPDX-License-Identifier: Apache-2.0
"""Notifications per second through oslo.messaging: stored, and processed by a listener, over each store in turn."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from processes import MODELS, Process

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.servers import RedisServer

Result = dict[str, Any]


def one_round(notifier: Process, listener: Process, url: str, topic: str, options: argparse.Namespace) -> Result:
    cpu = notifier.ask("usage")["cpu"], listener.ask("usage")["cpu"]
    sent = notifier.ask("notify", url=url, topic=topic, notifiers=options.notifiers, seconds=options.seconds, size=options.size)
    last = listener.ask("notified", topic=topic, count=sent["total"])
    count = sent["count"]
    return {
        "rate": count / (last - sent["began"]),
        "stored": count / (sent["ended"] - sent["began"]),
        "p50": sent["p50"],
        "p99": sent["p99"],
        "notifier": (notifier.ask("usage")["cpu"] - cpu[0]) / count * 1e6,
        "listener": (listener.ask("usage")["cpu"] - cpu[1]) / count * 1e6,
    }


def idle_percent(process: Process, seconds: float) -> float:
    """Of a core, while nothing happens."""
    time.sleep(min(seconds, 2.0))
    before = process.ask("usage")["cpu"]
    time.sleep(seconds)
    return float((process.ask("usage")["cpu"] - before) / seconds * 100) if seconds else 0.0


def measure(model: str, options: argparse.Namespace, contenders: dict[str, str]) -> Result:
    with contextlib.ExitStack() as stack:
        notifier, listener = (stack.enter_context(Process(model)) for _ in range(2))
        topics = {name: f"benchmark-{uuid.uuid4().hex[:8]}" for name in contenders}
        for name, url in contenders.items():
            listener.ask("listen", url=url, topic=topics[name])
            one_round(notifier, listener, url, topics[name], options)  # warm up
        rounds: dict[str, list[Result]] = {name: [] for name in contenders}
        for i in range(options.rounds):
            # Each goes first in turn, so that a drift of the machine favours none.
            for name in list(contenders)[:: -1 if i % 2 else 1]:
                rounds[name].append(one_round(notifier, listener, contenders[name], topics[name], options))
        idle = idle_percent(listener, options.idle)
    result: Result = {"model": model, "idle": idle}
    for name, results in rounds.items():
        result[name] = {key: median(each[key] for each in results) for key in results[0]}
        if "url" in rounds and name != "url":
            ratios = [a["rate"] / b["rate"] for a, b in zip(results, rounds["url"], strict=True)]
            result[name] |= {"ratio": median(ratios), "least": min(ratios), "most": max(ratios)}
    return result


def show(result: Result) -> None:
    for name, row in result.items():
        if isinstance(row, dict):
            ratio = f"{row['ratio']:.2f} ({row['least']:.2f}-{row['most']:.2f})" if "ratio" in row else ""
            print(
                f"{result['model']:9}{name:8}{row['rate']:12.0f}  {ratio:18}{row['stored']:9.0f}"
                f"{row['p50']:8.2f}{row['p99']:8.2f}{row['notifier']:10.0f}{row['listener']:10.0f}",
                flush=True,
            )
    print(f"{result['model']:9}idle: {result['idle']:.2f} % of a core, for the listeners to all of these", flush=True)


@contextlib.contextmanager
def stores(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder, RedisServer() as server:
        found = {
            "sqlite": f"zmq://?directory_path={folder}/directory.sqlite",
            "redis": f"zmq+redis://{server.address}/0",
        }
        if options.url:
            found["url"] = options.url
        yield {name: found[name] for name in options.only.split(",")} if options.only else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="some of %(default)s")
    parser.add_argument("--notifiers", type=int, default=1, help="that send at the same time (%(default)s)")
    parser.add_argument("--size", type=int, default=500, help="characters of the payload (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of sending in one round of one contender (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each contender (%(default)s)")
    parser.add_argument(
        "--idle", type=float, default=10.0, help="seconds for which listeners without work are looked at (%(default)s)"
    )
    parser.add_argument("--url", help="a further contender: any transport URL")
    parser.add_argument("--only", help="names of contenders (sqlite,redis,url)")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each model")
    options = parser.parse_args()
    if not options.json:
        print("model    store    processed/s  of the url         stored/s  p50 ms  p99 ms  CPU us of notifier, listener")
    with stores(options) as contenders:
        for model in options.models.split(","):
            result = measure(model, options, contenders)
            if options.json:
                print(json.dumps(result), flush=True)
            else:
                show(result)


if __name__ == "__main__":
    main()
