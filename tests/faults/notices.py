# SPDX-License-Identifier: Apache-2.0
"""In a worker: processes that notify and listen, forked to be killed; what they do is in a ledger, line by line."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import oslo_messaging
from oslo_config import cfg

import green_zmq
from green_zmq.errors import StoreError
from tests.contract import models, scenarios
from tests.contract.models import parallel
from tests.faults import forks, kill


class Line(NamedTuple):
    """
    :ivar what: ``sends`` and ``stored``, of a notifier; ``listens``, ``begins`` and ``ends``, of a listener.
    :ivar at: the monotonic time.
    """

    what: str
    value: str
    pid: int
    at: float


class _Ledger:
    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, what: str, value: str = "") -> None:
        os.write(self._file, json.dumps(Line(what, value, os.getpid(), time.monotonic())).encode() + b"\n")


class _Listening(_Ledger):
    def info(self, ctxt: Any, publisher_id: str, event_type: str, payload: Any, metadata: Any) -> None:
        self.note("begins", payload)
        models.sleep(random.uniform(0, 0.01))
        self.note("ends", payload)


def fork(url: str, doing: str, **how: Any) -> int:
    """Have a process do that until it is killed, or its parent is; its pid."""
    scenarios.transport(url)  # as services do it: made by the parent, first used by its children
    return forks.child(functools.partial(kill._in_child, os.getpid(), functools.partial(globals()[doing], url=url, **how)))


def notify(url: str, topic: str, path: str, name: str, senders: int) -> None:
    """Each of the senders sends one after the other, and waits as long as it takes."""
    transport, told = oslo_messaging.get_notification_transport(cfg.CONF, url), _Ledger(path)

    def go_on(number: int) -> None:
        target = oslo_messaging.Target(topic=f"{topic}.info")
        for i in itertools.count():
            value = f"{name}-{number}-{i}"
            told.note("sends", value)
            message = {"priority": "info", "payload": value, "publisher_id": name, "event_type": "kill"}
            transport._send_notification(target, {}, message, version=2.0, retry=None)
            told.note("stored", value)
            models.sleep(0.002)

    parallel([functools.partial(go_on, number) for number in range(senders)])


def listen(url: str, topic: str, path: str, name: str) -> None:
    transport, listening = oslo_messaging.get_notification_transport(cfg.CONF, url), _Listening(path)
    targets, executor = [oslo_messaging.Target(topic=topic)], scenarios.EXECUTORS[models.name]
    while True:
        server = green_zmq.get_notification_listener(transport, targets, [listening], executor=executor)
        try:
            server.start()
            break
        except StoreError:  # it is just being killed
            models.sleep(0.1)
    listening.note("listens", name)


def read(path: Path) -> list[Line]:
    *lines, _ = path.read_text().split("\n")  # the last one may still be being written
    return [Line(*json.loads(line)) for line in lines]
