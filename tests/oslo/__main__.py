# SPDX-License-Identifier: Apache-2.0
"""Run oslo.messaging's own functional tests, those of notifications over each store: ``python -m tests.oslo``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from tests.servers import RedisServer

# Most tests of notifications wait for 15 s whether another one comes; so they can be many.
_CONCURRENCY = 8


def run(notify: str, which: str) -> int:
    env = {**os.environ, "RPC_TRANSPORT_URL": "zmq://", "NOTIFY_TRANSPORT_URL": notify}
    with tempfile.TemporaryDirectory() as folder:
        options = ("--repo-url", folder, "run", "--concurrency", str(_CONCURRENCY), which)
        done = subprocess.run(["stestr", *options], env=env, stdout=subprocess.PIPE, text=True, check=False)
    print(f"Notifications over {notify}", done.stdout, sep="\n", flush=True)
    return done.returncode


def main() -> None:
    with RedisServer() as server, ThreadPoolExecutor() as both:
        codes = both.map(run, ("zmq://", f"zmq+redis://{server.address}/0"), (".", "Notif"))
        sys.exit(max(codes))


if __name__ == "__main__":
    main()
