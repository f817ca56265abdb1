# SPDX-License-Identifier: Apache-2.0
"""Networks of the tests' own: namespaces of the kernel, wired with pairs of interfaces, that lose packets when told to.

They need root, iproute2 and nftables. Without them the tests fail, unless GREEN_ZMQ_NO_NETNS is set. What is in one of a
:meth:`Networks.lan` passes for a host of its own: nobody elsewhere can tell whether its pids live.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.contract.harness import Worker, wait_until
from tests.packages import nft
from tests.servers import redis_server

LAN = "10.81.0"
DIRECTORY = f"{LAN}.1"

# Makes the process that follows pass for one of another host: by its name, and by the time from its start on.
_AS_HOST = 'mount --bind "$1" /proc/sys/kernel/random/boot_id && hostname "$2" && shift 2 && exec "$@"'

needs_networks = pytest.mark.skipif("GREEN_ZMQ_NO_NETNS" in os.environ, reason="GREEN_ZMQ_NO_NETNS is set")


def run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if check and done.returncode:
        pytest.fail(
            f"{' '.join(command)}: {done.stderr.strip()}. Networks of the tests' own need root, iproute2 and nftables; set "
            "GREEN_ZMQ_NO_NETNS to go without."
        )
    return done.stdout


def ip(*arguments: str, check: bool = True) -> str:
    return run("ip", *arguments, check=check)


def _from(source: str) -> str:
    return f"ip saddr {source} " if source else 'iifname != "lo" '


class Networks:
    """Namespaces with names of their own, wired with pairs of interfaces, and processes in them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mark = f"gz{uuid.uuid4().hex[:6]}"
        self._spaces: list[str] = []
        self._wires = 0
        self._workers: list[Worker] = []
        self._hosts: dict[str, Path] = {}
        self._redis: subprocess.Popen[bytes] | None = None

    def space(self, *, hosts: str = "", nameserver: str = "") -> str:
        """A namespace; with that /etc/hosts and that server of the DNS."""
        name = f"{self._mark}{len(self._spaces)}"
        self._spaces.append(name)
        files = Path("/etc/netns", name)
        files.mkdir(parents=True)
        (files / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}\n")
        (files / "resolv.conf").write_text(f"nameserver {nameserver}\n" if nameserver else "")
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
        return name

    def wire(self, one: str, one_address: str, other: str, other_address: str) -> tuple[str, str]:
        """Connect two namespaces; the names of the interfaces."""
        ends = f"{self._mark}{self._wires}a", f"{self._mark}{self._wires}b"
        self._wires += 1
        ip("-n", one, "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", other)
        for space, end, address in ((one, ends[0], one_address), (other, ends[1], other_address)):
            ip("-n", space, "addr", "add", address, "dev", end, *(["nodad"] if ":" in address else []))
            ip("-n", space, "link", "set", end, "up")
        return ends

    def lan(self, hosts: int) -> list[str]:
        """So many hosts at one switch, at 10.81.0.2 and on; the switch is at 10.81.0.1, and has the directory, a Redis."""
        switch = self.space()
        ip("-n", switch, "link", "add", "lan", "type", "bridge")
        ip("-n", switch, "addr", "add", f"{DIRECTORY}/24", "dev", "lan")
        ip("-n", switch, "link", "set", "lan", "up")
        names = [self.space() for _ in range(hosts)]
        for number, name in enumerate(names, 2):
            self._hosts[name] = self._folder / f"boot-{number}"
            self._hosts[name].write_text(f"{uuid.uuid4()}\n")
            self.plug(switch, name, f"{LAN}.{number}")
        self._start_redis(switch)
        return [switch, *names]

    def plug(self, switch: str, space: str, address: str) -> None:
        """Connect a host to the switch."""
        ip("-n", space, "link", "add", "lan", "type", "veth", "peer", "name", f"to-{space}", "netns", switch)
        ip("-n", space, "addr", "add", f"{address}/24", "dev", "lan")
        ip("-n", switch, "link", "set", f"to-{space}", "master", "lan", "up")
        ip("-n", space, "link", "set", "lan", "up")

    def unplug(self, space: str) -> None:
        """Its interface is removed, with the address: nobody is told of what becomes of its processes."""
        ip("-n", space, "link", "del", "lan")

    def lose(self, space: str, percent: int = 100, *, source: str = "") -> None:
        """From now on the namespace loses so much of what comes to it, from that address or from all others.

        What it sends itself is lost only by whoever loses it in turn, so one alone makes a one-way partition.
        """
        often = "" if percent == 100 else f"numgen random mod 100 < {percent} "
        self._filter(space, f"{_from(source)}{often}drop")

    def reset(self, space: str, source: str, *, besides: str = "") -> None:
        """From now on whatever comes from that address over TCP is answered with a reset.

        :param besides: an address of which everything is lost meanwhile.
        """
        reset = f"{_from(source)}meta l4proto tcp reject with tcp reset"
        self._filter(space, f"{_from(besides)}drop; {reset}" if besides else reset)

    def _filter(self, space: str, rules: str) -> None:
        self.heal(space)
        table = f"table inet lossy {{ chain in {{ type filter hook input priority 0; {rules}; }}; }}"
        run("ip", "netns", "exec", space, *nft(), table)

    def heal(self, space: str) -> None:
        run("ip", "netns", "exec", space, *nft(), "add table inet lossy; delete table inet lossy")

    def start(self, space: str, model: str) -> Worker:
        log = self._folder / f"{space}-{model}-{len(self._workers)}.log"
        within = ["ip", "netns", "exec", space]
        if space in self._hosts:
            within += ["unshare", "--uts", "sh", "-c", _AS_HOST, "sh", str(self._hosts[space]), space]
        worker = Worker(model, log, within=within)
        self._workers.append(worker)
        return worker

    def _start_redis(self, space: str) -> None:
        socket = self._folder / "redis.sock"
        command = ["ip", "netns", "exec", space, "setpriv", "--pdeathsig", "KILL", str(redis_server()), "--bind", DIRECTORY]
        command += ["--unixsocket", str(socket), "--protected-mode", "no", "--save", "", "--dir", str(self._folder)]
        self._redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)

        def answers() -> bool:
            with redis.Redis(unix_socket_path=str(socket)) as client, contextlib.suppress(redis.ConnectionError):
                return bool(client.ping())
            return False

        wait_until(answers, what="Redis")

    def end(self) -> None:
        for worker in self._workers:
            worker.kill()
        if self._redis is not None:
            self._redis.kill()
            self._redis.wait(10)
        for space in self._spaces:
            ip("netns", "del", space, check=False)  # and its interfaces, and their other ends
            with contextlib.suppress(OSError):
                files = Path("/etc/netns", space)
                for file in files.iterdir():
                    file.unlink()
                files.rmdir()


@pytest.fixture
def networks(tmp_path: Path) -> Iterator[Networks]:
    networks = Networks(tmp_path)
    try:
        yield networks
    finally:
        networks.end()
