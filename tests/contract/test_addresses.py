# SPDX-License-Identifier: Apache-2.0
"""Where processes listen, and where others find them: addresses, interfaces, names, networks of their own."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.harness import MODELS, Raised, Worker, following, wait_until
from tests.networks import Networks, ip, needs_networks

pytestmark = pytest.mark.slow

Start = Callable[[str], Worker]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"zmq://?directory_path={tmp_path}/directory.sqlite&zmq_linger=1"


# On one network.


@pytest.mark.parametrize(
    ("options", "host"),
    [
        ("rpc_zmq_bind_address=*", "127.0.0.1"),
        ("rpc_zmq_bind_address=127.0.0.5", "127.0.0.5"),
        ("rpc_zmq_bind_address=0.0.0.0", "127.0.0.1"),
        ("rpc_zmq_bind_address=lo", "127.0.0.1"),
        ("rpc_zmq_bind_address=::1", "::1"),
        ("rpc_zmq_bind_address=[::1]", "::1"),
        ("rpc_zmq_bind_address=localhost", "127.0.0.1"),
        ("rpc_zmq_host=::1", "::1"),
        ("rpc_zmq_host=::1&rpc_zmq_bind_address=*", "::1"),
        ("rpc_zmq_host=127.0.0.9&rpc_zmq_bind_address=*", "127.0.0.9"),
        ("rpc_zmq_host=localhost", "localhost"),
    ],
)
def test_addresses_that_are_listened_on_and_found(
    client: Worker, start: Start, client_model: str, url: str, topic: str, options: str, host: str
) -> None:
    server = start(following(client_model))
    server.run("serve", url=f"{url}&{options}", topic=topic)
    assert server.run("address", url=f"{url}&{options}")[0] == host
    assert client.run("call", url=url, topic=topic, method="echo", args={"value": 1}) == 1


def test_a_wildcard_takes_both_versions_of_ip(client: Worker, start: Start, client_model: str, url: str, topic: str) -> None:
    server = start(following(client_model))
    options = "&rpc_zmq_bind_address=*"
    server.run("serve", url=url + options, topic=topic)
    port = server.run("address", url=url + options)[1]
    for address in ("127.0.0.1", "::1"):
        socket.create_connection((address, port), 5).close()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("rpc_zmq_bind_address=198.51.100.7", ["198.51.100.7", "Cannot assign requested address"]),
        ("rpc_zmq_bind_address=2001:db8::7", ["2001:db8::7", "Cannot assign requested address"]),
        ("rpc_zmq_bind_address=[2001:db8::7]", ["2001:db8::7", "Cannot assign requested address"]),
        ("rpc_zmq_bind_address=nosuch0", ["nosuch0", "no such network interface"]),
        ("rpc_zmq_bind_address=host.example.org", ["host.example.org", "no such network interface"]),
        ("rpc_zmq_bind_address=127.0.0.1:5000", ["127.0.0.1:5000", "no such network interface"]),
    ],
)
def test_addresses_that_cannot_be_listened_on(
    start: Start, url: str, topic: str, model: str, options: str, words: list[str]
) -> None:
    server = start(model)
    with pytest.raises(Raised) as caught:
        server.run("serve", url=f"{url}&{options}", topic=topic)
    assert caught.value.name == "AddressError"
    assert "rpc_zmq_bind_address must be an address or network interface of this host, or *." in caught.value.text
    for word in words:
        assert word in caught.value.text


def test_a_range_of_ports_that_is_used_up(start: Start, client_model: str, url: str, topic: str) -> None:
    with contextlib.ExitStack() as taken:
        listening = taken.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = listening.getsockname()[1]
        server = start(client_model)
        limited = f"{url}&rpc_zmq_min_port={port}&rpc_zmq_max_port={port + 1}"
        with pytest.raises(Raised, match=f"port {port} is in use. Widen rpc_zmq_min_port and rpc_zmq_max_port") as caught:
            server.run("serve", url=limited, topic=topic)
        assert caught.value.name == "AddressError"
    server.run("serve", url=limited, topic=topic)
    assert server.run("address", url=limited)[:2] == ["127.0.0.1", port]


def test_a_name_that_cannot_be_resolved_is_reported_where_it_is_sent_to(
    client: Worker, start: Start, client_model: str, url: str, topic: str
) -> None:
    server = start(following(client_model))
    nameless = f"{url}&rpc_zmq_host=node-7.invalid&rpc_zmq_bind_address=127.0.0.1"
    server.run("serve", url=nameless, topic=topic, server="seven")
    server.run("serve", url=url, topic=f"{topic}-other", server="other")
    call = client.begin("call", url=url, topic=topic, method="echo", timeout=3)
    assert client.run("calls", url=url, topic=f"{topic}-other", method="who", count=10) == ["other"] * 10
    casts = client.begin("cast", url=url, topic=topic, server="seven", method="echo", retry=0)
    for future, name in ((call, "MessagingTimeout"), (casts, "MessageDeliveryFailure")):
        with pytest.raises(Raised) as caught:
            future.result(20)
        assert name in caught.value.names
        for words in ("the host name node-7.invalid cannot be resolved here", f"pid {server.process.pid}", "rpc_zmq_host on"):
            assert words in caught.value.text
    (warning,) = [line for line in client.run("logged") if "node-7.invalid" in line]
    assert f"pid {server.process.pid}" in warning
    assert topic in warning
    # It costs an attempt now and then, as everything that cannot be reached.
    assert client.run("counts", url=url)["connections failed"] <= 30


# On networks of their own.


@needs_networks
@pytest.mark.parametrize("model", MODELS)
def test_more_than_one_network(networks: Networks, url: str, topic: str, model: str) -> None:
    """One server advertises a name that stands for another address in each of its networks, of which one is IPv6."""
    host = networks.space()
    one = networks.space(hosts="10.71.1.1 the-server")
    other = networks.space(hosts="fd71::1 the-server")
    networks.wire(host, "10.71.1.1/24", one, "10.71.1.2/24")
    networks.wire(host, "fd71::1/64", other, "fd71::2/64")
    server = networks.start(host, model)
    at = f"{url}&rpc_zmq_host=the-server&rpc_zmq_bind_address=*"
    server.run("serve", url=at, topic=topic)
    assert server.run("address", url=at)[0] == "the-server"
    for space, of in ((one, following(model)), (other, model)):
        client = networks.start(space, of)
        assert client.run("call", url=url, topic=topic, method="echo", args={"value": space}) == space


@needs_networks
def test_a_name_with_an_address_that_nobody_listens_on(networks: Networks, url: str, topic: str) -> None:
    """Its addresses are tried in turn, and the one that was reached is the first to be tried again."""
    host = networks.space(hosts="::1 both-versions\n127.0.0.1 both-versions")
    server, client = networks.start(host, "threads"), networks.start(host, "eventlet")
    for address in ("127.0.0.1", "::1"):
        at = f"{url}&rpc_zmq_host=both-versions&rpc_zmq_bind_address={address}"
        server.run("serve", url=at, topic=topic, server=address)
        assert client.run("call", url=url, topic=topic, server=address, method="who") == address
    assert client.run("counts", url=url)["connections failed"] == 1


@needs_networks
def test_an_interface_is_listened_on_alone(networks: Networks, url: str, topic: str) -> None:
    host, one, other = networks.space(), networks.space(), networks.space()
    interface, _ = networks.wire(host, "10.72.1.1/24", one, "10.72.1.2/24")
    interface_6, _ = networks.wire(host, "fd72::1/64", other, "fd72::2/64")
    server = networks.start(host, "threads")
    at, at_6 = (f"{url}&rpc_zmq_bind_address={name}" for name in (interface, interface_6))
    server.run("serve", url=at, topic=topic, server="one")
    server.run("serve", url=at_6, topic=topic, server="other")
    assert server.run("address", url=at)[0] == "10.72.1.1"
    assert server.run("address", url=at_6)[0] == "fd72::1"
    clients = {"one": networks.start(one, "eventlet"), "other": networks.start(other, "gevent")}
    for name, client in clients.items():
        assert client.run("call", url=url, topic=topic, server=name, method="who") == name
    with pytest.raises(Raised, match="there is no way to it"):
        clients["one"].run("call", url=url, topic=topic, server="other", method="who", timeout=1)


@needs_networks
@pytest.mark.parametrize("versions", [["-4"], ["-4", "-6"]], ids=["that others know", "at all"])
def test_an_interface_without_an_address(networks: Networks, url: str, topic: str, versions: list[str]) -> None:
    """A link-local address needs the name that the interface has at the other end."""
    host = networks.space()
    interface, _ = networks.wire(host, "10.74.1.1/24", networks.space(), "10.74.1.2/24")
    for version in versions:
        ip("-n", host, version, "addr", "flush", "dev", interface)
    server = networks.start(host, "threads")
    with pytest.raises(Raised, match="has no address that others could connect to") as caught:
        server.run("serve", url=f"{url}&rpc_zmq_bind_address={interface}", topic=topic)
    assert caught.value.name == "AddressError"
    assert interface in caught.value.text


@needs_networks
def test_a_wildcard_without_ipv6(networks: Networks, url: str, topic: str) -> None:
    host = networks.space()
    ip("netns", "exec", host, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
    server, client = networks.start(host, "threads"), networks.start(host, "gevent")
    server.run("serve", url=f"{url}&rpc_zmq_bind_address=*", topic=topic)
    assert client.run("call", url=url, topic=topic, method="who") == "server"


def forward(listening: socket.socket, port: int, stop: threading.Event) -> None:
    """What a router with address translation does, or a container's published port."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    with contextlib.suppress(OSError):
        while not stop.is_set():
            inside, outside = listening.accept()[0], socket.create_connection(("127.0.0.2", port), 5)
            for pair in ((inside, outside), (outside, inside)):
                threading.Thread(target=pump, args=pair, daemon=True).start()


