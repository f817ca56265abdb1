# SPDX-License-Identifier: Apache-2.0
"""What processes have counted: of one's own transports, and of those of others, asked over the wire."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from typing import Any

import zmq

from green_zmq import wire
from green_zmq.errors import WireError
from green_zmq.routing import Node
from green_zmq.wire import Key


def figures(transport: Any) -> dict[str, int]:
    """What a transport has counted in this process since it was first used, by what it is.

    :param transport: as ``oslo_messaging.get_rpc_transport`` returns it, of a URL of this driver.
    """
    counts: dict[str, int] = transport._driver.counts()
    return counts


def ask(nodes: Collection[Node], timeout: float) -> dict[Node, dict[str, int]]:
    """The figures of other processes; of those that have answered within so many seconds. Blocks meanwhile."""
    found: dict[Node, dict[str, int]] = {}
    until = time.monotonic() + timeout
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    poller = zmq.Poller()
    asked: dict[zmq.Socket[bytes], Node] = {}
    try:
        context.set(zmq.MAX_SOCKETS, context.get(zmq.SOCKET_LIMIT))
        key = wire.encode_key(Key("", "", ""))
        for node in nodes:
            dealer = context.socket(zmq.DEALER)
            dealer.set(zmq.LINGER, 0)
            dealer.set(zmq.IPV6, 1)
            try:
                dealer.connect(node.address)
            except zmq.ZMQError:  # what it says is no address: it does not answer
                continue
            asked[dealer] = node
            poller.register(dealer, zmq.POLLIN)
            request = wire.encode_request(wire.FIGURES, node.instance, os.urandom(16), 1, 1, timeout, key)
            dealer.send_multipart(request, zmq.NOBLOCK)
        while len(found) < len(asked) and (left := until - time.monotonic()) > 0:
            for dealer, _ in poller.poll(int(left * 1000) + 1):
                node = asked[dealer]
                try:
                    answer = wire.decode_answer(dealer.recv_multipart(zmq.NOBLOCK))
                    if answer.kind == wire.REPLY and answer.server == node.instance:
                        told = wire.decode_body(answer.body, answer.codec, lambda: None)
                        found[node] = {str(name): int(number) for name, number in told.items()}
                except (WireError, AttributeError, TypeError, ValueError):
                    continue
    finally:
        context.destroy(0)
    return found
