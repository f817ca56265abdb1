# SPDX-License-Identifier: Apache-2.0
"""Defects to be planted in the protocol: each is a piece of source text and what takes its place.

A simulation that does not find them all proves nothing. ``python -m tests.simulation --mutation NAME`` plants one.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import NamedTuple


class Mutation(NamedTuple):
    module: str
    old: str
    new: str


MUTATIONS = {
    "the receiver forgets whom it has seen": Mutation(
        "green_zmq.delivery", "if request.id <= peer.highest or request.kind == ASK:", "if request.kind == ASK:"
    ),
    "a repeat is run again": Mutation(
        "green_zmq.delivery",
        "        if record is not None:\n            self._repeated(record, route)\n            return None",
        "        if record is not None:\n            return record",
    ),
    "a request goes to another instance when the connection is lost": Mutation(
        "green_zmq.delivery",
        "        for request in self._take_back(link):\n            ",
        "        sent = [*link.open.values()]\n        link.open.clear()\n"
        "        for request in [*self._take_back(link), *sent]:\n            ",
    ),
    "what was sent to a server that is gone goes to another": Mutation(
        "green_zmq.delivery", "if request.writes == 1 and taken_over and not request.accepted:", "if not request.accepted:"
    ),
    "nothing is written again over a new connection": Mutation(
        "green_zmq.delivery", "for request in [*link.taken.values(), *link.open.values()]:", "for request in ():"
    ),
    "requests are written again in another order": Mutation(
        "green_zmq.delivery",
        "for request in [*link.taken.values(), *link.open.values()]:",
        "for request in [*link.taken.values(), *reversed(link.open.values())]:",
    ),
    "acknowledgements are not heard": Mutation(
        "green_zmq.delivery", "        if request.kind != CALL and request.id in link.open:", "        if False:"
    ),
    "casts that waited are sent in another order": Mutation(
        "green_zmq.delivery", "            request = queue.popleft()\n", "            request = queue.pop()\n"
    ),
    "casts that have arrived keep others from being sent": Mutation("green_zmq.delivery", "            drain.sent -= 1\n", ""),
    "the lowest open id is too high": Mutation(
        "green_zmq.delivery",
        "            floor = min(floor, next(iter(link.taken)))",
        "            floor = next(reversed(link.open), next(reversed(link.taken)))",
    ),
    "a request is accepted by an instance that it is not for": Mutation(
        "green_zmq.delivery", "if request.to != self.instance:", "if False:"
    ),
    "an answer of any instance counts": Mutation(
        "green_zmq.delivery",
        "        if kind in (wire.WRONG_INSTANCE, wire.WRONG_VERSION):",
        "        if kind == wire.WRONG_VERSION:",
    ),
    "what is given back is forgotten": Mutation(
        "green_zmq.delivery",
        "        if link.taken.pop(request.id, None) is not None:  # a cast that is given back",
        "        if link.taken.pop(request.id, None) is not None:\n            return\n        if False:",
    ),
    "what could not be given back is run although it counts as given back": Mutation(
        "green_zmq.server", "            self._receiver.accept(incoming.record, self._now())\n", ""
    ),
    "a server keeps what it had not begun when it stops": Mutation(
        "green_zmq.server",
        "            if listener.unbegun.pop(incoming, False):\n                self._give_back(listener, incoming)",
        "            listener.unbegun.pop(incoming, False)",
    ),
    "a call is not ended by its deadline": Mutation(
        "green_zmq.delivery",
        "        for request in [r for r in self.requests if r.due() <= now]:",
        "        for request in [r for r in self.requests if r.due() <= now and r.kind != CALL]:",
    ),
    "a loss is not logged": Mutation(
        "green_zmq.delivery",
        '            self.counts["messages lost"] += 1\n            self.lost.append((request, reason))\n        else:',
        '            self.counts["messages lost"] += 1\n        else:',
    ),
    "a fanout leaves one out": Mutation(
        "green_zmq.delivery", "        for link in links:\n            copy", "        for link in links[1:]:\n            copy"
    ),
    "the outbox has no limit": Mutation(
        "green_zmq.delivery",
        "        return not self._outbox or (",
        "        return True or (",
    ),
    "a listener has no limit": Mutation(
        "green_zmq.server",
        "        return self.arriving + len(self.batches.waiting) + len(self.unbegun) < window",
        "        return True",
    ),
    "held fanouts are not written": Mutation(
        "green_zmq.delivery",
        "            for _ in range(min(len(held), self._limits.ahead - link.ahead(key))):",
        "            for _ in range(0):",
    ),
    "heartbeats are not heard": Mutation(
        "green_zmq.delivery",
        "        elif kind == wire.HEARTBEAT:\n            request.accepted = True\n            request.heard = now",
        "        elif kind == wire.HEARTBEAT:\n            request.accepted = True",
    ),
    "a server that appears wakes nobody": Mutation(
        "green_zmq.delivery",
        "                self._route(request, now)\n            self._pump(key, now)\n",
        "                self._route(request, now)\n",
    ),
    "who waits for a server does not look for it": Mutation(
        "green_zmq.resolver", "elif self._watch_at < inf:", "elif self._watch_at <= inf:"
    ),
    "the reply of a call that was asked for again is not kept": Mutation(
        "green_zmq.delivery",
        "        if record.frames is not None:\n            self._send(route, record.frames)\n        elif",
        "        if",
    ),
    "replies are kept for ever": Mutation(
        "green_zmq.delivery", "        if record in self._replies:\n            self._drop_reply(record)\n", ""
    ),
}


def plant(name: str) -> None:
    """Have the module imported with the defect in it. To be called before anything of green_zmq is imported."""
    mutation = MUTATIONS[name]
    spec = importlib.util.find_spec(mutation.module)
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:  # noqa: PTH123
        source = file.read()
    if source.count(mutation.old) != 1:
        raise ValueError(f"{name}: the text is in {mutation.module} {source.count(mutation.old)} times")
    module = importlib.util.module_from_spec(spec)
    sys.modules[mutation.module] = module
    exec(compile(source.replace(mutation.old, mutation.new), spec.origin, "exec"), module.__dict__)
