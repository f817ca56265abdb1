# SPDX-License-Identifier: Apache-2.0
"""Messages to frames and back, and what becomes of frames that are none."""

from __future__ import annotations

import contextlib
import copy
import datetime
import struct
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oslo_serialization import msgpackutils

from green_zmq import wire
from green_zmq.errors import Unserializable, WireError, WireVersionError
from green_zmq.wire import JSON, LARGE, MSGPACK, Key

TO, SENDER = b"t" * 16, b"s" * 16
KEY = Key("ex", "topic", "server")
CODECS = (JSON, MSGPACK)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
keys = st.builds(Key, texts, texts, texts)
ids = st.integers(0, (1 << 64) - 1)
bodies = st.lists(st.binary(min_size=1, max_size=50), max_size=4)
instances = st.binary(min_size=16, max_size=16)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 60), 1 << 60) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=5),
    max_leaves=20,
)


def no_pause() -> None:
    """Nobody else runs in these tests."""


def request(kind: int = wire.CALL, key: Key = KEY, **options: Any) -> list[bytes]:
    values: dict[str, Any] = {"codec": JSON, "monitor": None, "body": [b"{}"]} | options
    return wire.encode_request(kind, TO, SENDER, 7, 3, 1.5, wire.encode_key(key), **values)


def there_and_back(value: object, codec: int) -> Any:
    return wire.decode_body(wire.encode_body(value, codec, no_pause), codec, no_pause)


# Headers.


@pytest.mark.parametrize("kind", sorted(wire.REQUESTS))
@given(
    key=keys,
    id=ids,
    floor=ids,
    left=st.none() | st.integers(0, 10**9),
    monitor=st.none() | st.integers(1, 10**6),
    codec=st.integers(0, 255),
    to=instances,
    sender=instances,
    body=bodies,
)
@settings(max_examples=50)
def test_request_comes_back(
    kind: int,
    key: Key,
    id: int,
    floor: int,
    left: int | None,
    monitor: int | None,
    codec: int,
    to: bytes,
    sender: bytes,
    body: list[bytes],
) -> None:
    floor, id = sorted((floor, id))
    seconds = None if left is None else left / 1000
    every = None if monitor is None else monitor / 1000
    raw = wire.encode_key(key)
    frames = wire.encode_request(kind, to, sender, id, floor, seconds, raw, codec=codec, monitor=every, body=body)
    back = wire.decode_request(frames)
    assert (back.kind, back.codec, back.to, back.sender, back.id, back.floor) == (kind, codec, to, sender, id, floor)
    assert back.key == key
    assert list(back.body) == body
    assert (back.left is None) == (seconds is None)
    assert (back.monitor is None) == (every is None)
    if seconds is not None and back.left is not None:
        assert abs(back.left - seconds) <= 0.0011  # whole milliseconds, cut off
    if every is not None and back.monitor is not None:
        assert abs(back.monitor - every) <= 0.0011


@pytest.mark.parametrize("kind", sorted(wire.ANSWERS))
@given(server=instances, several=st.lists(ids, max_size=20), codec=st.integers(0, 255), body=bodies)
@settings(max_examples=50)
def test_answer_comes_back(kind: int, server: bytes, several: list[int], codec: int, body: list[bytes]) -> None:
    if kind in (wire.REPLY, wire.FAILURE):
        several = [*several, 1][:1]
    back = wire.decode_answer(wire.encode_answer(kind, server, several, codec=codec, body=body))
    assert (back.kind, back.codec, back.server, back.ids, list(back.body)) == (kind, codec, server, tuple(several), body)


@pytest.mark.parametrize("size", [1, 1 << 16, (1 << 16) + 1, 1 << 20])
def test_document_of_any_size_comes_back(size: int) -> None:
    body = [b"x" * size, b"y" * 10]
    assert list(wire.decode_request(request(body=body)).body) == body
    answer = wire.encode_answer(wire.REPLY, TO, [1], body=body)
    assert list(wire.decode_answer(answer).body) == body


def test_answer_for_as_many_as_may_be() -> None:
    many = range(wire.MOST_IDS)
    assert wire.decode_answer(wire.encode_answer(wire.ACCEPTED, TO, many)).ids == tuple(many)


