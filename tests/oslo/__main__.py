# SPDX-License-Identifier: Apache-2.0
"""Run oslo.messaging's own functional tests, those of notifications over each store: ``python -m tests.oslo``."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.servers import RedisServer

# Most tests of notifications wait for 15 s whether another one comes.
_COMMAND = ("stestr", "run", "--concurrency", "8")


def run(notify: str, *which: str) -> int:
    env = {**os.environ, "RPC_TRANSPORT_URL": "zmq://", "NOTIFY_TRANSPORT_URL": notify}
    return subprocess.run([*_COMMAND, *which], env=env, check=False).returncode


def main() -> None:
    with RedisServer() as server:
        codes = [run("zmq://"), run(f"zmq+redis://{server.address}/0", "Notif")]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
