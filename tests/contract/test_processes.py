# SPDX-License-Identifier: Apache-2.0
"""What services do to the process that a transport lives in: fork, use native threads, kill green threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contract.harness import Worker, wait_until

Start = Callable[[str], Worker]


@pytest.mark.rotated
@pytest.mark.parametrize("scenario", ["fork_before_use", "fork_after_use"])
def test_a_parent_and_its_children_use_one_transport(
    client_model: str, server: Worker, start: Start, url: str, topic: str, scenario: str
) -> None:
    server.run("serve", url=url, topic=topic)
    result = start(client_model).run(scenario, url=url, topic=topic, children=3)
    assert result["codes"] == [0, 0, 0]
    wait_until(lambda: len(server.run("seen", label="server")) >= len(result["sent"]))
    assert sorted(server.run("seen", label="server")) == sorted(result["sent"])


def test_a_child_listens_with_a_transport_that_its_parent_has_used(
    client_model: str, start: Start, url: str, topic: str
) -> None:
    result = start(client_model).run("serve_in_child", url=url, topic=topic, client_calls=5)
    assert result == {"codes": [0], "values": [0, 1, 2, 3, 4]}


@pytest.mark.rotated
@pytest.mark.parametrize("first", ["main", "native"])
def test_native_threads_use_a_transport_like_its_own(
    client_model: str, server: Worker, start: Start, url: str, topic: str, first: str
) -> None:
    server.run("serve", url=url, topic=topic)
    sent = start(client_model).run("native_threads", url=url, topic=topic, first=first)
    wait_until(lambda: len(server.run("seen", label="server")) >= len(sent))
    assert sorted(server.run("seen", label="server")) == sorted(sent)