@pytest.mark.parametrize(("left", "back"), [(0, 0), (-5, 0), (0.0004, 0), (None, None), (0.25, 0.25)])
def test_time_left(left: float | None, back: float | None) -> None:
    frames = wire.encode_request(wire.CALL, TO, SENDER, 1, 1, left, wire.encode_key(KEY))
    assert wire.decode_request(frames).left == back


@pytest.mark.parametrize("left", [1e9, 1e15, 1e300, float("inf")])
def test_endless_times_are_sent_as_long_ones(left: float) -> None:
    frames = wire.encode_request(wire.CALL, TO, SENDER, 1, 1, left, wire.encode_key(KEY), monitor=left)
    back = wire.decode_request(frames)
    assert back.left is None or back.left >= 1e8
    assert back.monitor is not None
    assert back.monitor >= 1e6


def test_tiny_monitor_is_not_none() -> None:
    assert wire.decode_request(request(monitor=0.0001)).monitor == 0.001


def test_every_kind_has_a_name_of_its_own() -> None:
    names = [wire.kind_name(kind) for kind in (*wire.REQUESTS, *wire.ANSWERS)]
    assert len(set(names)) == len(names)
    assert wire.kind_name(wire.CALL) == "call"
    assert wire.kind_name(99) == "kind 99"
    assert not any(name.startswith("kind ") for name in names)


# Frames that are none.


@pytest.mark.parametrize("kind", sorted(wire.REQUESTS))
def test_truncated_request(kind: int) -> None:
    (header,) = request(kind, body=[])
    for size in range(len(header)):
        with pytest.raises(WireError):
            wire.decode_request([header[:size]])
    with pytest.raises(WireError):
        wire.decode_request([])


@pytest.mark.parametrize("kind", sorted(wire.ANSWERS))
def test_truncated_answer(kind: int) -> None:
    (header,) = wire.encode_answer(kind, TO, [9])
    for size in range(len(header)):
        with pytest.raises(WireError):
            wire.decode_answer([header[:size]])
    with pytest.raises(WireError):
        wire.decode_answer([])


def test_truncated_document_is_no_body() -> None:
    document = wire.encode_body({"a": [1, 2, {"b": "text"}]}, JSON, no_pause)
    (frame,) = request(body=document)
    for cut in range(1, len(document[0]) + 1):
        back = wire.decode_request([frame[:-cut]])
        with pytest.raises(WireError):
            wire.decode_body(back.body, JSON, no_pause)


@pytest.mark.parametrize("kind", [0, 6, 15, *wire.ANSWERS, 200, 255])
def test_no_request(kind: int) -> None:
    frames = request()
    frames[0] = frames[0][:3] + bytes([kind]) + frames[0][4:]
    with pytest.raises(WireError):
        wire.decode_request(frames)


@pytest.mark.parametrize("kind", [0, *wire.REQUESTS, 15, 200, 255])
def test_no_answer(kind: int) -> None:
    (frame,) = wire.encode_answer(wire.ACCEPTED, TO, [1])
    with pytest.raises(WireError):
        wire.decode_answer([frame[:3] + bytes([kind]) + frame[4:]])


@pytest.mark.parametrize("version", [0, 2, 77, 255])
def test_other_version(version: int) -> None:
    frames = request()
    frames[0] = frames[0][:2] + bytes([version]) + frames[0][3:]
    (answer,) = wire.encode_answer(wire.ACCEPTED, TO, [1])
    answer = answer[:2] + bytes([version]) + answer[3:]
    for decode, of in ((wire.decode_request, frames), (wire.decode_answer, [answer]), (wire.decode_request, [answer[:4]])):
        with pytest.raises(WireVersionError) as caught:
            decode(of)
        assert caught.value.version == version
        assert str(version) in str(caught.value)


@pytest.mark.parametrize("count", [0, 2, 3])
@pytest.mark.parametrize("kind", [wire.REPLY, wire.FAILURE])
def test_reply_is_for_one_request(kind: int, count: int) -> None:
    with pytest.raises(WireError):
        wire.decode_answer(wire.encode_answer(kind, TO, range(count)))


def test_request_below_its_own_floor() -> None:
    frames = wire.encode_request(wire.CALL, TO, SENDER, 1, 2, None, wire.encode_key(KEY))
    with pytest.raises(WireError, match="closed"):
        wire.decode_request(frames)


