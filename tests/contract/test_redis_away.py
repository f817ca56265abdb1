# SPDX-License-Identifier: Apache-2.0
"""Redis is stopped, hangs, forgets everything or is taken over, while processes that use it as their directory talk."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.contract.harness import MODELS, Directory, Fleet, Raised, Worker, following, wait_until
from tests.servers import Proxy, RedisServer, SentinelCluster

pytestmark = pytest.mark.slow

# Every second a node refreshes its record; that is what "one period" is here.
OFTEN = {"zmq_target_update": 1, "zmq_target_expire": 6, "redis_timeout": 1, "rpc_zmq_host": "127.0.0.1"}
AWAY = "cannot be used"
BACK = "answers again"


def query() -> str:
    return "&".join(f"{name}={value}" for name, value in OFTEN.items())


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_url(redis: RedisServer) -> str:
    return f"zmq+redis://{redis.address}/0?{query()}"


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


class Talk:
    """Callers of one model that call servers of another without a pause."""

    def __init__(self, client: Worker, server: Worker, url: str, callers: int = 8, timeout: float = 20) -> None:
        self.topic = f"topic-{uuid.uuid4().hex[:12]}"
        self.client, self.server, self.url = client, server, url
        self.servers = ["one@back end", "two"]
        for name in self.servers:
            server.run("serve", url=url, topic=self.topic, server=name, label=f"{self.topic} {name}")
        client.run("load.start", url=url, topic=self.topic, callers=callers, servers=["", *self.servers], timeout=timeout)
        self.goes_on()

    def goes_on(self, calls: int = 30) -> None:
        """Every caller makes so many calls from now on."""
        before = self.client.run("load.done", topic=self.topic)

        def further() -> bool:
            now = self.client.run("load.done", topic=self.topic)
            return bool(now) and all(now[caller] >= before.get(caller, 0) + calls for caller in now) and len(now) >= len(before)

        wait_until(further, 40, "calls to go on")

    def end(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.run("load.stop", topic=self.topic, limit=90)
        return found


@pytest.fixture
def talk(fleet: Fleet, model: str, redis_url: str) -> Talk:
    return Talk(fleet.get("client", model), fleet.get("server", following(model)), redis_url)


def is_found(client: Worker, url: str, topic: str) -> bool:
    try:
        return bool(client.run("call", url=url, topic=topic, method="echo", args={"value": 1}, timeout=5) == 1)
    except Raised as error:
        if error.name != "DirectoryError":
            raise
        return False


def lines(worker: Worker, redis: RedisServer, text: str) -> list[str]:
    """What it has logged of that Redis: it may have transports of other tests as well."""
    return [line for line in worker.run("logged") if text in line and redis.address in line]


def test_traffic_goes_on_while_redis_is_away_and_the_log_says_so_once(talk: Talk, redis: RedisServer) -> None:
    redis.kill()
    for _ in range(5):
        talk.goes_on()
        with pytest.raises(Raised) as caught:
            talk.client.run("call", url=talk.url, topic="unknown", method="echo", timeout=20)
        assert caught.value.name == "DirectoryError"
        assert redis.address in caught.value.text
        assert "unknown" in caught.value.text
    for worker in (talk.client, talk.server):
        wait_until(lambda worker=worker: lines(worker, redis, AWAY))
    talk.client.begin("load.done", topic=talk.topic).result(5)
    redis.start()
    talk.goes_on()
    late = f"{talk.topic}-late"
    talk.server.run("serve", url=talk.url, topic=late, server="late", label=late)
    assert is_found(talk.client, talk.url, late)
    for worker in (talk.client, talk.server):
        wait_until(lambda worker=worker: lines(worker, redis, BACK))
    assert talk.end()["errors"] == []
    for worker in (talk.client, talk.server):
        assert (len(lines(worker, redis, AWAY)), len(lines(worker, redis, BACK))) == (1, 1), "\n".join(worker.run("logged"))


def test_look_up_succeeds_as_soon_as_redis_is_back(talk: Talk, redis: RedisServer) -> None:
    for _ in range(3):
        redis.restart()
        wait_until(lambda: is_found(talk.client, talk.url, talk.topic))
        with redis.client() as client:
            wait_until(lambda client=client: client.zcard("green_zmq:members") == 3)  # both, and the epoch
        assert is_found(talk.client, talk.url, talk.topic)
    assert talk.end()["errors"] == []


def test_flushing_everything_under_load(talk: Talk, redis: RedisServer) -> None:
    with redis.client() as client:
        for _ in range(3):
            client.flushall()
            talk.goes_on()
            wait_until(lambda: client.zcard("green_zmq:members") == 3, 10)
            talk.goes_on()
    found = talk.end()
    assert found["errors"] == []
    assert found["wrong"] == 0


def test_redis_that_hangs_delays_nobody(talk: Talk, redis: RedisServer) -> None:
    redis.pause()
    try:
        waits = talk.client.begin("call", url=talk.url, topic="unknown", method="echo", timeout=20)
        for _ in range(5):
            talk.goes_on()
        with pytest.raises(Raised) as caught:
            waits.result(30)
        assert caught.value.name == "DirectoryError"
    finally:
        redis.resume()
    late = f"{talk.topic}-late"
    wait_until(lambda: _serves(talk, late))
    assert is_found(talk.client, talk.url, late)
    assert talk.end()["errors"] == []


def _serves(talk: Talk, topic: str) -> bool:
    try:
        talk.server.run("serve", url=talk.url, topic=topic, server="late", label=topic)
    except Raised as error:
        if error.name != "DirectoryError":
            raise
        return False
    return True


def test_start_of_a_server_while_redis_is_away_is_an_error(talk: Talk, redis: RedisServer) -> None:
    redis.kill()
    with pytest.raises(Raised) as caught:
        talk.server.run("serve", url=talk.url, topic="late", server="late", label="late")
    assert caught.value.name == "DirectoryError"
    talk.goes_on()
    redis.start()
    assert _serves(talk, "late")
    assert talk.end()["errors"] == []


def test_server_is_stopped_while_redis_is_away(fleet: Fleet, model: str, redis: RedisServer, redis_url: str) -> None:
    """Nobody can be told; who finds it all the same is told where it was."""
    talk = Talk(fleet.get("client", model), fleet.get("server", following(model)), redis_url, timeout=3)
    redis.kill()
    talk.server.run("stop", label=f"{talk.topic} two")
    talk.server.run("wait", label=f"{talk.topic} two")
    redis.start()
    with redis.client() as client:
        wait_until(lambda: client.zcard("green_zmq:members") == 2, 10)
    talk.client.run("load.stop", topic=talk.topic, limit=90)
    assert is_found(talk.client, talk.url, talk.topic)


def test_slow_and_broken_connections_to_redis(fleet: Fleet, model: str, redis: RedisServer) -> None:
    with Proxy(redis) as proxy:
        talk = Talk(
            fleet.get("client", model), fleet.get("server", following(model)), f"zmq+redis://{proxy.address}/0?{query()}"
        )
        proxy.delay(0.3)
        late = f"{talk.topic}-late"
        wait_until(lambda: _serves(talk, late))
        wait_until(lambda: is_found(talk.client, talk.url, late))
        proxy.delay(0)
        for size in (1, 7, 40, 100):
            proxy.cut_after(size)
            talk.goes_on(10)
            proxy.cut()
            wait_until(lambda: is_found(talk.client, talk.url, late))
        proxy.stall()
        talk.goes_on()
        proxy.flow()
        wait_until(lambda: is_found(talk.client, talk.url, late))
        found = talk.end()
        assert (found["errors"], found["wrong"]) == ([], 0)


def test_call_that_waits_for_its_server_is_woken_by_its_registration(fleet: Fleet, model: str, redis_url: str) -> None:
    client, server = fleet.get("client", model), fleet.get("server", following(model))
    topic = f"topic-{uuid.uuid4().hex[:12]}"
    calls = [
        client.begin("call", url=redis_url, topic=topic, server=name, method="who", timeout=60) for name in ("a", "b", None)
    ]
    wait_until(lambda: client.run("leftovers", url=redis_url)["waiting"] == 3)
    for name in ("a", "b"):
        server.run("serve", url=redis_url, topic=topic, server=name, label=f"{topic} {name}")
    assert [calls[0].result(20), calls[1].result(20)] == [f"{topic} a", f"{topic} b"]
    assert calls[2].result(20) in (f"{topic} a", f"{topic} b")


@pytest.fixture
def cluster() -> Iterator[SentinelCluster]:
    with SentinelCluster() as cluster:
        yield cluster


def test_killed_master_under_load(fleet: Fleet, model: str, cluster: SentinelCluster) -> None:
    url = f"zmq+sentinel://{cluster.addresses}/{cluster.group}?{query()}"
    talk = Talk(fleet.get("client", model), fleet.get("server", following(model)), url, callers=64)
    old = cluster.kill_master()
    talk.goes_on(5)
    cluster.wait_for_failover(old)
    # From here on, the sentinels having done their part, everything is found again within a period.
    late = f"{talk.topic}-late"
    wait_until(lambda: _serves(talk, late), 10)
    assert is_found(talk.client, talk.url, late)
    talk.goes_on(5)
    found = talk.end()
    assert (found["errors"], found["wrong"]) == ([], 0)


def test_directory_of_another_is_not_ours(fleet: Fleet, redis: RedisServer) -> None:
    """Clouds that share a Redis are told apart by their prefix."""
    client, server = fleet.get("client", "threads"), fleet.get("server", "gevent")
    urls = [Directory(f"zmq+redis://{redis.address}/0?{query()}").url(redis_prefix=name) for name in ("north", "south")]
    for url in urls:
        server.run("serve", url=url, topic="shared", server=url, label=url)
    for url in urls:
        assert set(client.run("calls", url=url, topic="shared", method="who", count=4)) == {url}
