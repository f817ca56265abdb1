# SPDX-License-Identifier: Apache-2.0
"""Processes that run many nodes each, every one with a transport of its own: what a cluster is to its directory.

Run as a script it is such a process. It ends when whoever has started it does, whatever ends that.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from green_zmq.bench.processes import Process, obey, patch

ROOT = Path(__file__).parent.parent


def topic(number: int) -> str:
    """That the listener of this number listens to, on every node."""
    return f"service-{number}"


class Nodes(Process):
    """A process for nodes. What it can do are the methods of :class:`Cluster`, called by name."""

    def __init__(self, model: str) -> None:
        super().__init__(model, program="tests.nodes", folder=ROOT)

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._channel.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Cluster:
    """The nodes of this process."""

    def __init__(self, model: str) -> None:
        import oslo_messaging
        from oslo_config import cfg

        import green_zmq
        import green_zmq.directory.redis
        import green_zmq.driver

        self._messaging, self._driver = oslo_messaging, green_zmq
        self._model = model
        self._conf = cfg.CONF  # oslo.messaging's servers work with no other
        self._conf([], project="nodes", default_config_files=[], default_config_dirs=[])
        self._transports: list[Any] = []
        self._servers: list[Any] = []

    def start(self, url: str, names: list[str], listeners: int, within: float, host: str | None = None) -> float:
        """Start these nodes, evenly over that time, each in a thread of its own; the seconds until the last one is found.

        :param host: of which all of them pretend to be: then nobody else can see whether they run, but by their records.
        """
        if host is not None:
            self._driver.directory.redis.boot_id = lambda: host  # type: ignore[attr-defined]
        executor = {"threads": "threading"}.get(self._model, self._model)

        def start_one(number: int) -> None:
            time.sleep(number * within / len(names))
            transport = self._messaging.get_rpc_transport(self._conf, url)
            self._transports.append(transport)
            for i in range(listeners):
                target = self._messaging.Target(topic=topic(i), server=names[number])
                server = self._driver.get_rpc_server(transport, target, [Endpoint()], executor=executor)
                server.start()
                self._servers.append(server)

        begun = time.monotonic()
        _at_once([partial(start_one, number) for number in range(len(names))])
        return time.monotonic() - begun

    def stop(self) -> float:
        """Stop and clean up all of them, as services do; the seconds it took."""
        begun = time.monotonic()
        _at_once([server.stop for server in self._servers])
        _at_once([server.wait for server in self._servers])
        _at_once([transport.cleanup for transport in self._transports])
        self._servers.clear()
        self._transports.clear()
        return time.monotonic() - begun

    def used(self) -> dict[str, float]:
        """By this process so far: CPU seconds; and what it holds: MiB of memory, descriptors, threads."""
        use = resource.getrusage(resource.RUSAGE_SELF)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            "cpu": use.ru_utime + use.ru_stime,
            "MiB": pages * resource.getpagesize() / 2**20,
            "descriptors": len(list(Path("/proc/self/fd").iterdir())),
            "threads": len(list(Path("/proc/self/task").iterdir())),
        }


class Endpoint:
    def where(self, ctxt: Any) -> int:
        import os

        return os.getpid()


def _at_once(fns: list[Callable[[], Any]]) -> None:
    """Each in a thread, which in a patched process is a green one.

    :raises Exception: one that one of them has raised.
    """
    import threading

    errors: list[Exception] = []

    def run(fn: Callable[[], Any]) -> None:
        try:
            fn()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[fn]) for fn in fns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def main() -> None:
    model, _, descriptor = sys.argv[1:]
    patch(model)
    import logging
    import os

    # That the directory is away is said by every node.
    logging.basicConfig(level=logging.CRITICAL)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    cluster = Cluster(model)
    with contextlib.suppress(OSError):
        obey(int(descriptor), cluster)
    # At once, whatever the nodes are doing: nobody waits for it any more.
    os._exit(0)


if __name__ == "__main__":
    main()
