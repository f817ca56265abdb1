# SPDX-License-Identifier: Apache-2.0
"""What a transport runs in one process: its loop, and everything that lives in it. Made at first use, never inherited."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import time
import weakref
from collections.abc import Callable
from math import inf
from typing import Final

from green_zmq import executors
from green_zmq.asker import Asker
from green_zmq.client import Client
from green_zmq.config import Settings
from green_zmq.connections import Connections
from green_zmq.delivery import Receiver, Sender
from green_zmq.descriptors import TO_BEGIN, shortage
from green_zmq.errors import OutOfDescriptors, TransportClosed
from green_zmq.executors.base import Model
from green_zmq.loop import READING, Loop, contexts
from green_zmq.notifier import Notifier
from green_zmq.resolver import Resolver
from green_zmq.router import Router
from green_zmq.routing import Node, Table
from green_zmq.server import Server
from green_zmq.subscriber import Subscriber

# While it closes, an engine looks this often whether its outbox is empty.
_LOOK: Final = 0.02
# Who has listened stays so long after nobody finds it any more, and goes on refusing what comes: it was sent by who did not
# know that yet, and goes to others. Only a connection that is lost without an answer would leave that in doubt.
_STAY: Final = 0.1
# What withdrawing from the directory, and sending the last replies, may take beyond the linger time.
_WITHDRAW: Final = 1.0


def _nothing() -> None: ...


class Engine:
    def __init__(
        self, settings: Settings, loop: Loop, router: Router, asker: Asker, instance: bytes, now: Callable[[], float]
    ) -> None:
        """Nothing runs yet."""
        self.due = inf
        self.instance = instance
        self._now = now
        self._settings = settings
        self._loop = loop
        self._router = router
        self._asker = asker
        self._sender = sender = Sender(self.instance, settings.limits, Table(), loop.send)
        self._receiver = Receiver(self.instance, router.write)
        self._resolver = Resolver(asker, sender, settings, now, self._gone)
        self._connections = Connections(loop, sender, settings, now)
        self.client = Client(loop, sender, self._connections, self._resolver, settings, now)
        self.server = Server(loop, self._receiver, router, self._resolver, settings, now)
        self.server.figures = self.counts
        self.notifier = Notifier(loop, settings)
        self.subscriber = Subscriber(loop, settings, now)
        self._close_by = inf
        self._withdrawing = False
        self._stay_until = inf
        self.over = False
        loop.timed += [sender, self._receiver, self._connections, self._resolver, self.server, self.subscriber, self]
        loop.settle, loop.is_settled = self._settle, self._is_settled
        loop.on_crash = self._crashed
        _engines.add(self)

    def start(self) -> None:
        """With the model's lock held.

        :raises OutOfDescriptors: there are too few; then nothing was started.
        """
        reason = shortage(TO_BEGIN)
        if reason:
            raise OutOfDescriptors(f"The transport cannot begin its work: {reason}.")
        self._loop.start()

    def begin_close(self) -> None:
        """Try to empty the outbox, for as long as ``zmq_linger`` says; withdraw from the directory; end the loop."""
        with contextlib.suppress(TransportClosed):
            self._loop.post(self._begin_close)

    def close(self) -> None:
        """Do so, and wait for its end."""
        self.begin_close()
        self._loop.join()

    def abandon(self) -> None:
        """In a forked child: it is the parent's."""
        self.over = True
        self._loop.abandon()
        self.subscriber.abandon()

    def counts(self) -> dict[str, int]:
        """Everything that is counted, by what it is; from any thread."""
        # Copied in one go, as the loop goes on counting.
        total = self._connections.figures()
        for part in (self._sender, self._receiver, self._resolver, self.server, self._router, self.notifier, self.subscriber):
            for name, count in dict(part.counts).items():
                total[name] = total.get(name, 0) + count
        total["messages in the outbox"] = self._sender.pending
        return total

    def tick(self, now: float) -> None:
        """While it closes: is everything delivered and acknowledged, or the time up?"""
        late = self._close_by <= now
        if not self._withdrawing and (late or not (self._sender.pending or self.subscriber.listening)):
            self._withdrawing = True
            self._resolver.withdraw(self._withdrawn)
        else:
            stayed = self._stay_until <= now and (late or self.server.refused_at + _STAY <= now)
            if stayed or (late and self._close_by + _WITHDRAW <= now):
                self._finish()
        self.due = inf if self.over else now + _LOOK

    def _is_settled(self) -> bool:
        sender = self._sender
        return not (
            sender.unwritten or sender.finished or sender.waiting or sender.lookups or sender.wanted or sender.doubtful
            or sender.dropped or sender.lost or sender.failed or self._receiver.acks or self._receiver.outgoing
            or self.server.arrived
        )  # fmt: skip

    def _settle(self) -> None:
        """At the end of each round of the loop: most often one side has something to do, or neither."""
        if not self._is_settled():
            self.client.settle()
            self._receiver.flush()
            if self.server.arrived:
                self.server.distribute(self._now() + READING)
            if self.server.arrived:
                self._loop.post(_nothing)  # another round, in which others have their turn before the rest

    def _begin_close(self) -> None:
        if self._close_by == inf:
            self.due = self._now()
            self._close_by = self.due + self._settings.linger
            self.subscriber.close()

    def _withdrawn(self, _: object) -> None:
        if self.server.node is None:
            self._finish()
        else:
            self.server.leave()
            self._stay_until = self._now() + _STAY

    def _finish(self) -> None:
        if not self.over:
            self.over = True
            self.due = inf
            self.client.close()
            self._asker.close()
            self.notifier.close()
            linger = max(self._close_by - self._now(), _WITHDRAW)
            self._connections.close(linger)
            self.server.close(linger)
            self._loop.finish()

    def _gone(self, node: Node) -> None:
        self.client.gone(node.instance)

    def _crashed(self, reason: str) -> None:
        self.over = True
        self.client.close(reason)
        self._asker.close()
        self.notifier.close()
        self.subscriber.close()


def make_engine(settings: Settings, model: Model) -> Engine:
    """One that is as it is to be outside of a simulation."""
    young, *older = gc.get_threshold()
    if young in _PYTHONS_OWN and young < settings.gc_threshold:
        gc.set_threshold(settings.gc_threshold, *older)
    loop, now = Loop(model), time.monotonic
    return Engine(settings, loop, Router(loop, settings, now), Asker(loop, settings), os.urandom(16), now)


# The threshold of the youngest generation that CPython begins with, up to 3.12 and since; any other was chosen by somebody.
_PYTHONS_OWN: Final = (700, 2000)

# Engines of this process, and those that it has from its parent: they are kept, because ending them would disturb it.
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_inherited: list[Engine] = []


def _after_fork() -> None:
    contexts.after_fork()
    for engine in list(_engines):
        engine.abandon()
        _inherited.append(engine)
    _engines.clear()
    for model in executors.loaded.values():
        model.after_fork()


def _at_exit() -> None:
    """A program that ends without having cleaned up its transports has its last casts delivered all the same."""
    engines = [engine for engine in list(_engines) if not engine.over]
    for engine in engines:  # all linger at the same time
        engine.begin_close()
    for engine in engines:
        engine.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
