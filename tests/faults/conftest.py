# SPDX-License-Identifier: Apache-2.0
"""Real processes, and real faults. The worker processes are those of the contract's tests.

A test tells its figures with the fixture of that name; ``python -m tests.faults`` runs all and prints them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.conftest import (  # noqa: F401 (fixtures, and the models that tests are run over)
    _leave_clean,
    client,
    directory,
    fleet,
    networks,
    other,
    pytest_configure,
    pytest_generate_tests,
    server,
    start,
    topic,
    url,
)


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``figures(fault, model, notice=seconds, recover=seconds, lost=0, twice=0, ...)``, once in a test, when all is well.

    ``notice`` is from the fault to its being noticed, ``recover`` from its end until all is well again; whatever else is
    given is printed as it is named.
    """

    def tell(fault: str, model: str = "", **values: float) -> None:
        if path := os.environ.get("GREEN_ZMQ_FIGURES"):
            line = json.dumps({"fault": fault, "model": model, "test": request.node.nodeid, **values})
            with Path(path).open("a") as file:
                file.write(line + "\n")

    return tell
