# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of those who work on the driver; those of its users are ``green-zmq bench``. Run with ``python -m``."""

from __future__ import annotations

from typing import Final

TOPIC: Final = "benchmark"
# What the processes do.
WORK: Final = "benchmarks.work"
