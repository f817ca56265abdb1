# SPDX-License-Identifier: Apache-2.0
"""What a process that uses a transport takes. Run as a script it is such a process, from its start to its first answer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from statistics import median
from typing import Final, NamedTuple

from green_zmq.bench.processes import Ended, patch
from green_zmq.bench.runs import Fleet
from green_zmq.bench.scenarios import spread

_PEERS: Final = 64


class Footprint(NamedTuple):
    """
    :ivar imports: seconds for importing oslo.messaging.
    :ivar driver: seconds for importing the driver after it.
    :ivar first: seconds from the start of a process until it has its first answer.
    :ivar memory: MiB that it has then.
    :ivar peer: KiB more for each server that it has called.
    :ivar wakeups: of that process in a second in which nothing happens.
    :ivar idle: % of a core that it uses then.
    """

    imports: float
    driver: float
    first: float
    memory: float
    peer: float
    wakeups: float
    idle: float


def measure(fleet: Fleet, url: str, times: int = 3, seconds: float = 3.0) -> Footprint:
    """:raises Ended: a process has failed."""
    topic = f"bench-{uuid.uuid4().hex[:8]}"
    shares = spread(_PEERS)
    servers = fleet.servers(len(shares))
    try:
        for server, share in zip(servers, shares, strict=True):
            server.ask("serve", url=url, topic=topic, servers=share, oslo_executors=fleet.oslo_executors)
        starts = [_start(fleet.model, url, topic) for _ in range(times)]
        client, names = fleet.client, [name for share in shares for name in share]
        client.ask("reach", url=url, topic=topic, servers=names[:1])
        before = client.ask("usage")["MiB"]
        client.ask("reach", url=url, topic=topic, servers=names[1:])
        peer = (client.ask("usage")["MiB"] - before) / (len(names) - 1) * 1024
        time.sleep(2.0)  # what follows a call: acknowledgements, garbage
        rest = client.ask("usage")
        time.sleep(seconds)  # the time in which it is looked at
        after = client.ask("usage")
    finally:
        fleet.leave([topic])
    wakeups, idle = ((after[name] - rest[name]) / seconds for name in ("switches", "cpu"))
    imports, driver, first, memory = (median(values) for values in zip(*starts, strict=True))
    return Footprint(imports, driver, first, memory, peer, wakeups, idle * 100)


def _start(model: str, url: str, topic: str) -> list[float]:
    command = [sys.executable, "-W", "ignore", "-m", __name__, model, topic, str(time.monotonic())]
    # The URL may have a password, and arguments are seen by everybody.
    done = subprocess.run(command, input=url, capture_output=True, text=True, check=False)  # noqa: S603 (ourselves)
    if done.returncode:
        raise Ended(done.stderr)
    found: list[float] = json.loads(done.stdout)
    return found


def main() -> None:
    model, topic, began = sys.argv[1:]
    url = sys.stdin.read()
    patch(model)
    before = time.monotonic()
    import oslo_messaging  # noqa: F401

    between = time.monotonic()
    import green_zmq.driver  # noqa: F401

    after = time.monotonic()
    from green_zmq.bench import work

    assert work.client(url, topic).call({}, "echo", value=1) == 1
    first = time.monotonic() - float(began)
    print(json.dumps([between - before, after - between, first, work.usage()["MiB"]]))
    work.close()


if __name__ == "__main__":
    main()
