# SPDX-License-Identifier: Apache-2.0
"""The delivery protocol: a sender's side and a receiver's. Pure: time is an argument, frames go in and out.

``doc/delivery.rst`` says what is promised and why this keeps it. The rules in short:

* A request is for one instance of a process. It goes to another only when it is certain that the first did not and will
  not run it: it was never written, was refused, or was given back.
* The sender keeps what is unanswered and writes it again, in order, over a new connection to the same instance, before
  anything new. So the ids that arrive at a receiver from one sender grow on every connection, and an id that is not above
  all seen so far is a repeat: it is answered with what was answered before, or was closed long ago.
* Every request says the lowest id its sender still has open with this receiver; what is below may be forgotten.

Neither side touches a socket: frames go to a function of the owner. What else is to be done is left in lists (``finished``,
``wanted``, ...) for the owner to take, and ``due`` says when to call :meth:`tick` next.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from oslo_messaging.exceptions import MessageDeliveryFailure, MessageUndeliverable, MessagingTimeout

from green_zmq import wire
from green_zmq.errors import DirectoryError, MessageTooLarge, ServerGone, TransportClosed
from green_zmq.routing import Node, Table, Topic, choose
from green_zmq.wire import ASK, CALL, CAST, FANOUT, Answer, Key, Request

# A call whose reply is ready sooner needs no acknowledgement of its own, as with TCP's delayed ACK (RFC 1122, 4.2.3.2).
ACK_DELAY = 0.05
# Nobody waits for the acknowledgement of a fanout: those that come in this time are acknowledged together. Their copies stay in
# the outboxes of their senders meanwhile, so it is not to be long.
FANOUT_DELAY = 0.01
# A server that is full is asked again after this time, doubled up to the second at every refusal in a row.
BUSY_FIRST, BUSY_MOST = 0.01, 1.0
# How long a caller is held back by a full outbox, in graces, before it gets an error.
HOLD = 10
# A receiver forgets a sender that it has not heard of for so long and that waits for nothing.
FORGET = 600.0
# Replies are kept for repeats until the sender says that it has them; never more bytes than this, but always the last.
REPLY_CACHE = 64 << 20
# Closed requests remembered of one sender while an older one of it is open.
REMEMBER = 10_000
# Senders and requests remembered in all, half a kilobyte each: beyond that those not heard of for the longest are forgotten.
REMEMBER_ALL = 200_000
# A caller that a full outbox holds back is looked after so often.
_HELD = 0.05
# A request without a time limit is taken to have this one.
_LONGEST = 86400.0
# Replies and closed requests whose time has run out are looked for so often.
_SWEEP = 5.0


def _size(frames: Sequence[bytes]) -> int:
    return len(frames[0]) if len(frames) == 1 else sum(map(len, frames))


@dataclass(frozen=True)
class Limits:
    """The options that delivery depends on; seconds, messages and bytes.

    :ivar ahead: fanouts to one address that a server has not said to have begun, before more are written to it; there is no
        option for it. Nobody waits for a fanout, so one sender could write many times what a listener takes, to have most of it
        refused, and to write that again and again. It is what a listener takes by default.
    """

    grace: float = 1.0
    time_to_live: float = 300.0
    outbox_messages: int = 1000
    outbox_bytes: int = 64 << 20
    message_bytes: int = 256 << 20
    ahead: int = 256


class Outgoing:
    """A request on its way: what its caller gave, and how far it has come."""

    __slots__ = (
        "accepted",
        "began",
        "body",
        "codec",
        "deadline",
        "drain",
        "error",
        "grace_until",
        "heard",
        "id",
        "key",
        "key_bytes",
        "kind",
        "last_id",
        "link",
        "monitor",
        "order",
        "outcome",
        "over",
        "pinned",
        "released",
        "required",
        "retry",
        "size",
        "waiter",
        "writes",
    )

    def __init__(
        self,
        kind: int,
        key: Key,
        codec: int,
        body: Sequence[bytes],
        *,
        timeout: float | None = None,
        monitor: float | None = None,
        retry: int | None = None,
        required: bool = False,
        waiter: Any = None,
        began: float | None = None,
    ) -> None:
        """
        :param timeout: of a call, seconds.
        :param monitor: the most seconds a call may go without a heartbeat of the server that runs it.
        :param retry: None or -1: never give up early; N: give up after N + 1 graces without a server taking it.
        :param required: fail at once when no server is registered.
        :param waiter: kept for the owner.
        :param began: when its caller gave it, and its time begins; None: when it is submitted.
        """
        self.kind = kind
        self.key = key
        try:
            self.key_bytes = wire.encoded_key(key)
        except TypeError:  # a part of it cannot be hashed: this tells which
            self.key_bytes = wire.encode_key(key)
        self.codec = codec
        self.body = body
        self.size = len(body[0]) if len(body) == 1 else _size(body)
        self.deadline = inf if timeout is None else timeout  # made absolute by Sender.submit()
        self.monitor = monitor
        self.retry = None if retry is None or retry < 0 else retry
        self.required = required
        self.waiter = waiter
        self.began = began
        self.outcome: Answer | None = None
        self.error: Exception | None = None
        self.grace_until = inf
        self.heard = 0.0
        self.order = 0
        self.id = 0
        self.last_id = 0
        self.writes = 0
        self.link: Link | None = None
        self.pinned: Link | None = None
        self.drain: _Drain | None = None
        self.accepted = False
        self.released = False
        self.over = False

    def due(self) -> float:
        """When something must be decided about it if nothing arrives before."""
        due = self.deadline if self.released else min(self.deadline, self.grace_until)
        return due if self.monitor is None else min(due, self.heard + self.monitor)


class Link:
    """What the sender knows of one instance, and what it has with it.

    :ivar queue: what waits for the connection, or for the server to have room.
    :ivar held: fanouts that wait until the server has begun with earlier ones, by address.
    :ivar open: what was written and waits for its answer, by id, lowest first.
    :ivar outgoing: those of them that :meth:`Sender.flush` is to write, with their frames.
    :ivar taken: casts that were accepted and may still be given back, by id.
    :ivar topics: those that the directory listed it in when last asked; if none is left, nobody is to send there any more.
    :ivar busy: addresses at which it refused a request, each with when it may be asked again, and how long it is left alone.
    :ivar refused: whether it could not be connected to since the connection was lost.
    :ivar trouble: why there is no connection, for the errors of those who wait for one.
    :ivar socket: what requests are written to while it is up; the owner's.
    :ivar written: requests written since the connection stands.
    :ivar used: when something was last written to it or came from it.
    """

    __slots__ = (
        "busy", "down", "held", "node", "open", "outgoing", "queue", "refused", "socket", "taken", "topics", "trouble", "up",
        "used", "written",
    )  # fmt: skip

    def __init__(self, node: Node) -> None:
        self.node = node
        self.socket: Any = None
        self.written = 0
        self.used = 0.0
        self.up = False
        self.down = False
        self.refused = False
        self.queue: deque[Outgoing] = deque()
        self.held: dict[Key, deque[Outgoing]] = {}
        self.open: dict[int, Outgoing] = {}
        self.outgoing: list[tuple[Outgoing, bytes]] = []
        self.taken: dict[int, Outgoing] = {}
        self.topics: set[Topic] = set()
        self.trouble = ""
        self.busy: dict[Key, tuple[float, float]] = {}

    @property
    def load(self) -> int:
        """Requests outstanding; an accepted cast is not: when it is started says nothing of how idle the server is."""
        return len(self.open) + len(self.queue)

    @property
    def idle(self) -> bool:
        """Whether nothing needs the connection."""
        return not self.open and not self.queue and not self.taken and not self.held

    def usable(self, key: Key, now: float) -> bool:
        return not self.down and (not self.busy or self.free(key, now))

    def free(self, key: Key, now: float) -> bool:
        """Whether it may be asked at that address: one listener that is full says nothing of the others of its process."""
        return key not in self.busy or self.busy[key][0] <= now

    def refuse(self, key: Key, now: float) -> float:
        """It refused a request: leave it alone for a while, longer each time; until when."""
        self.busy = {key: entry for key, entry in self.busy.items() if entry[0] + BUSY_MOST > now}
        until, wait = self.busy.get(key, (now, 0.0))
        if until <= now:  # else it is one of a burst that was sent before the first was refused
            wait = min(max(BUSY_FIRST, wait * 2), BUSY_MOST)
            until = now + wait
            self.busy[key] = (until, wait)
        return until

    def took(self, key: Key) -> None:
        """It took a request: the next time that it refuses one is the first again."""
        if key in self.busy:
            self.busy[key] = (self.busy[key][0], 0.0)

    def next_free(self, now: float) -> float:
        return min((until for until, _ in self.busy.values() if until > now), default=inf)

    def ahead(self, key: Key) -> int:
        """How many fanouts to that address were or are to be written, and the server has not said to have begun them."""
        those = itertools.chain(self.open.values(), self.taken.values(), self.queue)
        return sum(request.kind == FANOUT and request.key == key for request in those)

    def has_room(self, key: Key, most: int) -> bool:
        """Whether another fanout to that address may be written."""
        return len(self.open) + len(self.taken) + len(self.queue) < most or self.ahead(key) < most

    def has(self, request: Outgoing) -> bool:
        """Whether it waits here to be written or answered."""
        return request.id in self.open or request in self.queue or request in self.held.get(request.key, ())

    def take_back(self) -> list[Outgoing]:
        """What was not written, and does not wait here any longer."""
        waiting = [*self.queue, *itertools.chain.from_iterable(self.held.values())]
        self.queue.clear()
        self.held.clear()
        return waiting

    def drop(self, request: Outgoing) -> None:
        """It does not wait to be written any more."""
        held = self.held.get(request.key)
        if held is not None and request in held:
            held.remove(request)
            if not held:
                del self.held[request.key]
        elif request in self.queue:
            self.queue.remove(request)

    def take(self, request: Outgoing) -> None:
        in_order = not self.taken or next(reversed(self.taken)) < request.id
        self.taken[request.id] = request
        if not in_order:
            self.taken = dict(sorted(self.taken.items()))


def _unreached(links: Sequence[Link]) -> str:
    return "no connection to " + ", ".join(f"{link.node}{link.trouble and ': '}{link.trouble}" for link in links)


class _Route:
    """:ivar used: when something was last sent by it."""

    __slots__ = ("links", "turn", "used")

    def __init__(self, links: list[Link]) -> None:
        self.links = links
        self.turn = 0
        self.used = 0.0


class _Drain:
    """Casts to one address that have waited for a server, and are on their way to one in the order they were given.

    :ivar room: how many may be on their way at a time: one more for each that is taken, so twice as many each time; and one
        again when one is refused, since those written behind it may have been taken.
    :ivar sent: how many are.
    """

    __slots__ = ("room", "sent")

    def __init__(self) -> None:
        self.room = 1
        self.sent = 0


class Sender:
    """The sending side of one process, towards every server.

    To be taken by the owner after each round of events:

    :ivar wanted: links that need a connection.
    :ivar dropped: links whose process is gone for good, or which the directory lists no more, and their connections with it.
    :ivar lookups: topics to be looked up in the directory.
    :ivar doubtful: nodes whose connection was lost: does the directory still have them?
    :ivar unwritten: links with what :meth:`flush` is to write.
    :ivar requests: all of which something is to be decided yet; only to be looked at.
    :ivar waiting: requests that wait for a server, by address; only to be looked at.
    :ivar finished: requests whose caller can go on: ``error`` or ``outcome`` (a reply or failure, None after a cast).
    :ivar failed: (request, reason) of those whose caller gets an error.
    :ivar lost: (request, reason) of messages that were lost without an error for anybody.
    """

    def __init__(self, instance: bytes, limits: Limits, table: Table, send: Callable[[Any, list[bytes]], bool]) -> None:
        """:param send: writes frames to the socket of a link that is up; whether it took them."""
        self.instance = instance
        self.table = table
        self._send = send
        self.counts: Counter[str] = Counter()
        self.due = inf
        self.wanted: dict[Link, None] = {}
        self.unwritten: dict[Link, None] = {}
        self.dropped: list[Link] = []
        self.lookups: dict[Topic, None] = {}
        self.doubtful: list[Node] = []
        self.finished: list[Outgoing] = []
        self.failed: list[tuple[Outgoing, str]] = []
        self.lost: list[tuple[Outgoing, str]] = []
        self._limits = limits
        self._ids = itertools.count(1)
        self._orders = itertools.count()
        self._links: dict[bytes, Link] = {}
        # Instances at whose address another one answers, for a moment: the directory may have them all the same.
        self._displaced: dict[bytes, tuple[float, Link]] = {}
        self._routes: dict[Key, _Route] = {}
        self.requests: dict[Outgoing, None] = {}
        self.waiting: dict[Key, deque[Outgoing]] = {}
        self._held: dict[Topic, dict[Outgoing, None]] = {}
        # Topics of which the table has less than the directory said, until that is asked again.
        self._doubted: set[Topic] = set()
        self._draining: dict[Key, _Drain] = {}
        self._busy: dict[Link, None] = {}
        self._outbox: dict[Outgoing, None] = {}
        self._outbox_bytes = 0
        self._directory_error = ""

    # What the owner tells.

    def submit(self, request: Outgoing, now: float, *, hold: bool = False) -> None:
        """Take a request on; it ends in ``finished``, at once where nothing is to be waited for.

        :param hold: news of its topic is under way, and it is to have that: a fanout, or what fails when nobody is there.
        """
        limits = self._limits
        began = now if request.began is None else request.began
        if request.kind == CALL:
            request.deadline += began
            if request.retry is not None:
                request.grace_until = began + limits.grace * (request.retry + 1)
        else:
            request.deadline = began + limits.time_to_live
            request.grace_until = began + limits.grace * ((request.retry or 0) + 1)
        request.heard = now
        request.order = next(self._orders)
        self.requests[request] = None
        due = min(request.deadline, request.grace_until)
        if request.monitor is not None:
            due = min(due, now + request.monitor)
        self.due = min(self.due, due)
        if hold:
            self._held.setdefault(Topic(*request.key[:2]), {})[request] = None
        elif request.kind == CAST and not request.required and (request.key in self.waiting or request.key in self._draining):
            self._wait(request)  # in order behind those that wait already
            if request.key in self._draining:
                self._pump(request.key, now)
        else:
            self._route(request, now)
        if request.key not in self._routes:
            self.lookups[Topic(*request.key[:2])] = None

    def has_route(self, key: Key) -> bool:
        """Whether it is known who serves it, if anybody does."""
        return key in self._routes

    def answered(self, link: Link, answer: Answer, now: float) -> None:
        """An answer came over this link's connection."""
        kind = answer.kind
        if kind in (wire.WRONG_INSTANCE, wire.WRONG_VERSION):
            self.counts[f"answers {wire.kind_name(kind)}"] += 1
            self.gone(link.node.instance, now, taken_over=True)
        elif answer.server != link.node.instance:
            self.counts["answers from a wrong instance"] += 1
        elif kind == wire.DONE:
            for id in answer.ids:
                if id in link.open:
                    self._accepted(link, link.open[id], now)
                link.taken.pop(id, None)
        else:
            for id in answer.ids:
                request = link.open.get(id) or link.taken.get(id)
                if request is None:
                    self.counts["answers nobody waits for"] += 1
                else:
                    self._answer(link, request, answer, now)
        if link.held:
            self._write_held(link, now)

    def connected(self, link: Link, now: float) -> None:
        """The connection stands: whatever is open with that instance is written again, in order, before anything new."""
        link.up, link.down, link.refused = True, False, False
        for request in [*link.taken.values(), *link.open.values()]:
            self.counts["requests written again"] += 1
            self._write(request, link, now)
        self._write_held(link, now)
        self._pump_all(now)

    def disconnected(self, link: Link, now: float) -> None:
        """The connection was lost, or could not be made."""
        link.refused = not link.up
        link.up, link.down = False, True
        self.doubtful.append(link.node)
        for request in self._take_back(link):
            self._again(request, now)
        if not link.idle:
            self.wanted[link] = None
        if link.taken:
            self.due = -inf

    def closed(self, link: Link) -> None:
        """The connection was closed because nothing needs it."""
        link.up = link.down = False
        link.outgoing.clear()  # nobody waits for that any more
        self._prune(link)

    def gone(self, instance: bytes, now: float, *, taken_over: bool = False) -> None:
        """That process is gone for good.

        :param taken_over: it is known because another process answers at its address.
        """
        link = self._links.get(instance)
        if link is not None and not taken_over and (link.up or not (link.refused or link.idle)):
            return  # it is back, or may be in a moment: what the directory says is not certain enough to give anything up
        self._discard(instance, None)
        if link is None:
            return
        self._links.pop(instance, None)
        self._busy.pop(link, None)
        self.wanted.pop(link, None)
        self.counts["servers gone"] += 1
        self.dropped.append(link)
        link.up, link.down = False, True
        queued, sent, taken = self._take_back(link), list(link.open.values()), list(link.taken.values())
        link.open.clear()
        link.taken.clear()
        if taken_over:
            self._displace(link, {request.key for request in [*queued, *sent]}, now)
        for request in taken:
            self.counts["messages lost"] += 1
            self.lost.append((request, f"{link.node} had accepted it and is gone"))
        for request in sent:
            # Written once means written to who answers there now: a reconnection would have written it again.
            if request.writes == 1 and taken_over and not request.accepted:
                queued.append(request)
                continue
            what = "had accepted it" if request.accepted else "was sent it, whether it ran is not known,"
            text = f"No reply from {request.key}: {link.node} {what} and is gone."
            error: Exception | None = ServerGone(text, str(link.node))
            if request.kind != CALL:
                error = None if request.retry is None else MessageDeliveryFailure(text)
            self._lose(request, f"{link.node} {what} and is gone", error)
        for request in queued:
            if request.pinned is link:
                self._lose(request, f"{link.node} is gone", None)
            else:
                self._again(request, now)
        self._pump_all(now)

    def looked_up(self, topic: Topic, now: float) -> None:
        """The directory has answered for this topic, and the table has it."""
        self._directory_error = ""
        self._doubted.discard(topic)
        self._forget_routes(topic)
        self._release(topic, now)
        for key in [k for k in self.waiting if k[:2] == topic]:
            for request in [r for r in self.waiting.get(key, ()) if r.required or r.kind == FANOUT]:
                self._unwait(request)
                self._route(request, now)
            self._pump(key, now)
        listed = {node.instance for node in self.table.nodes(Key(*topic, "")) or ()}
        for link in [li for li in self._links.values() if topic in li.topics and li.node.instance not in listed]:
            link.topics.remove(topic)
            if not link.topics and link.idle:  # if not idle, its connection is closed once it is
                del self._links[link.node.instance]
                self._busy.pop(link, None)
                self.wanted.pop(link, None)
                link.up = link.down = False
                link.outgoing.clear()
                self.dropped.append(link)

    def forget(self, topic: Topic) -> None:
        """Nothing was sent there for long: whoever does will have it looked up. That says nothing of its servers."""
        self.table.forget(topic)
        self._doubted.discard(topic)
        self._forget_routes(topic)

    def not_looked_up(self, topic: Topic, reason: str, now: float) -> None:
        """The directory did not answer. Calls that need it end at once; casts wait, as they would for a server."""
        self._directory_error = reason
        self._release(topic, now)
        if topic in self.table and topic not in self._doubted:
            return
        for key in [k for k in self.waiting if k[:2] == topic]:
            for request in [r for r in self.waiting.get(key, ()) if r.required or (r.kind == CALL and topic not in self.table)]:
                text = f"The message to {key} cannot be sent, since no server of it is known: {reason}"
                self._lose(request, reason, DirectoryError(text))

    def awaited(self) -> list[Topic]:
        """The topics that requests wait for a server of."""
        return list(dict.fromkeys(Topic(*key[:2]) for key in self.waiting))

    def flush(self) -> None:
        """Write what was decided to be written, as few messages: to be called at the end of a round of events.

        Whichever step of it is the last, if a native thread is killed: what is written twice is ignored.
        """
        while self.unwritten:
            link = next(iter(self.unwritten))
            self._write_out(link)
            self.unwritten.pop(link, None)

    def cancel(self, request: Outgoing) -> None:
        """Its caller was killed: nobody waits for it any more."""
        if request.kind == FANOUT:
            self._mend(request)
        if not request.released:
            self.counts["calls abandoned"] += 1
            request.released = True
            self._settle(request)

    def _mend(self, fanout: Outgoing) -> None:
        """A native thread may be killed at any step. The copies that it had not come to are not sent, nor the one at hand."""
        for copy in [request for request in self.requests if request.body is fanout.body and request is not fanout]:
            if copy.link is None or not copy.link.has(copy):
                self._settle(copy)
        self._outbox_bytes = sum(request.size for request in self._outbox)

    def tick(self, now: float) -> None:
        """Whatever is due by now: deadlines, graces, heartbeats, servers to be asked again."""
        self.due = inf
        for link in list(self._busy):
            if link.up:
                self._flush(link, now)
            if link.next_free(now) == inf:
                self._busy.pop(link, None)
        self._pump_all(now)
        for request in [r for r in self.requests if r.due() <= now]:
            if not request.over:
                self._overdue(request, now)
        for link in [link for link in self._links.values() if link.held and link.up]:
            self._write_held(link, now)
        # Who cannot be reached cannot say any more that it has begun them, nor give them back.
        for link in [link for link in self._links.values() if link.taken and not link.up]:
            for id in [id for id, request in link.taken.items() if request.deadline <= now]:
                self.counts["messages lost"] += 1
                self.lost.append((link.taken.pop(id), f"{link.node} accepted it and has not said that it began it"))
            self.due = min([self.due, *[request.deadline for request in link.taken.values()]])
        for instance in [instance for instance, (until, _) in self._displaced.items() if until <= now]:
            del self._displaced[instance]
        self.due = min(
            self.due,
            min((until for until, _ in self._displaced.values()), default=inf),
            min((request.due() for request in self.requests), default=inf),
            min((link.next_free(now) for link in self._busy), default=inf),
        )

    def close(self, now: float) -> None:
        """End everything: callers get :class:`TransportClosed`, what is left of the outbox is lost."""
        for request in list(self.requests):
            reason = f"the transport was closed; {self._known(request, now)}"
            self._lose(request, reason, TransportClosed(f"The message to {request.key} was given up: {reason}."))

    @property
    def anybody_waits(self) -> bool:
        """Whether a caller waits for something: to be answered, for a server, or for room."""
        return len(self.requests) > len(self._outbox)

    @property
    def pending(self) -> int:
        """Messages that no caller waits for and that no server has taken yet."""
        return len(self._outbox)

    def used(self) -> dict[Topic, float]:
        """When something was last sent to the topics that have servers."""
        found: dict[Topic, float] = {}
        for key, route in self._routes.items():
            topic = Topic(*key[:2])
            found[topic] = max(route.used, found.get(topic, 0.0))
        return found

    def name(self, request: Outgoing) -> str:
        """What its receiver calls it; empty if it was never sent."""
        id = request.id or request.last_id
        return wire.message_name(self.instance, id) if id else ""

    # Decisions.

    def _release(self, topic: Topic, now: float) -> None:
        """What was held for news of that topic has it, or must do with what is known."""
        for request in self._held.pop(topic, ()):
            self._route(request, now)

    def _route(self, request: Outgoing, now: float) -> None:
        """Give the request to a server, or let it wait for one."""
        key = request.key
        route = self._routes.get(key) or self._find(key)
        if route is None:  # it may have been forgotten since the request was made
            self.lookups[Topic(*key[:2])] = None
            self._wait(request)
            return
        route.used = now
        links = route.links
        if not links:
            self._no_server(request)
        elif request.kind == FANOUT:
            self._fan_out(request, links, now)
        else:
            link = links[0]
            if len(links) > 1 or link.down or link.busy:  # else there is nothing to choose
                found = choose(links, key, route.turn, now)
                if found is None:
                    self.wanted.update({link: None for link in links if link.down})
                    self._wait(request)
                    return
                route.turn, link = found
            if link.up and not link.queue and not link.busy and request.size <= link.node.max_bytes:
                self._write(request, link, now)
            else:
                self._assign(request, link, now)

    def _no_server(self, request: Outgoing) -> None:
        key = request.key
        if Topic(*key[:2]) in self._doubted:
            self._wait(request)
        elif request.required:
            text = f"No server is registered for {key}."
            routing = f"{key.topic}.{key.server}" if key.server else key.topic
            self._lose(request, text, MessageUndeliverable(MessageDeliveryFailure(text), key.exchange, routing, None))
        elif request.kind == FANOUT:
            self._settle(request)
            self._finish(request)
        else:
            self._wait(request)

    def _find(self, key: Key) -> _Route | None:
        nodes = self.table.nodes(key)
        if nodes is None:
            return None
        route = _Route([self._link(node) for node in nodes if node.wire == wire.VERSION])
        for link in route.links:
            link.topics.add(Topic(*key[:2]))
        if route.links:
            self._routes[key] = route
        return route

    def _link(self, node: Node) -> Link:
        link = self._links.get(node.instance)
        if link is None:
            link = self._links[node.instance] = Link(node)
            if node.instance in self._displaced:
                link.busy = self._displaced.pop(node.instance)[1].busy
                link.trouble = "another process or version answers at its address"
                self._busy[link] = None
        return link

    def _displace(self, link: Link, keys: set[Key], now: float) -> None:
        """Another process answers there: a directory that is behind must not send us there again and again."""
        until = now + 2 * BUSY_MOST
        self._displaced[link.node.instance] = (until, link)
        self.due = min([self.due, until, *[link.refuse(key, now) for key in keys]])

    def _discard(self, instance: bytes, key: Key | None) -> None:
        for topic in self.table.discard(instance, key):
            self._doubted.add(topic)
            self._forget_routes(topic)
            self.lookups[topic] = None

    def _forget_routes(self, topic: Topic) -> None:
        """The routes of this topic are found anew, and go on in turn: with whoever is still there of those to come."""
        for key in [k for k in self._routes if k[:2] == topic]:
            old = self._routes.pop(key)
            new = self._find(key)
            if new is not None and new.links:
                to_come = (*old.links[old.turn :], *old.links[: old.turn])
                new.turn = next((new.links.index(link) for link in to_come if link in new.links), 0)
                new.used = old.used
            for link in old.links:
                self._prune(link)

    def _prune(self, link: Link) -> None:
        """Forget an instance that no route leads to and that nothing is left with."""
        if link.idle and not link.up and not any(link in route.links for route in self._routes.values()):
            self._busy.pop(link, None)
            link.topics.clear()  # its connection, if one is still being tried, is of no use to anybody
            if self._links.get(link.node.instance) is link:
                del self._links[link.node.instance]

    def _assign(self, request: Outgoing, link: Link, now: float) -> None:
        if request.size > link.node.max_bytes:
            text = f"{request.size} bytes, and max_message_bytes of {link.node} allows {link.node.max_bytes}"
            self._lose(request, text, MessageTooLarge(f"The message to {request.key} has {text}."))
            return
        request.link = link
        if request.kind == FANOUT and (request.key in link.held or not link.has_room(request.key, self._limits.ahead)):
            link.held.setdefault(request.key, deque()).append(request)
            return
        link.queue.append(request)
        if link.up:
            self._flush(link, now)
        else:
            self.wanted[link] = None

    def _write_held(self, link: Link, now: float) -> None:
        """Write what waits for the server to have begun with earlier ones, or to have room, as far as it may be written."""
        for key, held in list(link.held.items()):
            for _ in range(min(len(held), self._limits.ahead - link.ahead(key))):
                link.queue.append(held.popleft())
            if not held:
                del link.held[key]
        if link.up:
            self._flush(link, now)

    def _flush(self, link: Link, now: float) -> None:
        queue, link.queue = link.queue, deque()
        for request in queue:
            if link.free(request.key, now):
                self._write(request, link, now)
            else:
                link.queue.append(request)

    def _write(self, request: Outgoing, link: Link, now: float) -> None:
        """For the first time, with an id of this instance; or again."""
        if not request.id:
            request.link = link
            request.id = next(self._ids)
            request.writes = 0
            link.open[request.id] = request
        request.writes += 1
        # Casts that were accepted, and whatever has no answer yet; each in the order of the ids.
        floor = next(iter(link.open), request.id)
        if link.taken:
            floor = min(floor, next(iter(link.taken)))
        frames = wire.encode_request(
            ASK if request.accepted else request.kind,
            link.node.instance,
            self.instance,
            request.id,
            floor,
            None if request.deadline == inf else request.deadline - now,
            request.key_bytes,
            codec=request.codec,
            most=self._limits.message_bytes,
            monitor=request.monitor,
            body=() if request.accepted else request.body,
        )
        link.used = now
        link.written += 1
        self.unwritten[link] = None
        small = len(frames) == 1 and len(frames[0]) <= wire.LARGEST_PACKED
        if not small or len(link.outgoing) == wire.MOST_PACKED:
            self._write_out(link)
        if small:
            link.outgoing.append((request, frames[0]))
        elif not self._send(link.socket, frames):
            self._not_written(link, [request])

    def _take_back(self, link: Link) -> list[Outgoing]:
        """The connection is lost: what was not written."""
        self._not_written(link, [request for request, _ in link.outgoing])
        link.outgoing.clear()
        return link.take_back()

    def _write_out(self, link: Link) -> None:
        outgoing = link.outgoing
        if outgoing:
            frames = [frame for _, frame in outgoing]
            if not self._send(link.socket, wire.pack(frames) if len(frames) > 1 else frames):
                self._not_written(link, [request for request, _ in outgoing])
            outgoing.clear()

    def _not_written(self, link: Link, requests: Sequence[Outgoing]) -> None:
        """The connection is gone, which is told in a moment; so they were certainly not sent, unless they were before."""
        for request in requests:
            if request.writes == 1 and link.open.get(request.id) is request:
                del link.open[request.id]
                request.id = 0
                link.queue.append(request)

    def _fan_out(self, request: Outgoing, links: list[Link], now: float) -> None:
        """One copy to each process; the caller waits for none of them, but for room in the outbox."""
        if not request.released and not self._has_room(request, len(links)):
            request.grace_until = min(request.grace_until, now + _HELD)
            self.due = min(self.due, request.grace_until)
            self._wait(request)
            return
        self._settle(request)
        self._finish(request)
        for link in links:
            copy = Outgoing(FANOUT, request.key, request.codec, request.body)
            copy.deadline, copy.pinned, copy.released = request.deadline, link, True
            self.requests[copy] = None
            self._keep(copy)
            self.due = min(self.due, copy.due())
            self._assign(copy, link, now)

    def _answer(self, link: Link, request: Outgoing, answer: Answer, now: float) -> None:
        kind = answer.kind
        if kind in (wire.REPLY, wire.FAILURE):
            request.outcome = answer
            if link.busy:
                link.took(request.key)
            self._settle(request)
            if not request.released:
                request.released = True
                self.finished.append(request)
        elif kind == wire.ACCEPTED:
            self._accepted(link, request, now)
        elif kind == wire.HEARTBEAT:
            request.accepted = True
            request.heard = now
        elif kind == wire.FORGOTTEN:
            reason = f"{link.node} accepted it and no longer knows of it; whether it ran is not known"
            link.taken.pop(request.id, None)
            self._lose(request, reason, MessagingTimeout(f"No reply from {request.key}: {reason}."))
        else:
            self._refused(link, request, kind, now)

    def _accepted(self, link: Link, request: Outgoing, now: float) -> None:
        request.accepted = True
        request.heard = now
        if link.busy:
            link.took(request.key)
        if request.kind != CALL and request.id in link.open:
            self._settle(request)
            link.take(request)
            self._finish(request)
            if request.key in self.waiting:
                self._pump(request.key, now)

    def _refused(self, link: Link, request: Outgoing, kind: int, now: float) -> None:
        """The server did not and will not run it, so that it can go elsewhere."""
        self.counts[f"answers {wire.kind_name(kind)}"] += 1
        if link.taken.pop(request.id, None) is not None:  # a cast that is given back
            request.over = False
            self.requests[request] = None
            self._keep(request)
            self.due = min(self.due, request.due())
        link.open.pop(request.id, None)
        request.accepted = False
        # Whatever the reason, it is not asked again at once: a directory that is behind would send us there for ever.
        self.due = min(self.due, link.refuse(request.key, now))
        self._busy[link] = None
        if kind == wire.GIVEN_BACK and request.kind != CALL and request.deadline <= now:
            request.link = None
            self._lose(request, f"{link.node} accepted it and did not begin it in time", None)
            return
        if kind != wire.BUSY:
            if request.pinned is not None:  # it has left the topic: fanout has nothing to do there
                request.link = None
                self._settle(request)
                return
            self._discard(link.node.instance, request.key)
        self._again(request, now)

    def _again(self, request: Outgoing, now: float) -> None:
        """Give a request that was not run to a server."""
        request.last_id = request.id or request.last_id
        request.id = 0
        request.link = None
        if request.pinned is not None:
            self._assign(request, request.pinned, now)
        elif request.kind == CAST:
            self._wait(request)
            if request.drain is not None:
                request.drain.room = 1
                self._leave_drain(request)
            self._pump(request.key, now)
        else:
            self._route(request, now)

    def _wait(self, request: Outgoing) -> None:
        """Let it wait for a server, behind those to its address that came before it."""
        queue = self.waiting.setdefault(request.key, deque())
        place = len(queue)
        while place and queue[place - 1].order > request.order:
            place -= 1
        queue.insert(place, request)

    def _unwait(self, request: Outgoing) -> None:
        queue = self.waiting.get(request.key)
        if queue is not None and request in queue:
            queue.remove(request)
            if not queue:
                del self.waiting[request.key]
                self._end_drain(request.key)
        elif self._held:
            self._held.get(Topic(*request.key[:2]), {}).pop(request, None)

    def _pump_all(self, now: float) -> None:
        for key in list(self.waiting):
            self._pump(key, now)

    def _pump(self, key: Key, now: float) -> None:
        """Send what waits for this address as long as a server can take it, and of casts no more than are let go at a time."""
        queue = self.waiting.pop(key, None)
        while queue:
            drain = self._draining.get(key) if queue[0].kind == CAST else None
            if drain is not None and drain.sent >= drain.room:
                break
            request = queue.popleft()
            self._route(request, now)
            if key in self.waiting:  # it waits again
                queue.extendleft(reversed(self.waiting.pop(key)))
                break
            if request.kind == CAST and not request.over:
                request.drain = self._draining.setdefault(key, _Drain())
                request.drain.sent += 1
        if queue:
            self.waiting[key] = queue
        else:
            self._end_drain(key)

    def _leave_drain(self, request: Outgoing) -> None:
        """It is not on its way any more."""
        drain, request.drain = request.drain, None
        if drain is not None and self._draining.get(request.key) is drain:
            drain.sent -= 1
            if request.key not in self.waiting:
                if request.accepted:
                    del self._draining[request.key]
                else:
                    self._end_drain(request.key)
            elif not request.accepted:  # else who accepts it sees to that
                self.due = -inf  # those that waited behind it have their turn

    def _end_drain(self, key: Key) -> None:
        """Nothing waits: if nothing that has waited is on its way either, what comes need not wait."""
        drain = self._draining.get(key)
        if drain is not None and not drain.sent:
            del self._draining[key]

    def _overdue(self, request: Outgoing, now: float) -> None:
        known = self._known(request, now)
        if request.deadline <= now:
            error: Exception
            if request.kind == CALL:
                error = MessagingTimeout(f"No reply from {request.key} in time: {known}.")
            else:
                error = MessageDeliveryFailure(f"The message to {request.key} was not taken in time: {known}.")
            self._lose(request, f"its time to live has run out; {known}", error)
        elif request.monitor is not None and request.heard + request.monitor <= now:
            text = f"No heartbeat of the call to {request.key} for {request.monitor:g} s: {known}."
            self._lose(request, "no heartbeat", MessagingTimeout(text))
        elif request.kind == CALL and request.accepted:
            request.grace_until = inf
        elif request.retry is not None:
            text = f"The message to {request.key} was taken by no server in {request.retry + 1} tries: {known}."
            self._lose(request, known, MessageDeliveryFailure(text))
        else:
            self._let_go(request, known, now)

    def _let_go(self, request: Outgoing, known: str, now: float) -> None:
        """The grace of a cast is over: it goes on in the outbox, without its caller; or that waits for room there."""
        route = self._routes.get(request.key)
        copies = len(route.links) if route is not None and request.kind == FANOUT else 1
        limits = self._limits
        if self._has_room(request, copies):
            if request.kind == FANOUT and route is not None:
                self._unwait(request)
                self._fan_out(request, route.links, now)
            else:
                self.counts["messages kept in the outbox"] += 1
                self._keep(request)
                self.finished.append(request)
        elif request.deadline - limits.time_to_live + limits.grace * (1 + HOLD) <= now:
            reason = f"the outbox is full ({len(self._outbox)} messages wait for their servers); {known}"
            self._lose(request, reason, MessageDeliveryFailure(f"The message to {request.key} was refused: {reason}."))
        else:
            request.grace_until = now + _HELD

    def _has_room(self, request: Outgoing, copies: int) -> bool:
        """Whether the outbox can take it; an empty one takes anything."""
        limits = self._limits
        return not self._outbox or (
            len(self._outbox) + copies <= limits.outbox_messages
            and self._outbox_bytes + request.size * copies <= limits.outbox_bytes
        )

    def _keep(self, request: Outgoing) -> None:
        request.released = True
        request.required = False  # whom it would be an error for has gone on
        self._outbox[request] = None
        self._outbox_bytes += request.size

    def _lose(self, request: Outgoing, reason: str, error: Exception | None) -> None:
        """A request ends without its answer: with an error for its caller, or if nobody is to get one, in the log."""
        if request.released or error is None:
            self.counts["messages lost"] += 1
            self.lost.append((request, reason))
        else:
            self.counts[f"messages failed: {type(error).__name__}"] += 1
            self.failed.append((request, reason))
            if (name := self.name(request)) and error.args:
                error.args = (f"{error} (message {name})",)
            request.error = error
        self._settle(request)
        self._finish(request)

    def _settle(self, request: Outgoing) -> None:
        """Nothing more is to be decided about it."""
        request.over = True
        self.requests.pop(request, None)
        if request.drain is not None:
            if request.accepted:
                request.drain.room += 1
            self._leave_drain(request)
        if request in self._outbox:
            del self._outbox[request]
            self._outbox_bytes -= request.size
        link = request.link
        if link is not None and request.id:
            link.open.pop(request.id, None)
            return
        if link is None:
            self._unwait(request)
        else:
            link.drop(request)

    def _finish(self, request: Outgoing) -> None:
        if not request.released:
            request.released = True
            self.finished.append(request)

    def _known(self, request: Outgoing, now: float) -> str:
        """What is known of a request that is not answered, for its error."""
        if request.link is not None:
            node = request.link.node
            if request.accepted:
                return f"{node} accepted it and did not reply"
            if request.id:
                return f"it was sent to {node}, which did not accept it"
            if request.link.up:
                return f"{node} is busy"
            return _unreached([request.link])
        nodes = self.table.nodes(request.key)
        if self._directory_error and not nodes:
            return f"the directory does not answer ({self._directory_error})"
        if nodes is None:
            return "the directory has not answered yet"
        if not nodes:
            return "no server is registered for it"
        if all(node.wire != wire.VERSION for node in nodes):
            return f"its servers speak another version of the wire protocol than ours, {wire.VERSION}: {nodes[0]}"
        links = [self._links[node.instance] for node in nodes if node.instance in self._links]
        refused = [link for link in links if request.key in link.busy and not link.trouble]
        if any(link.busy[request.key][0] + BUSY_MOST > now for link in refused):
            return "all its servers are busy: " + ", ".join(map(str, nodes))
        return _unreached(links) if links else "no connection to " + ", ".join(map(str, nodes))


