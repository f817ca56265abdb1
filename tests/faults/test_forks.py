# SPDX-License-Identifier: Apache-2.0
"""A process forks before and after it has used its transport, and all use it at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contract.harness import MODELS, Worker, following, wait_until
from tests.faults import ledger

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("model", MODELS)]

Figures = Callable[..., None]
Start = Callable[[str], Worker]
CHILDREN = 4


class Run:
    """A scenario is run; what servers began is in a ledger."""

    def __init__(self, model: str, start: Start, tmp_path: Path) -> None:
        self.url = f"zmq://?directory_path={tmp_path}/directory.sqlite"
        self.ledger = tmp_path / "ledger"
        self._start, self._model = start, model

    def serve(self) -> None:
        for number, model in enumerate((following(self._model), following(following(self._model)))):
            how = {"url": self.url, "topic": "topic", "server": f"server-{number}", "path": str(self.ledger)}
            self._start(model).run("faults.ledger.serve", **how, released=False)

    def figures(self, scenario: str, **args: Any) -> dict[str, float]:
        began = time.monotonic()
        how = {"url": self.url, "topic": "topic", "children": CHILDREN, **args}
        result = self._start(self._model).run(f"faults.forks.{scenario}", limit=120, **how)
        assert result["codes"] == [0] * CHILDREN
        sent = set(result["sent"])
        assert len(sent) == len(result["sent"])
        wait_until(lambda: sent <= ledger.written(self.ledger), what="all to be run")
        found = ledger.all_once(self.ledger, sent)
        assert ledger.written(self.ledger) == sent
        return {**found, "messages": len(sent), "s": time.monotonic() - began}


def test_a_parent_and_its_children_use_a_transport_that_was_not_used(
    model: str, start: Start, tmp_path: Path, figures: Figures
) -> None:
    run = Run(model, start, tmp_path)
    run.serve()
    figures("fork before first use", model, **run.figures("fork_before_use"))


def test_a_parent_and_its_children_use_a_transport_while_it_is_used(
    model: str, start: Start, tmp_path: Path, figures: Figures
) -> None:
    run = Run(model, start, tmp_path)
    run.serve()
    figures("fork while calls are under way", model, **run.figures("fork_after_use", begun=str(run.ledger)))


def test_children_listen_with_a_transport_that_their_parent_listens_with(
    model: str, start: Start, tmp_path: Path, figures: Figures
) -> None:
    run = Run(model, start, tmp_path)
    figures("fork of a server", model, **run.figures("serve_in_children", calls=100, path=str(run.ledger)))
