# SPDX-License-Identifier: Apache-2.0
"""In a worker: many listeners, and messages to many targets, with one command."""

from __future__ import annotations

import functools
from typing import Any

from tests.contract import scenarios
from tests.contract.models import parallel, wait_until

# A client's transport of its own: it begins with nothing, and a test may wait until nothing is left.
TAG = "backends"
_KINDS = {"call": scenarios.call, "cast": scenarios.cast, "fanout": scenarios.fanout}


def serve(listeners: list[dict[str, Any]]) -> None:
    """Start a server for each, all at the same time."""
    for listener in listeners:
        scenarios.transport(listener["url"])
    for outcome in parallel([functools.partial(scenarios.serve, **listener) for listener in listeners]):
        outcome.result()


def end(label: str) -> list[Any]:
    """Stop a server; all that it has seen."""
    scenarios.stop(label)
    scenarios.wait(label)
    found = scenarios.seen(label)
    scenarios.end(label)
    return found


def seen(labels: list[str]) -> dict[str, list[Any]]:
    return {label: scenarios.seen(label) for label in labels}


def send(url: str, messages: list[dict[str, Any]]) -> list[Any]:
    """Send all at the same time; what the calls returned. Each has a ``kind``, and what that needs."""
    scenarios.transport(url, TAG)
    outcomes = parallel([functools.partial(_send, url, **message) for message in messages])
    # An error ends it at once, whatever the others still wait for.
    wait_until(lambda: all(outcome.over for outcome in outcomes) or any(outcome.error for outcome in outcomes), 60)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [outcome.result() for outcome in outcomes]


def _send(url: str, kind: str, **how: Any) -> Any:
    return _KINDS[kind](url, tag=TAG, **how)


def unsettled(url: str) -> dict[str, int]:
    """What from here may still go anywhere."""
    left = scenarios.leftovers(url, TAG)
    names = ("requests", "waiting", "draining", "outbox", "open", "queued", "held")
    return {name: left[name] for name in names if left[name]}


def waiting(url: str) -> int:
    """To how many addresses messages from here wait for a server to appear."""
    if scenarios.transport(url, TAG)._driver._engine is None:
        return 0  # it was not used yet
    return scenarios.leftovers(url, TAG)["waiting"]
