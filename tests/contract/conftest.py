# SPDX-License-Identifier: Apache-2.0
"""Worker processes for the tests, one for each role and model; and what every test is run over.

A test that takes a client and a server is run in all nine pairings of their models. With GREEN_ZMQ_QUICK set, one marked
``rotated``, because it takes seconds, is run in three, in which each model is the client once and the server once.
"""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.contract.harness import MODELS, Directory, Fleet, Worker, following


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "rotated: with GREEN_ZMQ_QUICK set, in three pairings of models instead of nine")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    if "client_model" in names and "server_model" in names:
        rotated = metafunc.definition.get_closest_marker("rotated")
        quick = rotated and os.environ.get("GREEN_ZMQ_QUICK")
        pairs = [(m, following(m)) for m in MODELS] if quick else list(itertools.product(MODELS, MODELS))
        metafunc.parametrize("client_model,server_model", pairs, ids=["-to-".join(pair) for pair in pairs])
    else:
        for name in ("client_model", "server_model"):
            if name in names:
                metafunc.parametrize(name, MODELS)


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("workers"))
    yield fleet
    fleet.end()


@pytest.fixture(autouse=True)
def _leave_clean(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.reset()


@pytest.fixture(scope="session", params=["zmq"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Directory:
    path = tmp_path_factory.mktemp("directory") / "directory.sqlite"
    return Directory(f"{request.param}://?directory_path={path}")


@pytest.fixture
def url(directory: Directory) -> str:
    return directory.url()


@pytest.fixture
def topic() -> str:
    return f"topic-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def client(fleet: Fleet, client_model: str) -> Worker:
    return fleet.get("client", client_model)


@pytest.fixture
def server(fleet: Fleet, server_model: str) -> Worker:
    return fleet.get("server", server_model)


@pytest.fixture
def other(fleet: Fleet, server_model: str) -> Worker:
    """A second process that serves, of another model than the first."""
    return fleet.get("server", following(server_model))


@pytest.fixture
def start(fleet: Fleet) -> Callable[[str], Worker]:
    """Start a process that the test may kill."""
    return fleet.start
