# SPDX-License-Identifier: Apache-2.0
"""The servers that other tests rely on, and that each means of doing them harm does it."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests import servers
from tests.contract.harness import ROOT, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[servers.RedisServer]:
    with servers.RedisServer() as started:
        yield started


@pytest.fixture
def proxy(server: servers.RedisServer) -> Iterator[servers.Proxy]:
    with servers.Proxy(server) as started:
        yield started


def client_at(port: int, **options: Any) -> redis.Redis:
    """One that does not try again."""
    return redis.Redis(port=port, retry=Retry(NoBackoff(), 0), **options)


def connect(proxy: servers.Proxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), 5)


def ask(connection: socket.socket, request: bytes = b"PING\r\n") -> bytes:
    connection.sendall(request)
    return connection.recv(100)


def gone(pid: int) -> bool:
    """Whether no such process runs; one that has ended may not have been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_restart_empties_the_database(server: servers.RedisServer) -> None:
    address = server.address
    with server.client() as client:
        client.set("a", "1")
        server.restart()
    with server.client() as client:
        assert client.keys() == []
    assert server.address == address


def test_what_settings_keep_on_disk_may_survive() -> None:
    with servers.RedisServer("appendonly yes", "appendfsync always") as server:
        with server.client() as client:
            client.set("a", "1")
        server.restart(keep=True)
        with server.client() as client:
            assert client.get("a") == b"1"
        server.restart()
        with server.client() as client:
            assert client.get("a") is None


def test_a_killed_server_refuses_and_a_stopped_one_leaves_no_files() -> None:
    server = servers.RedisServer()
    server.start()
    folder, client = server.folder, server.client()
    server.kill()
    with pytest.raises(redis.ConnectionError, match="refused"):
        client.ping()
    server.start()
    assert client.ping()
    server.stop()
    assert not server.alive
    assert folder is not None
    assert not folder.exists()


def test_a_paused_server_does_not_answer(server: servers.RedisServer) -> None:
    with server.client(0.1) as client:
        server.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        server.resume()
    with server.client() as client:
        assert client.ping()


def test_a_paused_server_can_be_ended() -> None:
    with servers.RedisServer() as server:
        server.pause()
    assert not server.alive


def test_a_port_that_is_taken_is_left_alone(server: servers.RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    free = servers.free_port()
    ports = iter([server.port, free])
    monkeypatch.setattr(servers, "free_port", lambda: next(ports))
    with servers.RedisServer() as other:
        assert other.port == free


def test_no_port_is_chosen_twice() -> None:
    port = servers.free_port()
    assert not servers._choose(port)
    code = f"from tests import servers; print(servers._choose({port}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout == b"False\n"


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeError, match="no-such-setting"):
        servers.RedisServer("no-such-setting 1").__enter__()


def test_no_server_outlives_the_tests() -> None:
    code = "from tests.servers import *; s = RedisServer(); s.start(); print(s.process.pid, s.folder, flush=True); input()"
    tests = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert tests.stdout is not None
    pid, folder = tests.stdout.readline().split()
    assert not gone(int(pid))
    tests.kill()
    wait_until(lambda: gone(int(pid)), what="the server's end")
    tests.communicate()
    for file in Path(folder).iterdir():
        file.unlink()
    Path(folder).rmdir()


def test_a_server_does_not_end_with_the_thread_that_started_it() -> None:
    server = servers.RedisServer()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(server.start).result()
    try:
        with server.client() as client:
            assert client.ping()
        with pytest.raises(AssertionError, match="runs already"):
            server.start()
    finally:
        server.stop()


def test_passwords_and_users() -> None:
    secret = 'a "secret"'
    with servers.RedisServer(password=secret) as server, servers.RedisServer(password=secret, replica_of=server) as replica:
        with server.client() as client:
            client.set("a", "1")
        with client_at(server.port) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        with replica.client() as client:
            wait_until(lambda: client.get("a") == b"1", what="the replica")
    with servers.RedisServer(username="green", password=secret, rules="~green:* &* +@all -@dangerous") as server:
        with client_at(server.port, username="green", password=secret) as client:
            client.set("green:a", "1")
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.set("a", "1")
        with client_at(server.port) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        with server.client() as client:
            client.flushall()


@pytest.mark.parametrize("secret", [None, "secret"])
def test_another_server_becomes_master(secret: str | None) -> None:
    with servers.SentinelCluster(password=secret, sentinel_password=secret) as cluster:
        hosts = [(host, int(port)) for host, port in (address.split(":") for address in cluster.addresses.split(","))]
        sentinel: Any = redis.Sentinel
        finder = sentinel(hosts, sentinel_kwargs={"password": secret})
        old = cluster.master()
        assert finder.discover_master(cluster.group) == ("127.0.0.1", old.port)
        with old.client() as client:
            client.set("a", "1")
            assert client.execute_command("WAIT", 2, 5000) == 2
        assert cluster.kill_master() is old
        new = cluster.wait_for_failover(old)
        assert new is cluster.master()
        assert finder.discover_master(cluster.group) == ("127.0.0.1", new.port)
        with new.client() as client:
            assert client.get("a") == b"1"
            client.set("a", "2")


