# SPDX-License-Identifier: Apache-2.0
"""In a worker: strangers that send whatever may be wrong, to a server and to its clients; the same for the same seed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import oslo_messaging
import zmq
from oslo_config import cfg
from oslo_messaging.transport import TransportURL

from green_zmq import config, wire
from green_zmq.directory import open_directory
from green_zmq.errors import WireError, WireVersionError
from green_zmq.routing import Node, Topic
from green_zmq.server import Revoked
from green_zmq.wire import JSON, MSGPACK, Key
from tests.contract import models, scenarios
from tests.contract.scenarios import _batches, _prepared, transport

_HEADER = struct.Struct("!2sBBB16s16sQQQQIH")
_MOST = (1 << 64) - 1
_EXTREMES = (0, 1, 2, 255, 1 << 31, 1 << 32, 1 << 62, 1 << 63, _MOST - 1, _MOST)
_BURST = 2000


# The server that is sent all that.


def listen(url: str, topic: str, ledger: str) -> None:
    """Run every message by writing its sender and id to that file, and return its argument.

    Those that must not be run any more are there as well, behind a word that says so.
    """
    file = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def run(batch: list[Any]) -> None:
        for message in batch:
            name = f"{message.record.sender.hex()}.{message.record.id}"
            try:
                message.acknowledge()
            except Revoked:
                os.write(file, f"revoked {name}\n".encode())
                continue
            os.write(file, f"{name}\n".encode())
            message.reply(message.message.get("args"))

    listener = transport(url)._driver.listen(oslo_messaging.Target(topic=topic, server="ledger"), 1, None)
    listener.start(run)
    _batches[topic] = (listener, [], [])


# What may be wrong with a body.


def _extension(type_: int, data: bytes) -> bytes:
    return struct.pack("!BIb", 0xC9, len(data), type_) + data


def _nested(levels: int, type_: int) -> bytes:
    raw = b"\x90"
    for _ in range(levels):
        raw = b"\x91" + _extension(type_, raw)
    return raw


def _places(*of: Any) -> bytes:
    return json.dumps(of).encode()


_GOOD = b'[{}, {"method": "note", "args": {"value": null}}]'
_PLACE = ([1, "args", "value"], 1)

JSON_BODIES: list[list[bytes]] = [
    *([raw] for raw in (b"", b"{", b"[1]", b"null", b"5", b'""', b'"ab"', b"[1, 2]", b"[{}, {}, {}]", b'{"a": 1, "b": {}}')),
    *([raw] for raw in (b"\xff\xfe", b"\x00", b"NaN", b"[{}, NaN]", b"[Infinity, -Infinity]", b"1e999", b"-", b"[{}, [{}]]")),
    *([raw] for raw in (b"[" * 5000, b"[" * 5000 + b"]" * 5000, b'{"a":' * 5000, b"9" * 5000, b"[{}, " + b"9" * 4999 + b"]")),
    *([raw] for raw in (b'[{}, {"method": null}', b"[{}, 'x']", b'"\\ud800"', b'["\\ud800", "x"]', b'[null, "\\u0000"]')),
    [_GOOD, b""],
    [_GOOD, b"left over", b"left over"],
    *([_GOOD, raw] for raw in (b"5", b"null", b'"ab"', b"{}", b"[[]]", b"[1]", b'{"ab": 1}', b"[[[], 1]]", b"[" * 5000)),
    *([_GOOD, _places(place), b"piece"] for place in ([[9, "x"], 1], [[-9], 1], [[10**30], 1], [[1, "no", "x"], 1], [5, 1])),
    *([_GOOD, _places([_PLACE[0], n]), b"piece"] for n in (-1, 0, 2, 10**30, 1.5, "1", None, [1], 1e300)),
    *(
        [_GOOD, _places([path, 1]), b"piece"]
        for path in ([[1]], [{}], [None], [1, "args", "value", 0], [[[]]], [1.0], [True, 0])
    ),
    [_GOOD, _places(_PLACE), b"\xff"],
    [_GOOD, _places(_PLACE)],
    [_GOOD, _places(_PLACE), b"piece", b"piece"],
    [_GOOD, _places([[], 1]), b"it is all text"],
    [_GOOD, _places([[0], 1]), b"a context that is text", b"x"],
    [b"[{}, []]", _places([[1, -1], 1]), b"piece"],
]
MSGPACK_BODIES: list[list[bytes]] = [
    *([raw] for raw in (b"", b"\x80", b"\xc1", b"\x92\x80", b"\x92\x80\x80\x80", b"\x93\x80\x80\x80", b"\xc0", b"\xa2ab")),
    *([raw] for raw in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xffx", b"\xc6\xff\xff\xff\xffx")),
    *([b"\xc9\xff\xff\xff\xff" + bytes([type_])] for type_ in range(10)),
    *([_extension(type_, data)] for type_ in (-128, -1, *range(9), 127) for data in (b"", b"\x80", b"\x92\x01\x02", b"0" * 32)),
    *([b"\x92\x80" + _nested(levels, type_)] for levels in (5, 100, 1000) for type_ in (1, 4, 5, 6, 7)),
    *(
        [raw]
        for raw in (b"\x91" * 600, b"\x81\xa0" * 600, b"\x91" * 5000, (b"\xdd\x00\x00\x10\x00") * 100, b"\x92\x80\xcb\x7f\xf8")
    ),
    [b"\x92\x80\x80", _extension(2, b"\x92\x01\x02"), b"piece"],
    [b"\x92\x80\x80", b"\x91\x92\x91\x00" + _extension(3, b"\x01"), b"piece"],
    [b"\x92\x80\x80", b"\x91\x92" + _extension(4, b"\x91\x00") + b"\x01", b"piece"],
    # What is made of a count that never ends, here of zeros.
    *([_extension(type_, _extension(2, b"\x92\x00\x00"))] for type_ in (1, 4, 5, 6, 7)),
]


def _flipped(raw: bytes, chance: random.Random, most: int = 8) -> bytes:
    changed = bytearray(raw)
    for _ in range(chance.randint(1, most)):
        changed[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    return bytes(changed)


class Requests:
    """Requests to one address of a server, most of them wrong in one way, some of them right.

    Every right one has an id of its own, and those far ahead or back are of senders that nothing else is sent from.
    """

    def __init__(self, seed: int, instance: bytes, key: Key, recorded: Sequence[list[bytes]]) -> None:
        self.chance = random.Random(seed)
        self._instance = instance
        self._key = wire.encode_key(key)
        self._recorded = recorded
        self._senders = [self.chance.randbytes(16) for _ in range(40)]
        self._ids = itertools.count(1)
        self._sent: list[list[bytes]] = []
        few: list[tuple[int, Callable[[], list[bytes]]]] = [
            (20, self.right),
            (100, self.replayed),
            (40, self.recorded),
            (150, self.out_of_range),
            (150, self.flipped),
            (120, self.truncated),
            (80, self.framed),
            (70, self.other_version),
            (60, self.bad_body),
            (60, self.bad_body_in_msgpack),
            (40, self.answer),
            (60, self.noise),
            (30, self.ask),
            (60, self.packed),
            (3, self.figures),
            (1, self.large),
        ]
        self._ways = [way for _, way in few]
        self._weights = list(itertools.accumulate(weight for weight, _ in few))

    def take(self, count: int) -> list[list[bytes]]:
        found = [way() for way in self.chance.choices(self._ways, cum_weights=self._weights, k=count)]
        self._sent = (self._sent + found[:50])[-5000:]
        return found

    def _request(self, *body: bytes, codec: int = JSON, kind: int = 0, **fields: Any) -> list[bytes]:
        id = next(self._ids)
        value = {
            "version": 1,
            "kind": kind or self.chance.choice((wire.CALL, wire.CALL, wire.CAST, wire.FANOUT)),
            "codec": codec,
            "to": self._instance,
            "sender": self._senders[id % 40],
            "id": id,
            "floor": max(1, id - 400),
            "left": 20_000,
            "most": _MOST,
            "monitor": 0,
            "size": len(self._key),
            **fields,
        }
        header = _HEADER.pack(b"gz", *value.values()) + self._key
        return [header + body[0], *body[1:]] if body else [header]

    def right(self) -> list[bytes]:
        return self._request(_GOOD)

    def replayed(self) -> list[bytes]:
        return self.chance.choice(self._sent) if self._sent else self.right()

    def recorded(self) -> list[bytes]:
        return self.chance.choice(self._recorded) if self._recorded else self.right()

    def out_of_range(self) -> list[bytes]:
        chance = self.chance
        field = chance.choice(("kind", "codec", "to", "id", "floor", "left", "most", "monitor", "size"))
        if field == "to":
            value: Any = chance.randbytes(16)
        elif field in ("kind", "codec"):
            value = chance.randrange(256)
        elif field == "monitor":
            value = chance.choice((1, 999, 1 << 31, (1 << 32) - 1))
        elif field == "size":
            value = chance.choice((0, 1, len(self._key) - 1, len(self._key) + 1, 0x7FFF, 0xFFFF))
        else:
            value = chance.choice(_EXTREMES)
        if field in ("id", "floor"):  # the sender can do nothing any more afterwards
            floor = value if field == "floor" else 0
            return self._request(_GOOD, **{"sender": chance.randbytes(16), "floor": floor, field: value})
        return self._request(_GOOD, **{field: value})

    def flipped(self) -> list[bytes]:
        frames = self._request(_GOOD, sender=self.chance.randbytes(16) if self.chance.random() < 0.1 else self._senders[0])
        return [_flipped(frames[0], self.chance)]

    def truncated(self) -> list[bytes]:
        (frame,) = self._request(_GOOD)
        return [frame[: self.chance.randrange(len(frame))]]

    def framed(self) -> list[bytes]:
        frames, chance = self._request(_GOOD), self.chance
        way = chance.randrange(6)
        if way == 0:
            return [b""] * chance.randint(1, 5)
        if way == 1:
            return [b"", *frames]
        if way == 2:
            return [*frames, b""]
        if way == 3:
            return [frames[0][: _HEADER.size + len(self._key)], *([b""] * chance.randint(0, 3))]
        if way == 4:
            return frames + [b"x"] * chance.choice((1, 2, 3, 10, 100))
        return [frames[0][i : i + 7] for i in range(0, len(frames[0]), 7)]

    def other_version(self) -> list[bytes]:
        version = self.chance.choice((0, 2, 3, self.chance.randrange(256)))
        rest = self.chance.randbytes(self.chance.randrange(100)) if self.chance.random() < 0.5 else self.right()[0][3:]
        return [b"gz" + bytes([version]) + rest]

    def bad_body(self) -> list[bytes]:
        body = self.chance.choice(JSON_BODIES)
        return (
            self._request(*body) if self.chance.random() < 0.9 or not body[0] else self._request(_flipped(body[0], self.chance))
        )

    def bad_body_in_msgpack(self) -> list[bytes]:
        body = self.chance.choice(MSGPACK_BODIES)
        if self.chance.random() < 0.3 and body[0]:
            body = [_flipped(body[0], self.chance), *body[1:]]
        return self._request(*body, codec=MSGPACK)

    def answer(self) -> list[bytes]:
        kind = self.chance.choice(list(wire.ANSWERS))
        ids = [self.chance.randrange(1 << 64) for _ in range(self.chance.choice((0, 1, 1, 2, 300)))]
        return wire.encode_answer(kind, self._instance, ids, body=[b"1"])

    def noise(self) -> list[bytes]:
        chance = self.chance
        if chance.random() < 0.3:
            return [b"gz\x01" + bytes([chance.randrange(6)]) + chance.randbytes(chance.randrange(200))]
        return [chance.randbytes(chance.randrange(200)) for _ in range(chance.choice((1, 1, 1, 2, 7)))]

    def ask(self) -> list[bytes]:
        return self._request(kind=wire.ASK, id=self.chance.choice((next(self._ids), self.chance.randrange(1, 100_000), _MOST)))

    def packed(self) -> list[bytes]:
        """Several in one frame, or what looks like it."""
        chance = self.chance
        few = (self.right, self.flipped, self.truncated, self.other_version, self.bad_body, self.noise, self.answer)
        messages = [chance.choice(few)()[0] for _ in range(chance.choice((0, 1, 2, 3, wire.MOST_PACKED, wire.MOST_PACKED + 1)))]
        if messages and chance.random() < 0.1:
            messages[0] = wire.pack(messages)[0]
        (frame,) = wire.pack(messages)
        way = chance.randrange(5)
        if way == 0:
            return [_flipped(frame[: 8 + 4 * len(messages)], chance) + frame[8 + 4 * len(messages) :]]
        if way == 1:
            return [frame[: chance.randrange(len(frame) + 1)]]
        if way == 2:
            return [frame, b"more"]
        return [frame]

    def figures(self) -> list[bytes]:
        return self._request(kind=wire.FIGURES, to=self.chance.randbytes(16))

    def large(self) -> list[bytes]:
        way = self.chance.randrange(3)
        if way == 0:
            return self._request(b"[{}, " * 20_000)
        if way == 1:
            return self._request(_GOOD, _places([_PLACE[0], 1000]), *[b"piece"] * 1000)
        return [self.chance.randbytes(100_000)]


def sort(frames: list[bytes]) -> list[str]:
    """What it is counted as, or what it is; each of several that are one message."""
    try:
        return [_sort(message) for message in wire.unpack(frames)]
    except WireError:
        return ["none"]


def _sort(frames: list[bytes]) -> str:
    try:
        request = wire.decode_request(frames)
    except WireVersionError:
        return "version"
    except WireError:
        return "none"
    return "figures" if request.kind == wire.FIGURES else "requests"


def attack(
    host: str, port: int, instance: str, topic: str, count: int, seed: int, recorded: Sequence[str] = ()
) -> dict[str, Any]:
    """Send so many messages over a few connections; what they were, and what was answered."""
    frames = [[bytes.fromhex(each)] for each in recorded]
    requests = Requests(seed, bytes.fromhex(instance), Key("openstack", topic, ""), frames)
    kinds: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sending = 0.0
    try:
        dealers = [context.socket(zmq.DEALER) for _ in range(3)]
        for dealer in dealers:
            dealer.set(zmq.SNDHWM, 0)
            dealer.set(zmq.RCVHWM, 0)
            dealer.connect(f"tcp://{host}:{port}")
        for burst in range(0, count, _BURST):
            messages = requests.take(min(_BURST, count - burst))
            kinds.update(itertools.chain.from_iterable(map(sort, messages)))
            dealer = dealers[burst // _BURST % 3]
            began = time.perf_counter()
            for message in messages:
                dealer.send_multipart(message, copy=True)
            sending += time.perf_counter() - began
            kinds["figures"] += 1
            answers.update(_drain(dealer, bytes.fromhex(instance), _MOST - 100 - burst))
    finally:
        context.destroy(0)
    return {"kinds": kinds, "answers": answers, "per second": count / sending}


def _drain(dealer: zmq.Socket[bytes], instance: bytes, mark: int) -> Counter[str]:
    """Wait until all that was sent has been dealt with; the answers that came."""
    found: Counter[str] = Counter()
    dealer.send_multipart(
        wire.encode_request(wire.FIGURES, instance, bytes(16), mark, mark, 5.0, wire.encode_key(Key("", "", "")))
    )
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if dealer.poll(1000):
            for answer in wire.unpack(dealer.recv_multipart()):
                found[wire.kind_name(answer[0][3])] += 1
                if answer[0][23:31] == mark.to_bytes(8, "big"):
                    return found
    raise AssertionError("a server that is sent nonsense does not answer within a minute")


# A real client, and what it sends.


def record(url: str, topic: str, count: int) -> dict[str, Any]:
    """Calls and casts of this process, and the frames they were, as they went to its connections."""
    client = _prepared(url, topic)
    client.call({}, "note", value=-1)  # from here on nothing but them is written
    engine = transport(url)._driver._engine
    written: list[str] = []
    send = engine._loop.send

    def spy(socket: Any, frames: Sequence[bytes]) -> bool:
        written.extend(frame.hex() for frame in frames)
        return bool(send(socket, frames))

    engine._loop.send = spy
    for value in range(count):
        client.call({}, "note", value=value)
        client.cast({}, "note", value=value)
    del engine._loop.send
    return {"frames": written, "sender": engine.instance.hex()}


def forge(host: str, port: int, instance: str, topic: str, sender: str) -> None:
    """A request of that sender, with the highest id there is."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        dealer = context.socket(zmq.DEALER)
        dealer.connect(f"tcp://{host}:{port}")
        key = wire.encode_key(Key("openstack", topic, ""))
        to, of = bytes.fromhex(instance), bytes.fromhex(sender)
        dealer.send_multipart(wire.encode_request(wire.CAST, to, of, _MOST, _MOST, 5.0, key, codec=JSON, body=[_GOOD]))
        _drain(dealer, to, 1)
    finally:
        context.destroy(0)


