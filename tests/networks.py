# SPDX-License-Identifier: Apache-2.0
"""Networks of the tests' own: namespaces of the kernel, wired with pairs of interfaces, that lose packets when told to.

They need root, iproute2 and nftables. Without them the tests fail, unless GREEN_ZMQ_NO_NETNS is set.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.harness import Worker
from tests.packages import nft

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


class Networks:
    """Namespaces with names of their own, wired with pairs of interfaces, and processes in them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mark = f"gz{uuid.uuid4().hex[:6]}"
        self._spaces: list[str] = []
        self._wires = 0
        self._workers: list[Worker] = []

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

    def lose(self, space: str, percent: int = 100, *, source: str = "") -> None:
        """From now on the namespace loses so much of what comes to it, from that address or from all others.

        What it sends itself is lost only by whoever loses it in turn, so one alone makes a one-way partition.
        """
        self.heal(space)
        which = f"ip saddr {source} " if source else 'iifname != "lo" '
        often = "" if percent == 100 else f"numgen random mod 100 < {percent} "
        rules = f"table inet lossy {{ chain in {{ type filter hook input priority 0; {which}{often}drop; }}; }}"
        run("ip", "netns", "exec", space, *nft(), rules)

    def heal(self, space: str) -> None:
        run("ip", "netns", "exec", space, *nft(), "add table inet lossy; delete table inet lossy")

    def start(self, space: str, model: str) -> Worker:
        log = self._folder / f"{space}-{model}-{len(self._workers)}.log"
        worker = Worker(model, log, within=["ip", "netns", "exec", space])
        self._workers.append(worker)
        return worker

    def end(self) -> None:
        for worker in self._workers:
            worker.kill()
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
