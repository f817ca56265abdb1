# SPDX-License-Identifier: Apache-2.0
"""What services do to the process that a transport lives in: use native threads, fork (see tests/faults)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contract.harness import Worker, wait_until

Start = Callable[[str], Worker]


@pytest.mark.rotated
@pytest.mark.parametrize("first", ["main", "native"])
def test_native_threads_use_a_transport_like_its_own(
    client_model: str, server: Worker, start: Start, url: str, topic: str, first: str
) -> None:
    server.run("serve", url=url, topic=topic)
    sent = start(client_model).run("native_threads", url=url, topic=topic, first=first)
    wait_until(lambda: len(server.run("seen", label="server")) >= len(sent))
    assert sorted(server.run("seen", label="server")) == sorted(sent)
