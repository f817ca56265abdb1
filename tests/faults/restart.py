# SPDX-License-Identifier: Apache-2.0
"""In a worker: servers that begin to listen when they are told, all of them at once."""

from __future__ import annotations

import time
from pathlib import Path

from tests.contract import models
from tests.contract.scenarios import listen_many, transport


def listen_when(url: str, topic: str, count: int, first: int, sign: str) -> float:
    """Have everything loaded, and begin to listen once that file is there; the seconds until all are found."""
    transport(url)
    models.wait_until(Path(sign).exists, 120)
    began = time.monotonic()
    listen_many(url, topic, count, first)
    return time.monotonic() - began