class Record:
    """A request at its receiver, for as long as it may be repeated."""

    __slots__ = (
        "answer",
        "deadline",
        "forgotten",
        "frames",
        "id",
        "key",
        "kind",
        "monitor",
        "most",
        "routes",
        "running",
        "sender",
    )

    def __init__(self, request: Request, route: bytes, now: float) -> None:
        self.sender = request.sender
        self.id = request.id
        self.kind = request.kind
        self.key = request.key
        self.monitor = request.monitor
        self.most = request.most
        # Every connection that a copy came over, the latest read last: it need not be the latest made.
        self.routes: tuple[bytes, ...] = (route,)
        self.deadline = now + min(request.left if request.left is not None else inf, _LONGEST)
        self.answer = 0
        self.frames: list[bytes] | None = None
        self.running = False
        self.forgotten = False


class _Peer:
    """What a receiver remembers of one sender."""

    __slots__ = ("heard", "highest", "records")

    def __init__(self) -> None:
        self.highest = 0
        self.heard = 0.0
        self.records: dict[int, Record] = {}


class Receiver:
    """The receiving side of one process, towards every sender.

    :ivar unanswered: calls that have no answer yet, with when they are acknowledged; only to be looked at.
    :ivar acks: requests to be acknowledged by :meth:`flush`, by route.
    :ivar outgoing: small replies that it is to write, by route.
    """

    def __init__(self, instance: bytes, send: Callable[[bytes, list[bytes]], bool]) -> None:
        """:param send: writes frames to the connection of a route; whether there is one."""
        self.instance = instance
        self.counts: Counter[str] = Counter()
        self.due = inf
        self._send = send
        self._peers: dict[bytes, _Peer] = {}
        self.acks: defaultdict[bytes, list[int]] = defaultdict(list)
        self._done: defaultdict[bytes, list[int]] = defaultdict(list)
        self._done_at = inf
        # Fanouts that have no answer yet.
        self._fanouts: dict[Record, None] = {}
        self._fanouts_at = inf
        self.outgoing: defaultdict[bytes, list[bytes]] = defaultdict(list)
        self.unanswered: OrderedDict[Record, float] = OrderedDict()
        self._replies: OrderedDict[Record, int] = OrderedDict()
        self._reply_bytes = 0
        self._sweep_at = inf

    def request(self, route: bytes, request: Request, now: float) -> Record | None:
        """A request arrived. A record: it is new, to be accepted or refused; None: nothing is to be done with it."""
        if request.to != self.instance:
            self.counts["requests for another instance"] += 1
            self._answer((route,), wire.WRONG_INSTANCE, request.id)
            return None
        peer = self._peers.get(request.sender)
        if peer is None:
            peer = self._peers[request.sender] = _Peer()
            if self._sweep_at == inf:
                self._sweep_at = now + _SWEEP
                self.due = min(self.due, self._sweep_at)
        peer.heard = now
        records = peer.records
        while records and (lowest := next(iter(records))) < request.floor:
            self._forget(records.pop(lowest))
        record = records.get(request.id)
        if record is not None:
            self._repeated(record, route)
            return None
        if request.id <= peer.highest or request.kind == ASK:
            self.counts["requests closed long ago"] += 1
            if request.kind == ASK:
                self._answer((route,), wire.FORGOTTEN, request.id)
            return None
        peer.highest = request.id
        record = records[request.id] = Record(request, route, now)
        if len(records) > REMEMBER:
            self._trim(records)
        if record.deadline <= now:
            self.counts["requests too late"] += 1
            return None
        return record

    def accept(self, record: Record, now: float) -> None:
        """The request is in the queue of a listener."""
        record.answer = wire.ACCEPTED
        record.running = True
        if record.kind == CALL:
            self.unanswered[record] = now + ACK_DELAY
            self.due = min(self.due, now + ACK_DELAY)
        elif record.kind == FANOUT:
            self._fanouts[record] = None
            if self._fanouts_at == inf:
                self._fanouts_at = now + FANOUT_DELAY
                self.due = min(self.due, self._fanouts_at)
        else:
            self._collect(self.acks, record)

    def refuse(self, record: Record, kind: int) -> bool:
        """The request is not and will not be run here: busy, not here, or given back. Whether its sender could be told."""
        record.answer = kind
        record.running = False
        self.unanswered.pop(record, None)
        self._fanouts.pop(record, None)
        self.counts[f"requests refused: {wire.kind_name(kind)}"] += 1
        return self._answer(record.routes, kind, record.id)

    def started(self, record: Record, now: float) -> None:
        """A cast or fanout was begun: its sender need not keep it any longer."""
        record.answer = wire.DONE
        record.running = False
        if record in self._fanouts:
            return  # one answer tells both
        self._collect(self._done, record)
        # Who sends fanouts may wait for this, to send more of them.
        self._done_at = min(self._done_at, now + (FANOUT_DELAY if record.kind == FANOUT else ACK_DELAY))
        self.due = min(self.due, self._done_at)

    def reply(self, record: Record, kind: int, codec: int, body: Sequence[bytes], at_once: bool = False) -> None:
        """A call was run: a reply or a failure, which :meth:`flush` is to write if it is small, unless that is done at once."""
        self.unanswered.pop(record, None)
        record.running = False
        record.answer = kind
        if record.forgotten:
            self.counts["replies nobody waits for"] += 1
            return
        record.frames = wire.encode_answer(kind, self.instance, (record.id,), codec=codec, body=body)
        write = self._send if at_once else self._write
        for route in record.routes:
            write(route, record.frames)
        size = self._replies[record] = _size(record.frames)
        self._reply_bytes += size
        while self._reply_bytes > REPLY_CACHE and len(self._replies) > 1:
            self._drop_reply(next(iter(self._replies)))

    def heartbeat(self, record: Record) -> None:
        """A call is still being run."""
        if record.running and not record.forgotten:
            self.unanswered.pop(record, None)
            self._answer(record.routes, wire.HEARTBEAT, record.id)

    def tick(self, now: float) -> None:
        """Whatever is due by now: acknowledgements, and the forgetting of what nobody asks for any more."""
        while self.unanswered:
            record, due = next(iter(self.unanswered.items()))
            if due > now:
                break
            del self.unanswered[record]
            self._collect(self.acks, record)
        if self._fanouts_at <= now:
            self._fanouts_at = inf
            self._done_at = min(self._done_at, now)
            for record in self._fanouts:
                self._collect(self._done if record.answer == wire.DONE else self.acks, record)
            self._fanouts.clear()
        if self._done_at <= now:
            self._done_at = inf
            self._write_ids(wire.DONE, self._done)
        if self._sweep_at <= now:
            self._sweep(now)
        self.due = min(self._sweep_at, self._done_at, self._fanouts_at, next(iter(self.unanswered.values()), inf))

    def flush(self) -> None:
        """Write the acknowledgements and small replies collected since: as few messages to each connection."""
        if self.acks:
            self._write_ids(wire.ACCEPTED, self.acks)
        while self.outgoing:
            route = next(iter(self.outgoing))
            self._write_out(route, self.outgoing[route])
            self.outgoing.pop(route, None)

    def _write(self, route: bytes, frames: list[bytes]) -> None:
        if len(frames) > 1 or len(frames[0]) > wire.LARGEST_PACKED:
            self._send(route, frames)
            return
        outgoing = self.outgoing[route]
        if len(outgoing) == wire.MOST_PACKED:
            self._write_out(route, outgoing)
        outgoing.append(frames[0])

    def _write_out(self, route: bytes, outgoing: list[bytes]) -> None:
        if outgoing:
            self._send(route, wire.pack(outgoing) if len(outgoing) > 1 else [outgoing[0]])
            outgoing.clear()

    def _write_ids(self, kind: int, ids: dict[bytes, list[int]]) -> None:
        for route, answered in ids.items():
            for i in range(0, len(answered), wire.MOST_IDS):
                self._send(route, wire.encode_answer(kind, self.instance, answered[i : i + wire.MOST_IDS]))
        ids.clear()

    @staticmethod
    def _collect(answers: dict[bytes, list[int]], record: Record) -> None:
        for route in record.routes:
            answers[route].append(record.id)

    def _answer(self, routes: Sequence[bytes], kind: int, id: int) -> bool:
        frames = wire.encode_answer(kind, self.instance, (id,))
        written = [self._send(route, frames) for route in routes]
        return any(written)

    def _repeated(self, record: Record, route: bytes) -> None:
        """Answered with what was answered before.

        Answers to come are written to every connection that a copy came over: only the sender knows which stands, and the
        others are gone.
        """
        self.counts["requests repeated"] += 1
        if route not in record.routes:
            record.routes = (*record.routes[-3:], route)
        if record.frames is not None:
            self._send(route, record.frames)
        elif record.answer in (wire.REPLY, wire.FAILURE):  # it was dropped, to bound the memory
            self._answer((route,), wire.FORGOTTEN, record.id)
        elif record.answer:
            if record.answer == wire.DONE:
                self._answer((route,), wire.ACCEPTED, record.id)
            self._answer((route,), record.answer, record.id)

    def _forget(self, record: Record) -> None:
        record.forgotten = True
        if record in self._replies:
            self._drop_reply(record)
        self.unanswered.pop(record, None)
        self._fanouts.pop(record, None)

    def _drop_reply(self, record: Record) -> None:
        self._reply_bytes -= self._replies.pop(record)
        record.frames = None

    def _trim(self, records: dict[int, Record]) -> None:
        for id in [id for id, record in records.items() if not record.running][: REMEMBER // 10]:
            self._forget(records.pop(id))

    def _sweep(self, now: float) -> None:
        for sender, peer in list(self._peers.items()):
            for id in [id for id, r in peer.records.items() if r.deadline <= now and not r.running]:
                self._forget(peer.records.pop(id))
            if peer.heard + FORGET <= now and not peer.records:
                del self._peers[sender]
        over = len(self._peers) + sum(len(peer.records) for peer in self._peers.values()) - REMEMBER_ALL
        if over > 0:
            self._forget_oldest(over)
        self._sweep_at = now + _SWEEP if self._peers else inf

    def _forget_oldest(self, count: int) -> None:
        """So many senders and requests; no clients of ours are so many, but a stranger may make up senders without end."""
        for sender, peer in sorted(self._peers.items(), key=lambda item: item[1].heard):
            for id in [id for id, record in peer.records.items() if not record.running]:
                self._forget(peer.records.pop(id))
                count -= 1
            if not peer.records:
                del self._peers[sender]
                count -= 1
            if count <= 0:
                return
