# SPDX-License-Identifier: Apache-2.0
"""Worker processes for the tests, one for each role and model; and what every test is run over.

A test that takes a client and a server is run in all nine pairings of their models over the embedded directory, and over
Redis and Sentinel in three, in which each model is the client once and the server once. With GREEN_ZMQ_ALL set it is run in
all nine over each directory; with GREEN_ZMQ_QUICK only over the embedded one, and if it is marked ``rotated``, because it
takes seconds, in three. One marked ``apart``, whose client and server never meet but in a store, is run in three without that.
One marked ``one_directory``, to which it does not matter, is run over the embedded one only; one marked ``no_sentinel`` over
that and one Redis.
"""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.contract.harness import MODELS, Directory, Fleet, Worker, following
from tests.networks import networks  # noqa: F401 (a fixture)
from tests.servers import RedisServer, SentinelCluster

QUICK = "GREEN_ZMQ_QUICK" in os.environ
DIRECTORIES = ["sqlite"] if QUICK else ["sqlite", "redis", "sentinel"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "rotated: with GREEN_ZMQ_QUICK set, in three pairings of models instead of nine")
    config.addinivalue_line("markers", "apart: in three pairings of models, because the two meet only in a store")
    config.addinivalue_line("markers", "one_directory: only over the embedded directory")
    config.addinivalue_line("markers", "no_sentinel: not over Redis with Sentinel, because it is the same as over Redis")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    few = [(model, following(model)) for model in MODELS]
    pairs = list(itertools.product(MODELS, MODELS))
    marked = metafunc.definition.get_closest_marker
    if marked("apart") or (QUICK and marked("rotated")):
        pairs = few
    directories = DIRECTORIES[:1] if marked("one_directory") else DIRECTORIES
    if marked("no_sentinel"):
        directories = [name for name in directories if name != "sentinel"]
    both = {"client_model", "server_model"} <= set(names)
    if both and "directory" in names:
        cases = [
            (directory, *pair)
            for directory in directories
            for pair in (pairs if directory == DIRECTORIES[0] or "GREEN_ZMQ_ALL" in os.environ else few)
        ]
        ids = [f"{directory}-{client}-to-{server}" for directory, client, server in cases]
        metafunc.parametrize("directory,client_model,server_model", cases, ids=ids, indirect=["directory"], scope="session")
        return
    if both:
        metafunc.parametrize("client_model,server_model", pairs, ids=["-to-".join(pair) for pair in pairs])
    else:
        for name in {"client_model", "server_model"} & set(names):
            metafunc.parametrize(name, MODELS)
    if "directory" in names:
        metafunc.parametrize("directory", directories, indirect=True, scope="session")


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("workers"))
    yield fleet
    fleet.end()


@pytest.fixture(autouse=True)
def _leave_clean(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.reset()


@pytest.fixture(scope="session")
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Directory]:
    if request.param == "sqlite":
        yield Directory(f"zmq://?directory_path={tmp_path_factory.mktemp('directory')}/directory.sqlite")
    elif request.param == "redis":
        with RedisServer() as server:
            yield Directory(f"zmq+redis://{server.address}/0?rpc_zmq_host=127.0.0.1")
    else:
        with SentinelCluster() as cluster:
            yield Directory(f"zmq+sentinel://{cluster.addresses}/{cluster.group}?rpc_zmq_host=127.0.0.1")


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
