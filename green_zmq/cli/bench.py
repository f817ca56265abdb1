# SPDX-License-Identifier: Apache-2.0
"""``green-zmq bench``: the driver beside a bare loop, and beside any other transport."""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from green_zmq.bench import footprint, report, runs
from green_zmq.bench.processes import Ended
from green_zmq.bench.scenarios import BARE, SCENARIOS, Scenario, can
from green_zmq.cli.common import OK, UNDELIVERED, USAGE, Failure, print_table


def run(args: argparse.Namespace) -> int:
    scenarios = _chosen(args.scenarios)
    _check(args.models, args.plot)
    outcomes: list[runs.Outcome] = []
    footprints: dict[tuple[str, str], footprint.Footprint] = {}
    with tempfile.TemporaryDirectory() as folder, _progress() as progress:
        names = runs.contenders(folder, args.url, 1)
        rounds = args.rounds * sum(can(name, scenario) for scenario in scenarios for name in names)
        task = progress.add_task("", total=(rounds + len(names) - 1) * len(args.models))
        for model in args.models:
            try:
                with runs.fleet(model, args.oslo_executors) as fleet:
                    for scenario in scenarios:
                        progress.update(task, description=f"{model}: {scenario.text}")
                        urls = runs.contenders(folder, args.url, scenario.servers)
                        outcomes.append(
                            fleet.measure(scenario, urls, args.rounds, args.seconds, lambda: progress.advance(task))
                        )
                    progress.update(task, description=f"{model}: what a process takes")
                    for name, url in names.items():
                        if name != BARE:
                            footprints[model, name] = footprint.measure(fleet, url)
                            progress.advance(task)
            except Ended as error:
                raise Failure(UNDELIVERED, f"The benchmark failed in a process of {model}: {error}") from None
    if args.plot:
        _plot(outcomes, args.plot)
    if args.json:
        print(json.dumps(report.as_json(outcomes, footprints), indent=2))
    else:
        head = report.head(outcomes)
        print_table(head, report.rows(outcomes), len(head) - 2)
        print_table(report.FOOTPRINT_HEAD, [report.footprint_row(*key, of) for key, of in footprints.items()], 7)
    return OK


def _chosen(names: Sequence[str]) -> list[Scenario]:
    found = {scenario.name: scenario for scenario in SCENARIOS}
    for name in names:
        if name not in found:
            raise Failure(USAGE, f"There is no scenario {name}; choose among {', '.join(found)}.")
    return [found[name] for name in names] or list(SCENARIOS)


def _check(models: Sequence[str], plot: str | None) -> None:
    """What would only fail after minutes."""
    for model in models:
        if model != "threads" and importlib.util.find_spec(model) is None:
            raise Failure(USAGE, f"{model} is not installed; install green_zmq[{model}], or leave it out of --models.")
    if plot is not None:
        if Path(plot).suffix not in (".svg", ".png"):
            raise Failure(USAGE, f"--plot {plot}: a picture is written as .svg or .png.")
        if not Path(plot).absolute().parent.is_dir():
            raise Failure(USAGE, f"--plot {plot}: there is no such folder.")
        if importlib.util.find_spec("matplotlib") is None:
            raise Failure(USAGE, "--plot needs matplotlib: install green_zmq[bench].")


def _plot(outcomes: Sequence[runs.Outcome], path: str) -> None:
    try:
        report.plot(outcomes, path)
    except OSError as error:
        raise Failure(UNDELIVERED, f"The picture cannot be written: {error}.") from None


def _progress() -> Progress:
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
