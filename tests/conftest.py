# SPDX-License-Identifier: Apache-2.0
"""For all tests: what a quick run, with GREEN_ZMQ_QUICK set, leaves out is marked ``slow``."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

from tests.contract.harness import fleets

# How long an example takes says something of the machine, which others use as well.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


def pytest_configure(config: pytest.Config) -> None:
    # Begun in the background of a shell, we ignore SIGINT, and so would the programs that tests begin and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "slow: left out with GREEN_ZMQ_QUICK set")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With what fails is told what its workers have logged."""
    report = yield
    if report.when == "call" and report.failed:
        report.sections += [(f"log of {name}", text) for fleet in fleets for name, text in fleet.logs()]
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # What takes longest begins first, beside what takes little: run in several processes, they end at about the same time.
    items.sort(key=lambda item: not {"faults", "simulation"} & set(item.path.parts))
    if "GREEN_ZMQ_QUICK" in os.environ:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
