# SPDX-License-Identifier: Apache-2.0
"""Run the tests with real faults so many times, and print what they measured: ``python -m tests.faults --times 20``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

_FIXED = ("notice", "recover", "lost", "twice")


def run(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What the tests told, and the names of those that failed, one for each time."""
    figures, failed = (options.figures or folder / "figures").absolute(), []
    for number in range(options.times):
        report = folder / "report.xml"
        command = [sys.executable, "-m", "pytest", "--quiet", f"--junitxml={report}", "--numprocesses", str(options.processes)]
        command += ["--dist", "load", *options.tests]
        print(f"run {number + 1} of {options.times}", file=sys.stderr, flush=True)
        done = subprocess.run(
            command, env={**os.environ, "GREEN_ZMQ_FIGURES": str(figures)}, capture_output=True, text=True, check=False
        )
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
        bad = [
            f"{c.get('classname')}::{c.get('name')}"
            for c in cases
            if c.find("failure") is not None or c.find("error") is not None
        ]
        if done.returncode not in (0, 1) or (bad and options.verbose):
            print(done.stdout[-20_000:], done.stderr[-2000:], file=sys.stderr)
        if done.returncode not in (0, 1):
            raise SystemExit(f"pytest ended with {done.returncode}")
        failed += bad
    return [json.loads(line) for line in figures.read_text().splitlines()] if figures.exists() else [], failed


def number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def seconds(values: list[float]) -> str:
    return f"{number(median(values))} ({number(max(values))})" if values else ""


def rows(told: list[dict[str, Any]]) -> list[list[str]]:
    groups: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for each in told:
        groups[each.pop("fault"), each.pop("model")].append(each)
    table = []
    for (fault, model), each in sorted(groups.items()):
        values = {
            name: [e[name] for e in each if name in e] for name in dict.fromkeys(n for e in each for n in e) if name != "test"
        }
        others = [f"{name.replace('_', ' ')} {seconds(values[name])}" for name in values if name not in _FIXED]
        row = [fault, model, str(len(each)), seconds(values.get("notice", [])), seconds(values.get("recover", []))]
        row += [number(sum(values[name])) if name in values else "" for name in ("lost", "twice")]
        table.append([*row, "; ".join(others)])
    return table


HEADS = ["fault", "model", "runs", "noticed after s", "recovered after s", "lost", "run twice", "besides"]


MARK = ".. The table is written by the command above.\n"


def written(table: list[list[str]]) -> str:
    """As a list-table of reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [HEADS, *table]:
        lines += [f"   {'*' if not i else ' '} - {cell}".rstrip() for i, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--times", type=int, default=1, help="how often each test is run")
    parser.add_argument("--processes", type=int, default=2, help="that run tests side by side; they mostly wait")
    parser.add_argument("--verbose", action="store_true", help="print what pytest says of those that fail")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="add what is measured to what was kept there before")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table into this document as well")
    parser.add_argument("tests", nargs="*", default=["tests/faults"], help="as for pytest; by default all of tests/faults")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told, failed = run(options, Path(folder))
    table = rows(told)
    shown = Table(*HEADS, title="Medians, and the worst in brackets")
    for row in table:
        shown.add_row(*row)
    Console(width=200).print(shown)
    if options.write:
        options.write.write_text(f"{options.write.read_text().partition(MARK)[0]}{MARK}\n{written(table)}")
    for name in failed:
        print(f"FAILED {name}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
