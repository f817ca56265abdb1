# SPDX-License-Identifier: Apache-2.0
"""Outcomes as a table, as JSON and as a picture."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from green_zmq.bench.footprint import Footprint
from green_zmq.bench.runs import Outcome
from green_zmq.bench.scenarios import DRIVER, Ratio, Round

_PACKAGES: Final = ("green_zmq", "oslo.messaging", "pyzmq", "eventlet", "gevent")


def head(outcomes: Sequence[Outcome]) -> list[str]:
    return ["model", "what", "a second", "p50 ms", "p99 ms", "CPU us", *(f"times {name}" for name in _others(outcomes))]


def rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    others = _others(outcomes)
    return [_row(outcome, others) for outcome in outcomes]


def _row(outcome: Outcome, others: Sequence[str]) -> list[str]:
    ours = outcome.rounds[DRIVER]
    lost = f" ({ours.lost} lost)" if ours.lost else ""
    cells = [outcome.model, outcome.scenario.text, f"{ours.rate:,.0f}{lost}", f"{ours.p50:.3g}", f"{ours.p99:.3g}"]
    cells.append(f"{ours.client:,.0f} + {ours.server:,.0f}")
    return cells + [_ratio(outcome.ratios.get(name)) for name in others]


FOOTPRINT_HEAD: Final = [
    "model",
    "over",
    "imports s",
    "driver s",
    "first answer s",
    "MiB",
    "KiB a peer",
    "wake-ups/s",
    "idle %",
]


def footprint_row(model: str, name: str, of: Footprint) -> list[str]:
    values = [f"{of.imports:.2f}", f"{of.driver:.2f}", f"{of.first:.2f}", f"{of.memory:.0f}", f"{of.peer:.0f}"]
    return [model, name, *values, f"{of.wakeups:.1f}", f"{of.idle:.2f}"]


def as_json(outcomes: Sequence[Outcome], footprints: Mapping[tuple[str, str], Footprint]) -> dict[str, Any]:
    return {
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(), **_versions()},
        "scenarios": [
            {
                "model": outcome.model,
                "scenario": outcome.scenario.name,
                "unit": outcome.scenario.unit,
                "contenders": {name: _dict(each) for name, each in outcome.rounds.items()},
                "ratios": {name: _dict(each) for name, each in outcome.ratios.items()},
            }
            for outcome in outcomes
        ],
        "footprints": [{"model": model, "over": name, **_dict(each)} for (model, name), each in footprints.items()],
    }


def plot(outcomes: Sequence[Outcome], path: str) -> None:
    """Bars of how many times as fast the driver is as each of the others.

    :param path: of an SVG or PNG file, by its ending.
    :raises ImportError: matplotlib is not installed.
    :raises OSError: it cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    others = _others(outcomes)
    figure = Figure(figsize=(1 + 5 * len(others), 1 + 0.25 * len(outcomes)), layout="constrained")
    all_axes = figure.subplots(1, len(others), squeeze=False, sharey=True)
    labels = [f"{outcome.scenario.text}  {outcome.model}" for outcome in outcomes]
    for axes, name in zip(all_axes[0], others, strict=True):
        found = [(i, outcome.ratios[name]) for i, outcome in enumerate(outcomes) if name in outcome.ratios]
        values = [ratio.median for _, ratio in found]
        spread = [[r.median - r.least for _, r in found], [r.most - r.median for _, r in found]]
        axes.barh([i for i, _ in found], values, xerr=spread, color="#2a7f62", ecolor="#888888")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_title(f"times {name}")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
    with mpl.rc_context({"svg.fonttype": "none"}):  # text is to be text, which can be searched
        figure.savefig(path)


def _others(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(name for outcome in outcomes for name in outcome.ratios))


def _ratio(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} ({ratio.least:.2f}-{ratio.most:.2f})"


def _dict(of: Round | Ratio | Footprint) -> dict[str, float]:
    return {name: round(value, 4) for name, value in of._asdict().items()}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
