# SPDX-License-Identifier: Apache-2.0
"""What is wrong is an error where it is wrong, with a text that says so, and disturbs nobody else."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.contract.harness import Directory, Raised, Worker

Start = Callable[[str], Worker]


def _raised(worker: Worker, scenario: str, **args: Any) -> Raised:
    with pytest.raises(Raised) as caught:
        worker.run(scenario, limit=20, **args)
    return caught.value


# Where a server listens.


@contextmanager
def _taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_port_in_use_is_named(server: Worker, directory: Directory, topic: str) -> None:
    with _taken_port() as port:
        url = directory.url(rpc_zmq_min_port=port, rpc_zmq_max_port=port + 1)
        error = _raised(server, "serve", url=url, topic=topic)
    assert error.name == "AddressError"
    assert f"port {port} is in use" in error.text
    assert "rpc_zmq_min_port" in error.text


def test_a_port_range_that_is_used_up_is_named(server: Worker, directory: Directory, topic: str) -> None:
    # As many transports as there are ports, and one more; somebody else may have some of them.
    first = 41000 + os.getpid() % 1000 * 4
    url = directory.url(rpc_zmq_min_port=first, rpc_zmq_max_port=first + 3)
    starts = [server.begin("serve", url=url, topic=topic, server=f"s{i}", tag=f"t{i}") for i in range(4)]
    errors = [error for start in starts if isinstance(error := start.exception(20), Raised)]
    assert errors
    assert all(error.name == "AddressError" for error in errors)
    assert f"all 3 ports from {first} on are in use" in errors[-1].text
    assert "rpc_zmq_max_port" in errors[-1].text


@pytest.mark.parametrize("address", ["192.0.2.7", "no-such-host.invalid", "no-such-interface0"])
def test_an_address_that_is_not_here_is_named(server: Worker, directory: Directory, topic: str, address: str) -> None:
    error = _raised(server, "serve", url=directory.url(rpc_zmq_bind_address=address), topic=topic)
    assert error.name == "AddressError"
    assert address in error.text
    assert "rpc_zmq_bind_address" in error.text


def test_after_a_failed_start_the_transport_still_works(
    client: Worker, server: Worker, directory: Directory, topic: str
) -> None:
    server.run("serve", url=directory.url(), topic=topic)
    with _taken_port() as port:
        url = directory.url(rpc_zmq_min_port=port, rpc_zmq_max_port=port + 1)
        assert _raised(client, "serve", url=url, topic=topic, server="other").name == "AddressError"
        assert client.run("call", url=url, topic=topic, method="who") == "server"


@pytest.mark.rotated
def test_a_host_that_does_not_resolve_is_no_delay_for_others(
    client: Worker, server: Worker, directory: Directory, topic: str
) -> None:
    lost = directory.url(rpc_zmq_host="no-such-host.invalid", rpc_zmq_bind_address="127.0.0.1")
    server.run("serve", url=lost, topic=topic, server="lost")
    server.run("serve", url=directory.url(), topic=topic, server="found")
    error = _raised(client, "call", url=directory.url(), topic=topic, server="lost", method="who", timeout=1)
    assert error.name == "MessagingTimeout"
    assert "no-such-host.invalid" in error.text
    assert client.run("calls", url=directory.url(), topic=topic, method="who", count=4) == ["found"] * 4


def test_a_directory_that_cannot_be_written_is_named(client: Worker, topic: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "directory.sqlite", tmp_path):
        url = f"zmq://?directory_path={path}&cast_grace=0.1"
        for scenario, how in (("serve", {}), ("call", {"method": "who", "timeout": 5})):
            error = _raised(client, scenario, url=url, topic=topic, **how)
            assert error.name == "DirectoryError"
            assert str(path) in error.text
            assert "directory_path" in error.text
        assert any(str(path) in line for line in client.run("logged"))


def test_a_file_that_is_no_directory_is_named(client: Worker, topic: str, tmp_path: Path) -> None:
    path = tmp_path / "directory.sqlite"
    path.write_text("this is not a database, but long enough to be looked at as one" * 20)
    error = _raised(client, "serve", url=f"zmq://?directory_path={path}", topic=topic)
    assert error.name == "DirectoryError"
    assert "remove it" in error.text


@pytest.mark.parametrize(
    ("url", "name", "texts"),
    [
        ("zmq://?no_such_option=1", "InvalidTransportURL", ["no_such_option"]),
        ("zmq://?zmq_linger=soon", "InvalidTransportURL", ["zmq_linger=soon"]),
        ("zmq://host:1/", "InvalidTransportURL", ["names no host", "directory_path"]),
        ("zmq://?rpc_zmq_min_port=70&rpc_zmq_max_port=60", "ConfigError", ["rpc_zmq_min_port", "rpc_zmq_max_port"]),
        ("zmq://?zmq_target_expire=10&zmq_target_update=9", "ConfigError", ["zmq_target_expire", "zmq_target_update"]),
    ],
)
def test_a_wrong_url_is_refused(client: Worker, url: str, name: str, texts: list[str]) -> None:
    error = _raised(client, "open_transport", url=url)
    if error.name == "DriverLoadFailure":  # as oslo.messaging passes it on
        assert name in error.traceback
    else:
        assert name in error.names
    assert all(text in error.text for text in texts)


# What is sent.


def test_what_cannot_be_serialised_is_refused_where_it_is(client: Worker, server: Worker, url: str, topic: str) -> None:
    server.run("serve", url=url, topic=topic)
    error = _raised(client, "call_unserialisable", url=url, topic=topic)
    assert error.names[0] == "Unserializable"
    assert "TypeError" in error.names
    error = _raised(client, "call", url=url, topic=topic, method="unserialisable", timeout=5)
    assert error.exc_type == "Unserializable"
    assert any("cannot be sent" in line for line in server.run("logged"))
    assert client.run("call", url=url, topic=topic, method="echo", args={"value": 1}) == 1


# What strangers send is in tests/faults/test_fuzz.py, and who takes an address over in tests/faults/test_network.py.
