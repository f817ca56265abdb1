# SPDX-License-Identifier: Apache-2.0
"""A cluster of some size: what it costs the directory, and that everybody is found, found again, and gone in the end.

It is real: Redis, processes, and in those many nodes with a transport of their own each. ``benchmarks/directory.py`` does
the same with 500.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from oslo_config import cfg
from oslo_messaging.transport import TransportURL

from green_zmq import config
from green_zmq.directory import Directory, open_directory
from green_zmq.routing import Topic
from tests.contract.harness import MODELS, wait_until
from tests.nodes import Nodes, topic
from tests.servers import RedisServer

pytestmark = pytest.mark.slow

LISTENERS = 4
UPDATE, EXPIRE = 1, 3
# Of the cluster, in a period: one node sees to the index, in a script of about ten commands, and reads it; two nodes do
# if they come at the same moment.
KEEPING = 30
# How much more often than once in a period a node may come, since counting begins and ends somewhere within one.
ROOM = 1.3


class Cluster:
    """Nodes in processes of their own, each process under another model."""

    def __init__(self, server: RedisServer, processes: list[Nodes], nodes: int) -> None:
        self.server = server
        self.processes = processes
        self.nodes = nodes
        self.names = [f"node-{i}" for i in range(nodes)]
        self.url = f"zmq+redis://{server.address}/?rpc_zmq_host=127.0.0.1&zmq_target_update={UPDATE}&zmq_target_expire={EXPIRE}"
        self.client = server.client()

    def each(self, name: str, *arguments: dict[str, Any]) -> None:
        """Have all processes do something at the same time."""
        for process, some in zip(self.processes, arguments or [{}] * len(self.processes), strict=True):
            process.tell(name, **some)
        with ThreadPoolExecutor(len(self.processes)) as pool:
            for answer in [pool.submit(process.answer) for process in self.processes]:
                answer.result(60)

    def start(self, within: float) -> None:
        parts = [self.names[part :: len(self.processes)] for part in range(len(self.processes))]
        self.each("start", *({"url": self.url, "names": part, "listeners": LISTENERS, "within": within} for part in parts))

    def keys(self) -> int:
        keys = self.client.dbsize()
        assert isinstance(keys, int)
        return keys

    def whole(self) -> bool:
        """Everybody is registered: a record for each, and in the index its listeners, and the epoch."""
        records = len(self.client.keys("green_zmq:node:*"))
        return records == self.nodes and self.client.zcard("green_zmq:members") == self.nodes * LISTENERS + 1

    def commands(self) -> Counter[str]:
        """That Redis has carried out, those inside of scripts included."""
        stats: Any = self.client.info("commandstats")
        return Counter({name.removeprefix("cmdstat_"): int(stat["calls"]) for name, stat in stats.items()})


@contextlib.contextmanager
def running(nodes: int, *models: str, start_within: float = 0) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        cluster = Cluster(server, [stack.enter_context(Nodes(model)) for model in models], nodes)
        stack.callback(cluster.client.close)
        cluster.start(start_within)
        yield cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running(40, "threads", "gevent", start_within=UPDATE) as cluster:
        yield cluster


@contextlib.contextmanager
def directory(url: str) -> Iterator[Directory]:
    """As a process has it that only calls."""
    conf = cfg.ConfigOpts()
    conf([], project="green_zmq_tests", default_config_files=[], default_config_dirs=[])
    opened = open_directory(config.read(conf, TransportURL.parse(conf, url)))
    try:
        yield opened
    finally:
        opened.close()


def found(opened: Directory, number: int) -> list[str]:
    return sorted(entry.server for entry in opened.look_up(Topic("openstack", topic(number))))


def test_all_are_found_once_they_have_started(cluster: Cluster) -> None:
    with directory(cluster.url) as opened:
        assert len(list(opened.listings())) == cluster.nodes * LISTENERS
        for number in range(LISTENERS):
            assert found(opened, number) == sorted(cluster.names)
        assert opened.sweep(dry_run=True) == []


def test_a_node_costs_one_command_in_a_period(cluster: Cluster) -> None:
    wait_until(cluster.whole)
    before, start = cluster.commands(), time.monotonic()
    wait_until(lambda: time.monotonic() >= start + 4 * UPDATE, what="some periods")
    periods = (time.monotonic() - start) / UPDATE
    commands = cluster.commands() - before - Counter(info=1)
    assert commands["getex"] >= 0.7 * periods * cluster.nodes, "they were not alive"
    assert commands.total() <= (ROOM * cluster.nodes + KEEPING) * periods, (periods, commands)
    assert cluster.whole()


def test_all_register_again_when_everything_was_lost(cluster: Cluster) -> None:
    """And nobody is lost to those who know him, in the meantime."""
    wait_until(cluster.whole)
    with directory(cluster.url) as opened:
        assert found(opened, 0) == sorted(cluster.names)
        cluster.client.flushall()
        start = time.monotonic()

        def back() -> bool:
            assert found(opened, 0) == sorted(cluster.names)
            return cluster.whole()

        wait_until(back)
        assert time.monotonic() - start < 3 * UPDATE
        assert len(list(opened.listings())) == cluster.nodes * LISTENERS


def test_one_sees_to_the_index_when_all_come_at_once(cluster: Cluster) -> None:
    """After Redis has hung for so long that everybody has missed a refresh."""
    wait_until(cluster.whole)
    start = time.monotonic()
    before = cluster.commands()
    cluster.server.pause()
    try:
        wait_until(lambda: time.monotonic() > start + 1.5 * UPDATE, what="some refreshes")
    finally:
        cluster.server.resume()
    start = time.monotonic()
    wait_until(lambda: time.monotonic() > start + UPDATE, what="another period")
    assert (cluster.commands() - before)["zrange"] <= 5
    assert cluster.whole()


def test_nothing_is_left_by_a_cluster_that_stops() -> None:
    with running(15, *MODELS) as cluster:
        assert cluster.whole()
        cluster.each("stop")
        assert cluster.keys() == 0


def test_nothing_is_left_by_a_cluster_that_is_killed() -> None:
    """At once for those who are on the same host, and for Redis when it has expired."""
    with running(20, "eventlet", "threads") as cluster, directory(cluster.url) as opened:
        assert cluster.whole()
        assert len(found(opened, 0)) == cluster.nodes
        for process in cluster.processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in cluster.processes:
            process.kill()  # and buried
        start = time.monotonic()
        assert found(opened, 0) == []
        wait_until(lambda: cluster.keys() == 0)
        assert time.monotonic() - start < EXPIRE + UPDATE