# Bytes that are no ZeroMQ.

_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(55, b"\x00")
_READY = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"


_calm = threading.Event()


def attack_tcp(host: str, port: int, seed: int) -> int:
    """Connections that speak something else, or ZeroMQ's protocol wrongly, until :func:`calm`; how many were made.

    Some say nothing more after what they began with, and stay for all that time.
    """
    chance = random.Random(seed)
    right = _GREETING + _READY + b"\x00\x05hello"
    texts = [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
        _GREETING,
        _GREETING + _READY + b"\x02" + struct.pack("!Q", 1 << 62),
        _GREETING + _READY + b"\x03" + struct.pack("!Q", _MOST),
        _GREETING + _READY + b"\x01\x00" * 5000,
        _GREETING + _READY + b"\x04\x05\x04PING",
        _GREETING + _READY + b"\x04\x00" + b"\x06\x00",
        _GREETING + _READY.replace(b"DEALER", b"CLIENT"),
        _GREETING + _READY.replace(b"DEALER", b"ROUTER"),
        _GREETING + _READY.replace(b"\x00\x00\x00\x06DEALER", b"\xff\xff\xff\xffDEALER"),
    ]
    made = 0
    with contextlib.ExitStack() as silent:
        held: deque[socket.socket] = deque()
        for number in itertools.count():
            if _calm.wait(0.005):  # it is to disturb the server, not to take its time
                break
            way = number % 4
            if way == 0:
                data = texts[number // 4 % len(texts)]
            elif way == 1:
                data = right[: chance.randrange(len(right))]
            elif way == 2:
                data = _flipped(right, chance, 3)
            else:
                data = chance.randbytes(chance.choice((1, 10, 64, 1000)))
            with contextlib.suppress(OSError):
                stranger = socket.create_connection((host, port), timeout=10)
                made += 1
                (silent.enter_context if number < 100 else held.append)(stranger)
                stranger.sendall(data)
            while len(held) > 100:
                held.popleft().close()
            if number % 100 == 0:
                _connect_wrongly(host, port)
        for stranger in held:
            stranger.close()
    return made


def calm() -> None:
    _calm.set()


def _connect_wrongly(host: str, port: int) -> None:
    """Sockets of kinds that a ROUTER takes nothing from, or nothing sensible."""
    kinds = (zmq.ROUTER, zmq.REQ, zmq.PUB, zmq.REP, zmq.SUB, zmq.PUSH, zmq.PULL, zmq.PAIR)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        strangers = [context.socket(kind) for kind in kinds]
        for stranger in strangers:
            stranger.connect(f"tcp://{host}:{port}")
            if stranger.type in (zmq.REQ, zmq.PUB, zmq.PUSH):
                with contextlib.suppress(zmq.ZMQError):
                    stranger.send(b"gz", zmq.NOBLOCK)
        _calm.wait(0.1)  # time to connect
    finally:
        context.destroy(0)


# Servers that answer nonsense.

# The most ids that an answer has room for: no message of ours takes longer to be looked at.
_IDS = range(1 << 40, (1 << 40) + wire.MOST_IDS)


class Answers:
    """Answers to a request, most of them wrong."""

    def __init__(self, seed: int, instance: bytes) -> None:
        self.chance = random.Random(seed)
        self._instance = instance
        self._recent: list[int] = [1]

    def to(self, request: wire.Request) -> list[list[bytes]]:
        chance = self.chance
        self._recent = [*self._recent[-20:], request.id]
        found = [self.wrong() for _ in range(chance.randint(20, 120))]
        if chance.random() < 0.2:
            found += [self.meant(request.id) for _ in range(chance.randint(1, 5))]
        if chance.random() < 0.8:
            _, message = wire.decode_body(request.body, request.codec, lambda: None)
            right = wire.encode_body(message["args"]["value"], JSON, lambda: None)
            reply = self._answer(wire.REPLY, request.id, right)
            found += [reply] * chance.choice((1, 1, 2))
        return found

    def _answer(self, kind: int, id: int, body: Sequence[bytes] = (), codec: int = JSON) -> list[bytes]:
        return wire.encode_answer(kind, self._instance, (id,), codec=codec, body=body)

    def meant(self, id: int) -> list[bytes]:
        """For a request that waits: it ends with an error, or goes on."""
        chance = self.chance
        way = chance.randrange(40)
        if way < 8:
            return self._answer(wire.REPLY, id, chance.choice([b for b in JSON_BODIES if b[0][:4] not in (b"null", b"[{},")]))
        if way < 12:
            return self._answer(wire.REPLY, id, chance.choice(MSGPACK_BODIES), MSGPACK)
        if way < 14:
            return self._answer(wire.REPLY, id, [b'{"strange": 1}'], chance.randrange(256))
        if way < 20:
            told = chance.choice(
                ('{"class": 5}', "[]", "{", '{"module": "builtins", "class": "ValueError", "tb": 5}', "[" * 5000)
            )
            return self._answer(wire.FAILURE, id, [json.dumps(told).encode()])
        if way < 22:
            return self._answer(wire.FAILURE, id, chance.choice(JSON_BODIES))
        if way < 23:
            return [b"gz" + bytes([chance.choice((0, 2, 200))]) + b"\x18"]
        if way < 24:
            return self._answer(wire.WRONG_INSTANCE, id)
        kinds = (wire.ACCEPTED, wire.BUSY, wire.NOT_HERE, wire.GIVEN_BACK, wire.HEARTBEAT, wire.DONE, wire.FORGOTTEN)
        ids = [chance.choice(self._recent) for _ in range(chance.choice((1, 1, 5, 50)))]
        return wire.encode_answer(chance.choice(kinds), self._instance, ids)

    def wrong(self) -> list[bytes]:
        """For nobody who waits, or none at all."""
        chance = self.chance
        id = (1 << 40) + chance.randrange(1 << 50)
        usual = [kind for kind in wire.ANSWERS if kind not in (wire.WRONG_INSTANCE, wire.WRONG_VERSION)]
        whole = self._answer(chance.choice(usual), id, [b'{"strange": 2}'])
        way = chance.randrange(8)
        if way == 0:
            return wire.encode_answer(wire.HEARTBEAT, self._instance, [id + n for n in range(chance.choice((0, 2, 100, 5000)))])
        if way == 1:
            return [whole[0][: chance.randrange(len(whole[0]))]]
        if way == 2:
            return wire.encode_answer(chance.choice(usual), chance.randbytes(16), self._recent[-1:], codec=JSON, body=[b"1"])
        if way == 3:  # but for the version and the kind, which say that nobody is there any more
            return [b"gz\x01" + whole[0][3:4] + _flipped(whole[0][4:], chance)[:17] + whole[0][21:]]
        if way == 4:
            return [chance.randbytes(chance.randrange(100)) for _ in range(chance.choice((1, 2, 5)))]
        if way == 5:
            return [b"gz\x01" + bytes([chance.choice((0, 1, 2, 3, 4, 5, 9, 99, 255))]) + chance.randbytes(100)]
        if way == 6:
            return [*whole, *[b"x"] * chance.choice((1, 10, 200))]
        return whole


_fakes: dict[str, dict[str, int]] = {}


def answer_wrongly(url: str, topic: str, seed: int, at_length: int = 0) -> int:
    """Be a server of the topic, as far as the directory says; runs until its process ends. Its port.

    :param at_length: it answers with nothing but so many of the longest answers, for nobody who waits.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.set(zmq.SNDHWM, 0)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    instance = random.Random(seed).randbytes(16)
    node = Node(instance, "127.0.0.1", port, "fake", os.getpid(), "threads")
    open_directory(config.read(cfg.CONF, TransportURL.parse(cfg.CONF, url))).announce(
        node, {(Topic("openstack", topic), "fake")}
    )
    state = _fakes[topic] = {"requests": 0, "answers": 0}

    def serve() -> None:
        answers = Answers(seed, instance)
        lengthy = [wire.encode_answer(wire.HEARTBEAT, instance, _IDS)] * at_length
        while True:
            route, *frames = router.recv_multipart()
            for message in wire.unpack(frames):
                state["requests"] += 1
                for answer in lengthy or answers.to(wire.decode_request(message)):
                    router.send_multipart([route, *answer])
                    state["answers"] += 1

    models.spawn(serve)
    return port


def answered_wrongly(topic: str) -> dict[str, int]:
    return _fakes[topic]


def call_fake(url: str, topic: str, callers: int, timeout: float, label: str) -> dict[str, Any]:
    """Call, and at every tenth time cast, until :func:`release` of that label; what came of it.

    With the seconds that the slowest took, and those of CPU that this process used meanwhile.
    """
    from tests.contract.scenarios import _servers

    endpoint = _servers[label][1]
    client = _prepared(url, topic, timeout=timeout, retry=0)
    outcomes: Counter[str] = Counter()
    strange: list[str] = []
    slowest = busy = 0.0

    def run(caller: int) -> None:
        nonlocal slowest, busy
        for number in itertools.count():
            if endpoint.released:
                return
            value = f"{caller} {number}"
            began, cpu = time.monotonic(), time.process_time()
            try:
                if number % 10 == 9:
                    client.cast({}, "note", value=value)
                    outcomes["cast"] += 1
                else:
                    got = client.call({}, "note", value=value)
                    if got == value:
                        outcomes["right"] += 1
                    elif isinstance(got, str) and got[:1].isdigit():
                        strange.append(f"the reply of another: {got}")
                    else:
                        outcomes["what it was told"] += 1
            except Exception as error:
                outcomes[type(error).__name__] += 1
            if time.monotonic() - began > slowest:
                slowest, busy = time.monotonic() - began, time.process_time() - cpu

    for outcome in models.parallel([lambda n=n: run(n) for n in range(callers)]):  # type: ignore[misc]
        outcome.result(120)
    return {"outcomes": outcomes, "strange": strange, "slowest": slowest, "busy": busy}


def cpu_between_turns(label: str) -> tuple[float, float]:
    """Until that server is released: the most CPU that this thread used between two turns of one of its green threads, and all
    that it used, seconds. Other processes do not change that, as they do what a clock says."""
    released = scenarios._servers[label][1]
    most, began = 0.0, time.thread_time()
    before = began
    while not released.released:
        models.sleep(0.001)
        now = time.thread_time()
        most, before = max(most, now - before), now
    return most, before - began