def test_the_advertised_address_may_be_translated(
    client: Worker, start: Start, client_model: str, url: str, topic: str
) -> None:
    """It listens on 127.0.0.2 and is reached through 127.0.0.3."""
    server = start(following(client_model))
    at = f"{url}&rpc_zmq_host=127.0.0.3&rpc_zmq_bind_address=127.0.0.2"
    server.run("serve", url=at, topic=topic)
    host, port, _ = server.run("address", url=at)
    assert host == "127.0.0.3"
    call = client.begin("call", url=url, topic=topic, method="who", timeout=20)
    wait_until(lambda: client.run("counts", url=url).get("connections failed"))  # nobody translates yet
    stop = threading.Event()
    with socket.create_server(("127.0.0.3", port)) as listening:
        threading.Thread(target=forward, args=(listening, port, stop), daemon=True).start()
        assert call.result(20) == "server"
        assert client.run("calls", url=url, topic=topic, method="who", count=10) == ["server"] * 10
        stop.set()


@needs_networks
@pytest.mark.parametrize("model", MODELS)
def test_a_dns_that_does_not_answer_holds_up_nobody_else(networks: Networks, url: str, topic: str, model: str) -> None:
    host = networks.space(nameserver="10.73.1.9")
    away = networks.space()
    networks.wire(host, "10.73.1.1/24", away, "10.73.1.2/24")
    server, client = networks.start(host, following(model)), networks.start(host, model)
    for i in range(12):  # more than there are threads to ask
        named = f"{url}&rpc_zmq_host=node-{i}.example.org&rpc_zmq_bind_address=127.0.0.1"
        server.run("serve", url=named, topic=f"{topic}-{i}", label=str(i))
    server.run("serve", url=url, topic=topic)
    client.run("open_transport", url=url)
    waiting = [client.begin("call", url=url, topic=f"{topic}-{i}", method="who", timeout=3) for i in range(12)]
    wait_until(lambda: client.run("counts", url=url).get("connections attempted", 0) >= 12)
    began = time.monotonic()
    assert client.run("calls", url=url, topic=topic, method="who", count=50) == ["server"] * 50
    assert time.monotonic() - began < 2
    for i, call in enumerate(waiting):
        with pytest.raises(Raised, match=rf"host name node-{i}.example.org (is still being|cannot be) resolved"):
            call.result(20)
    assert client.run("call", url=url, topic=topic, method="who") == "server"
    client.signal(signal.SIGTERM)  # threads that wait for the DNS do not keep a process
    client.process.wait(10)
