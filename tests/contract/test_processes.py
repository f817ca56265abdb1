# SPDX-License-Identifier: Apache-2.0
"""What services do to the process that a transport lives in: use native threads, fork (see tests/faults)."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from tests.contract.harness import Directory, Worker, wait_until

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


@pytest.mark.one_directory
@pytest.mark.parametrize(
    ("option", "before", "after"), [({}, None, 5000), ({"gc_threshold": 0}, None, 0), ({}, [900, 7, 7], 900)]
)
def test_garbage_is_looked_for_less_often_unless_somebody_says_how_often(
    server: Worker, start: Start, directory: Directory, topic: str, option: dict[str, int], before: list[int] | None, after: int
) -> None:
    server.run("serve", url=directory.url(), topic=topic)
    found = start("threads").run("thresholds", url=directory.url(**option), topic=topic, before=before)
    assert found == [after or gc.get_threshold()[0], *(before or gc.get_threshold())[1:]]
