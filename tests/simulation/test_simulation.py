# SPDX-License-Identifier: Apache-2.0
"""Simulated worlds keep their promises, whatever goes wrong in them; and would not if the protocol had a defect."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.contract.harness import ROOT
from tests.simulation.mutations import MUTATIONS
from tests.simulation.world import run

QUICK = "GREEN_ZMQ_QUICK" in os.environ


def simulate(*options: str, hash_seed: str = "random") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.mark.parametrize("seed", range(30 if QUICK else 100))
def test_known_worlds(seed: int) -> None:
    run(seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 2])
def test_fresh_worlds(part: int) -> None:
    """Others in each run. The output names the seed of one that fails."""
    done = simulate("--seeds=100000", "--seconds=30")
    print(done.stdout)
    assert done.returncode == 0, f"replay it with python -m tests.simulation --seed N: {done.stdout} {done.stderr}"


@pytest.mark.slow
def test_a_seed_decides_everything() -> None:
    one, other = (simulate("--seed=7", hash_seed=seed) for seed in ("1", "2"))
    assert "every promise kept" in one.stdout
    assert one.stdout == other.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_defect_is_found_within_a_minute(name: str) -> None:
    done = simulate("--first=0", "--seeds=100000", "--seconds=60", f"--mutation={name}")
    assert done.returncode == 1, done.stdout
    found = re.match(r"seed (\d+), .*: (Broken|AssertionError)", done.stderr)
    assert found, done.stderr
    assert simulate(f"--first={found[1]}", "--seeds=1").returncode == 0, "it is not the planted defect that was found"
