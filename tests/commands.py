# SPDX-License-Identifier: Apache-2.0
"""The command ``green-zmq`` as a shell runs it. The limits are for what hangs: none is near to how long anything takes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.contract import harness

COMMAND = [sys.executable, "-m", "green_zmq.cli"]
LIMIT = 60.0

Env = Mapping[str, str]


def run(env: Env, *args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *args], check=False, env=env, capture_output=True, encoding="utf-8", timeout=LIMIT, **kwargs
    )


def result(env: Env, *args: str, **kwargs: Any) -> Any:
    done = run(env, *args, **kwargs)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def listed(env: Env) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run(env, "ls", "--json").stdout)
    return found


def wait_for(condition: Callable[[], Any]) -> Any:
    return harness.wait_until(condition, LIMIT)


@contextlib.contextmanager
def process(env: Env, *args: str) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [*COMMAND, *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, encoding="utf-8"
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate(timeout=LIMIT)


@contextlib.contextmanager
def serving(env: Env, *args: str) -> Iterator[subprocess.Popen[str]]:
    with process(env, "serve", *args) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line.startswith("listening on "), line + child.communicate()[1]
        yield child


def environment(url: str) -> dict[str, str]:
    return os.environ | {"GREEN_ZMQ_URL": url, "PYTHONIOENCODING": "utf-8"}
