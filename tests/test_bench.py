# SPDX-License-Identifier: Apache-2.0
"""``green-zmq bench``: what it makes of its rounds, and that it measures what it says in each model."""

from __future__ import annotations

import json
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from green_zmq.bench import report, runs
from green_zmq.bench.scenarios import BARE, DRIVER, SCENARIOS, Ratio, Round, Scenario, can, middle, ratios, spread, turns
from tests.commands import COMMAND

ROUND = Round(1000.0, 1.0, 2.0, 100.0, 100.0, 0)


def test_names_are_distinct_and_tell_what_is_measured() -> None:
    names = [scenario.name for scenario in SCENARIOS]
    assert len(set(names)) == len(names)
    assert {"call-1", "call-64x4", "call-1-16MiB", "fanout-1x64"} <= set(names)


def test_the_middle_of_rounds() -> None:
    rounds = [ROUND._replace(rate=rate, p50=p50, lost=1) for rate, p50 in ((1.0, 9.0), (3.0, 7.0), (2.0, 8.0))]
    assert middle(rounds) == ROUND._replace(rate=2.0, p50=8.0, lost=3)


def test_ratios_are_those_of_rounds_beside_each_other() -> None:
    found = ratios(
        {
            DRIVER: [ROUND._replace(rate=rate) for rate in (10.0, 100.0, 1000.0)],
            "other": [ROUND._replace(rate=rate) for rate in (10.0, 50.0, 250.0)],
        }
    )
    assert found == {"other": Ratio(2.0, 1.0, 4.0)}


def test_there_is_no_ratio_to_what_did_nothing() -> None:
    assert ratios({DRIVER: [ROUND], "other": [ROUND._replace(rate=0.0)]}) == {}


@given(st.integers(1, 100), st.integers(1, 8))
def test_servers_are_spread_evenly_and_each_is_there_once(servers: int, processes: int) -> None:
    shares = spread(servers, processes)
    assert sorted(name for share in shares for name in share) == sorted(f"server-{i}" for i in range(servers))
    assert len(shares) == min(servers, processes)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_each_goes_first_in_turn() -> None:
    assert [list(turns(["a", "b"], i)) for i in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_a_picture(tmp_path: Path) -> None:
    outcomes = [
        runs.Outcome("threads", SCENARIOS[0], {DRIVER: ROUND, BARE: ROUND}, {BARE: Ratio(1.0, 0.9, 1.1)}),
        runs.Outcome("threads", Scenario("cast", 1), {DRIVER: ROUND, "rabbit": ROUND}, {"rabbit": Ratio(4.0, 3.0, 5.0)}),
    ]
    report.plot(outcomes, str(tmp_path / "bench.svg"))
    report.plot(outcomes, str(tmp_path / "bench.png"))
    text = "".join(ET.parse(tmp_path / "bench.svg").getroot().itertext())
    assert "times bare" in text
    assert "times rabbit" in text
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["threads", "eventlet", "gevent"])
def test_every_scenario_is_measured(model: str) -> None:
    command = [*COMMAND, "bench", "--models", model, "--rounds", "1", "--seconds", "0.05", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [each["scenario"] for each in found["scenarios"]] == [scenario.name for scenario in SCENARIOS]
    for scenario, each in zip(SCENARIOS, found["scenarios"], strict=True):
        assert set(each["contenders"]) == {name for name in (DRIVER, BARE) if can(name, scenario)}
        for of in each["contenders"].values():
            assert of["rate"] > 0
            assert of["lost"] == 0
    (footprint,) = found["footprints"]
    assert 0 < footprint["imports"] < footprint["first"]
    assert footprint["memory"] > 10