def mutated(frame: bytes, at: int, byte: int) -> bytes:
    at %= len(frame)
    return frame[:at] + bytes([byte]) + frame[at + 1 :]


@given(
    st.lists(st.binary(max_size=200), max_size=4)
    | st.tuples(st.integers(0, 200), st.integers(0, 255)).map(lambda m: [mutated(request()[0], *m)])
    | st.tuples(st.integers(0, 200), st.integers(0, 255)).map(
        lambda m: [mutated(wire.encode_answer(wire.REPLY, TO, [1], body=[b"{}"])[0], *m)]
    )
    | st.binary(max_size=200).map(lambda rest: [b"gz\x01\x01" + rest])
    | st.binary(max_size=200).map(lambda rest: [b"gz\x01\x15" + rest])
)
@settings(max_examples=1000)
def test_random_frames(frames: list[bytes]) -> None:
    for decode in (wire.decode_request, wire.decode_answer):
        with contextlib.suppress(WireError):
            back: Any = decode(frames)
            for codec in (*CODECS, back.codec):
                with contextlib.suppress(WireError):
                    wire.decode_body(back.body, codec, no_pause)


# Several messages as one.

small = st.binary(max_size=100)


@given(st.lists(small, min_size=2, max_size=wire.MOST_PACKED))
def test_packed_messages_come_back_each_as_it_was(messages: list[bytes]) -> None:
    assert wire.unpack(wire.pack(messages)) == [[message] for message in messages]


@pytest.mark.parametrize("frames", [[], [b""], [b"gz"], [b"gz\x01"], [b"gz\x01 "], [b"xz\x01 \0\2" + bytes(10)], request()])
def test_what_is_no_pack_is_a_message_itself(frames: list[bytes]) -> None:
    assert wire.unpack(frames) == [frames]


def test_a_pack_of_another_version_is_a_message_of_that_version() -> None:
    (frame,) = wire.pack([b"one", b"two"])
    frames = [frame[:2] + b"\x02" + frame[3:]]
    assert wire.unpack(frames) == [frames]
    with pytest.raises(WireVersionError):
        wire.decode_request(frames)


@pytest.mark.parametrize("count", [0, 1, wire.MOST_PACKED + 1, 0xFFFF])
def test_no_pack_has_so_many_messages(count: int) -> None:
    with pytest.raises(WireError):
        wire.unpack(wire.pack([b""] * count))


@given(st.lists(small, min_size=2, max_size=5), st.data())
def test_truncated_pack(messages: list[bytes], data: st.DataObject) -> None:
    (frame,) = wire.pack(messages)
    cut = frame[: data.draw(st.integers(6, len(frame) - 1))]
    with pytest.raises(WireError):
        wire.unpack([cut])
    for frames in ([frame + b"x"], [frame, b""]):
        with pytest.raises(WireError):
            wire.unpack(frames)


def test_a_pack_in_a_pack_is_no_message() -> None:
    inner = wire.pack([b"one", b"two"])[0]
    with pytest.raises(WireError):
        wire.decode_request(wire.unpack(wire.pack([inner, inner]))[0])


def test_the_largest_pack_is_taken_by_who_takes_the_smallest_messages() -> None:
    (frame,) = wire.pack([bytes(wire.LARGEST_PACKED)] * wire.MOST_PACKED)
    assert len(frame) < wire.OVERHEAD


# Addresses.


@pytest.mark.parametrize(
    "part",
    ["", "a", "host@backend#pool", "a/b//c", "\0", "a\0b", "ünïcödé", "日本語", "\U0001f980", " ", "\n", "x" * 20_000],
)
def test_any_text_is_an_address(part: str) -> None:
    for key in (Key(part, "t", "s"), Key("e", part, "s"), Key("e", "t", part), Key(part, part, part)):
        assert wire.decode_request(request(key=key)).key == key


@given(keys, keys)
def test_different_addresses_differ_on_the_wire(one: Key, other: Key) -> None:
    assert (wire.encode_key(one) == wire.encode_key(other)) == (one == other)