def test_a_proxy_forwards(server: servers.RedisServer, proxy: servers.Proxy) -> None:
    value = os.urandom(5_000_000)
    with connect(proxy) as one, connect(proxy) as other:
        assert ask(one) == ask(other) == b"+PONG\r\n"
        assert (proxy.connections, proxy.open) == (2, 2)
    wait_until(lambda: proxy.open == 0, what="the ends")
    with client_at(proxy.port) as client:
        client.set("a", value)
        assert client.get("a") == value
    assert proxy.connections == 3


def test_a_cut_resets(proxy: servers.Proxy) -> None:
    with connect(proxy) as connection:
        assert ask(connection)
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(100)
    assert proxy.open == 0
    with connect(proxy) as connection:
        assert ask(connection)
        proxy.stall()
        connection.sendall(b"PING\r\n")
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(100)


def test_a_proxy_refuses_and_accepts_again(proxy: servers.Proxy) -> None:
    with connect(proxy) as connection:
        assert ask(connection)
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        assert ask(connection)
    proxy.accept()
    with connect(proxy) as connection:
        assert ask(connection)


@pytest.mark.parametrize("directions", [{}, {"requests": False}, {"replies": False}])
def test_a_stall_loses_nothing(server: servers.RedisServer, proxy: servers.Proxy, directions: dict[str, bool]) -> None:
    with connect(proxy) as connection, server.client() as client:
        client.delete("a")
        assert ask(connection)
        proxy.stall(**directions)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            ask(connection, b"INCR a\r\n")
        assert client.get("a") == (None if directions.get("requests", True) else b"1")
        connection.settimeout(5)
        proxy.flow()
        assert connection.recv(100) == b":1\r\n"


def test_a_delay(proxy: servers.Proxy) -> None:
    with connect(proxy) as connection:
        proxy.delay(0.2)
        start = time.monotonic()
        assert ask(connection)
        assert time.monotonic() - start >= 0.2


def test_a_reply_is_cut_in_the_middle(proxy: servers.Proxy) -> None:
    with connect(proxy) as connection, connect(proxy) as other:
        proxy.cut_after(3)
        assert ask(connection) == b"+PO"
        with pytest.raises(ConnectionResetError):
            connection.recv(100)
        assert ask(other) == b"+PONG\r\n"


def test_another_target(server: servers.RedisServer, proxy: servers.Proxy) -> None:
    proxy.target = f"127.0.0.1:{servers.free_port()}"
    with pytest.raises(ConnectionResetError), connect(proxy) as connection:  # which may come while it connects
        connection.recv(100)
    proxy.target = server
    with connect(proxy) as connection:
        assert ask(connection)


def test_tls(server: servers.RedisServer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    ours, others = servers.Certificates(tmp_path), servers.Certificates(tmp_path / "other")
    pair = {"ssl": True, "ssl_certfile": str(ours.client), "ssl_keyfile": str(ours.client)}
    with servers.Proxy(server, tls=ours.server(ask_client=True)) as proxy:
        with client_at(proxy.port, **pair, host="localhost", ssl_ca_certs=str(ours.authority)) as client:
            assert client.ping()
            proxy.cut()
            assert proxy.open == 0
            assert client.ping()
            assert proxy.connections == 2
        with (
            client_at(proxy.port, **pair, ssl_ca_certs=str(others.authority)) as client,
            pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            client.ping()
        with socket.create_connection(("127.0.0.1", proxy.port), 5) as connection:
            context = ssl.create_default_context(cafile=ours.authority)
            answer = b""
            # Whether it says why it hangs up is up to the versions.
            with contextlib.suppress(OSError), context.wrap_socket(connection, server_hostname="127.0.0.1") as wrapped:
                answer = ask(wrapped)
        assert answer == b""
        assert proxy.connections == 2


def test_the_binary_is_taken_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = servers.redis_server()
    other = tmp_path / "server"
    other.symlink_to(binary)
    monkeypatch.setattr(servers, "_binary", None)
    monkeypatch.setenv("GREEN_ZMQ_REDIS_SERVER", str(other))
    assert servers.redis_server().samefile(binary)
    other.unlink()
    other.write_text("#!/bin/sh\necho Redis server v=6.0.16\n")
    other.chmod(0o700)
    monkeypatch.setattr(servers, "_binary", None)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no Redis or Valkey server of 6\.2"):
            servers.redis_server()