@pytest.mark.parametrize("part", ["\ud800", "a\udfffb", None, 5, b"bytes", 1.5, ["list"], {"a": 1}, object()])
@pytest.mark.parametrize("field", Key._fields)
def test_no_address(field: str, part: object) -> None:
    with pytest.raises(Unserializable) as caught:
        wire.encode_key(KEY._replace(**{field: part}))
    assert field in str(caught.value)


@pytest.mark.parametrize("field", Key._fields)
def test_too_long_an_address(field: str) -> None:
    with pytest.raises(Unserializable, match=field):
        wire.encode_key(KEY._replace(**{field: "ü" * 32_768}))


def test_address_that_is_too_long_together_is_refused_before_it_is_sent() -> None:
    """What cannot be encoded must be found in the caller's thread, not in the loop that everybody shares."""
    key = Key("x" * 40_000, "y" * 40_000, "")
    with pytest.raises(Unserializable):
        wire.encode_request(wire.CALL, TO, SENDER, 1, 1, None, wire.encode_key(key))


def with_key(raw: bytes) -> list[bytes]:
    return wire.encode_request(wire.CALL, TO, SENDER, 1, 1, None, raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0",
        b"\0\0\0\0",
        b"\0\0\0\0\0",
        b"\0\1",
        b"\0\0\0\0\0\0x",
        b"\0\1\xff\0\0\0\0",
        b"\0\3\xed\xa0\x80\0\0\0\0",
        b"\xff\xff" + b"x" * 10,
        wire.encode_key(KEY) + b"\0",
        wire.encode_key(KEY)[:-1],
    ],
)
def test_malformed_address(raw: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_request(with_key(raw))


# Bodies.


@pytest.mark.parametrize("codec", CODECS)
@given(json_values)
@example([{"_context_roles": ["admin"]}, {"method": "m", "args": {}, "version": "1.0"}])
@example(float("inf"))
@example("")
@example({})
@settings(max_examples=100)
def test_body_comes_back(codec: int, value: object) -> None:
    assert there_and_back(value, codec) == value


def big(text: str, over: int = 1) -> str:
    return text * (LARGE // len(text) + over)


LARGE_VALUES: dict[str, Callable[[], Any]] = {
    "top": lambda: big("x"),
    "dict": lambda: {"a": big("x"), "b": 1},
    "list": lambda: [1, big("x"), 2],
    "deep": lambda: {"args": {"files": [{"data": big("x")}, {"data": big("y", 5)}]}},
    "several": lambda: [{}, {"args": {"a": big("a"), "b": "small", "c": big("c", 2), "d": {"e": big("e", 3)}}}],
    "many pieces": lambda: [{}, {"args": {"a": "ab" * (2 << 20)}}],
    "wide characters": lambda: {"a": big("\U0001f980ü日")},
    "same object twice": lambda: dict.fromkeys("ab", big("x")),
    "odd names": lambda: {"": {"a/b": {"\0": big("x")}}},
    "beyond the look": lambda: [0] * 300 + [big("x")],
    "behind many": lambda: {str(n): n for n in range(500)} | {"z": big("x")},
    "deeper than the look": lambda: [[[big("x")] * 3] * 60] * 3,
    "exactly": lambda: ["x" * LARGE, "x" * (LARGE + 1)],
    "empty neighbours": lambda: ["", big("x"), "", {}, []],
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", LARGE_VALUES)
def test_large_strings_come_back(name: str, codec: int) -> None:
    value = LARGE_VALUES[name]()
    before = copy.deepcopy(value)
    frames = wire.encode_body(value, codec, no_pause)
    assert value == before, "the caller's object was changed"
    assert wire.decode_body(frames, codec, no_pause) == value


@pytest.mark.parametrize("codec", CODECS)
def test_large_strings_travel_beside_the_document(codec: int) -> None:
    frames = wire.encode_body([{"a": big("x")}], codec, no_pause)
    assert len(frames) == 3
    assert len(frames[0]) < 100
    assert frames[2] == big("x").encode()


def test_large_strings_are_cut_into_pieces_and_let_others_run() -> None:
    pauses: list[int] = []
    frames = wire.encode_body("x" * (5 << 20), JSON, lambda: pauses.append(1))
    assert len(pauses) >= 5
    assert max(map(len, frames)) <= 4 << 20
    pauses.clear()
    assert wire.decode_body(frames, JSON, lambda: pauses.append(1)) == "x" * (5 << 20)
    assert len(pauses) >= 5


def test_large_strings_in_tuples_come_back_as_lists() -> None:
    value = ({"a": (1, big("x"))},)
    assert there_and_back(value, JSON) == [{"a": [1, big("x")]}]
    assert isinstance(value[0]["a"], tuple)


def test_lone_surrogates_come_back() -> None:
    for value in ("\ud800", big("a\udc80"), {"a": [big("\udfff")]}, {"\ud800": 1}):
        assert there_and_back(value, JSON) == value


def test_lone_surrogates_in_msgpack() -> None:
    with pytest.raises(Unserializable):
        wire.encode_body({"a": "\ud800"}, MSGPACK, no_pause)
    assert there_and_back(big("\ud800"), MSGPACK) == big("\ud800")


class Text(str):
    __slots__ = ()


class Dict(dict[str, Any]):
    pass


@pytest.mark.parametrize("codec", CODECS)
def test_subclasses_come_back_as_what_they_are(codec: int) -> None:
    value = Dict(a=Text("x"), b=Dict(c=Text(big("x"))))
    assert there_and_back(value, codec) == {"a": "x", "b": {"c": big("x")}}
    assert type(value["b"]) is Dict


def test_values_of_services_come_back_as_json() -> None:
    some = uuid.uuid4()
    value = {"when": datetime.datetime(2024, 1, 2, 3, 4, 5), "id": some, "bytes": b"text", "set": {1}}
    assert there_and_back(value, JSON) == {"when": "2024-01-02T03:04:05.000000", "id": str(some), "bytes": "text", "set": [1]}


def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def circular_with_large() -> dict[str, Any]:
    value: dict[str, Any] = {"a": big("x")}
    value["self"] = value
    return value


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


class Hostile:
    """Fails when it is looked at in any way an encoder might try."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("hostile")


BAD: dict[str, Callable[[], Any]] = {
    "object": object,
    "nested object": lambda: {"a": [object()]},
    "object beside a large string": lambda: {"a": object(), "b": big("x")},
    "circular": circular,
    "circular with a large string": circular_with_large,
    "no text in bytes": lambda: b"\xff\xfe",
}
BAD_JSON: dict[str, Callable[[], Any]] = {
    "tuple keys": lambda: {(1, 2): 3},
    "tuple keys beside a large string": lambda: {(1, 2): 3, "b": big("x")},
    "too deep": deep,
}


@pytest.mark.parametrize("name", [*BAD, *BAD_JSON])
def test_unserializable_as_json(name: str) -> None:
    value = (BAD | BAD_JSON)[name]()
    with pytest.raises(Unserializable):
        wire.encode_body(value, JSON, no_pause)


@pytest.mark.parametrize("name", [name for name in BAD if "bytes" not in name])
def test_unserializable_as_msgpack(name: str) -> None:
    with pytest.raises(Unserializable):
        wire.encode_body(BAD[name](), MSGPACK, no_pause)


@pytest.mark.parametrize("codec", CODECS)
def test_object_that_raises_when_it_is_looked_at(codec: int) -> None:
    with pytest.raises(Unserializable):
        wire.encode_body({"a": Hostile()}, codec, no_pause)


@pytest.mark.parametrize("value", [1 << 64, -(1 << 64), 10**4000])
def test_numbers_that_msgpack_has_not(value: int) -> None:
    with pytest.raises(Unserializable):
        wire.encode_body(value, MSGPACK, no_pause)


def test_number_that_python_does_not_print() -> None:
    for codec in CODECS:
        with pytest.raises(Unserializable):
            wire.encode_body({"a": 10**5000}, codec, no_pause)


def places(*of: Any) -> bytes:
    return wire.encode_body(list(of), JSON, no_pause)[0]


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"{"],
        [b"\xff"],
        [b"{}", b"[]", b"left over"],
        [b"{}", b""],
        [b"{}", b"5"],
        [b"{}", b"null"],
        [b"{}", b'"text"'],
        [b"{}", b"[1]"],
        [b"{}", b"[[]]"],
        [b"{}", b'{"a": 1}'],
        [b"{}", b'{"ab": 1}'],
        [b"{}", places([["a"], 2]), b"x"],
        [b"{}", places([["a"], 1])],
        [b"{}", places([["a"], 1]), b"x", b"y"],
        [b"{}", places([["a"], -1]), b"x"],
        [b"{}", places([["a"], 1.5]), b"x"],
        [b"{}", places([["a"], "1"]), b"x"],
        [b"{}", places([["a"], None]), b"x"],
        [b"{}", places([["a", "b"], 1]), b"x"],
        [b"{}", places([[["a"]], 1]), b"x"],
        [b"{}", places([[{}], 1]), b"x"],
        [b"[]", places([[0], 1]), b"x"],
        [b"[1]", places([[5], 1]), b"x"],
        [b"[1]", places([["a"], 1]), b"x"],
        [b"[1]", places([[0, 0], 1]), b"x"],
        [b"5", places([[0], 1]), b"x"],
        [b'"text"', places([[0], 1]), b"x"],
        [b"null", places([["a"], 1]), b"x"],
        [b"{}", places([{"a": 1}, 1]), b"x"],
        [b"{}", places([5, 1]), b"x"],
        [b'{"a": null}', places([["a"], 1]), b"\xff"],
        [b'{"a": null}', places([["a"], 10**30]), b"x"],
    ],
)
def test_no_body(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        wire.decode_body(frames, JSON, no_pause)


@pytest.mark.parametrize("codec", [0, 3, 255])
def test_unknown_codec(codec: int) -> None:
    with pytest.raises(WireError, match=str(codec)):
        wire.decode_body([b"{}"], codec, no_pause)


def test_wrong_codec() -> None:
    with pytest.raises(WireError):
        wire.decode_body(wire.encode_body({"a": 1}, MSGPACK, no_pause), JSON, no_pause)


@pytest.mark.parametrize("document", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000])
def test_document_that_takes_too_much(document: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_body([document], JSON, no_pause)


@pytest.mark.parametrize("codec", CODECS)
@given(frames=st.lists(st.binary(max_size=60) | json_values.map(lambda v: wire.encode_body(v, JSON, no_pause)[0]), max_size=4))
@settings(max_examples=300)
def test_random_bodies(codec: int, frames: list[bytes]) -> None:
    with contextlib.suppress(WireError):
        wire.decode_body(frames, codec, no_pause)


@pytest.mark.parametrize("type_", range(-1, 12))
@given(st.binary(max_size=20))
@settings(max_examples=30)
def test_random_msgpack_extensions(type_: int, data: bytes) -> None:
    raw = struct.pack("!BBb", 0xC7, len(data), type_) + data
    for frames in ([raw], [b"\x80", raw], [raw, b"\x91\x92\x91\x00\x01", b"x"]):
        with contextlib.suppress(WireError):
            wire.decode_body(frames, MSGPACK, no_pause)


def nested(levels: int, type_: int) -> bytes:
    """Extensions in one another: sets, or what else is made of a document."""
    raw = b"\x90"
    for _ in range(levels):
        raw = b"\x91" + struct.pack("!BIb", 0xC9, len(raw), type_) + raw
    return raw


@pytest.mark.parametrize("type_", [1, 4, 5, 6, 7])
def test_msgpack_extensions_that_are_nested_deep(type_: int) -> None:
    """Each level takes so much of the C stack that without a limit a small message ends the process."""
    for levels in (9, 200, 2000, 20_000):
        with pytest.raises(WireError):
            wire.decode_body([nested(levels, type_)], MSGPACK, no_pause)


def test_values_with_msgpack_extensions_come_back() -> None:
    day = datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=zoneinfo.ZoneInfo("UTC"))
    value = {"day": day, "set": {1, frozenset({day, uuid.UUID(int=5)})}, "date": datetime.date(2024, 1, 2)}
    assert there_and_back(value, MSGPACK) == value


def test_what_an_error_says_of_a_body_is_short() -> None:
    raw = msgpackutils.msgpack.packb("no address" * 10_000)
    with pytest.raises(WireError) as caught:
        wire.decode_body([struct.pack("!BIb", 0xC9, len(raw), 3) + raw], MSGPACK, no_pause)
    assert len(str(caught.value)) < 500


def test_printing_a_key_names_everything() -> None:
    text = str(Key("nova", "compute", "host@x"))
    assert all(part in text for part in ("nova", "compute", "host@x"))
    assert "server" not in str(Key("nova", "compute", ""))
