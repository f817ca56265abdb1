# SPDX-License-Identifier: Apache-2.0
"""Messages to frames and back: the one place that knows the frames. Pure; ``doc/wire.rst`` is its specification.

A *request* goes from a sender's DEALER to a server's ROUTER, an *answer* the other way. Both are a header frame and,
where they carry something, body frames.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

from oslo_serialization import jsonutils, msgpackutils

from green_zmq.errors import Unserializable, WireError, WireVersionError

VERSION: Final = 1
_MAGIC: Final = b"gz"

# Kinds of request.
CALL: Final = 1
CAST: Final = 2
FANOUT: Final = 3
ASK: Final = 4  # "what has become of this request?": asked of an accepted request over a new connection
FIGURES: Final = 5  # "what have you counted?": asked of a process, whatever it serves; answered with a reply, at once

# Kinds of answer.
ACCEPTED: Final = 16
BUSY: Final = 17
NOT_HERE: Final = 18
WRONG_INSTANCE: Final = 19
GIVEN_BACK: Final = 20
REPLY: Final = 21
FAILURE: Final = 22
HEARTBEAT: Final = 23
WRONG_VERSION: Final = 24
DONE: Final = 25  # of a cast or fanout: it has been started, so it will never be given back
FORGOTTEN: Final = 26  # what is asked for is no longer known: its time had run out

# Several requests, or answers, in one frame.
PACK: Final = 32

_NAMES: Final = {value: name.lower() for name, value in list(globals().items()) if isinstance(value, int)}
REQUESTS: Final = frozenset((CALL, CAST, FANOUT, ASK, FIGURES))
ANSWERS: Final = frozenset(range(ACCEPTED, FORGOTTEN + 1))

JSON: Final = 1
MSGPACK: Final = 2
CODECS: Final = {"json": JSON, "msgpack": MSGPACK}

# magic, version, kind: the same in every version, so that versions can tell each other apart.
_PREFIX = struct.Struct("!2sBB")
# prefix; codec; instance asked; instance of the sender; id; lowest id still open; time left (ms); most bytes of a reply;
# monitor (ms); length of the address, which follows
_REQUEST = struct.Struct("!2sBBB16s16sQQQQIH")
# prefix; codec; instance of the server; number of ids, which follow
_ANSWER = struct.Struct("!2sBBB16sH")
_ONE_ID = struct.Struct("!Q")
# prefix, with the codec for the kind; number of frames, whose lengths follow, then they
_STORED = struct.Struct("!2sBBI")
# prefix; number of messages, whose lengths follow, then they
_PACK = struct.Struct("!2sBBH")
_PACKED: Final = _PREFIX.pack(_MAGIC, VERSION, PACK)
# The most ids that one answer is for.
MOST_IDS: Final = 0xFFFF
# The most messages in a pack, and the most bytes of each. A frame costs both ends more than to put it into one and read it out
# again; but the other end is to begin with the first while more are made. No receiver takes less than they have together.
MOST_PACKED: Final = 32
LARGEST_PACKED: Final = 1 << 12

_FOREVER: Final = (1 << 64) - 1
_LONGEST: Final = 1e9  # seconds
_LONGEST_KEY: Final = 65_000
# Addresses up to this size are kept when they were decoded.
_USUAL_KEY: Final = 512

# A string longer than this travels beside the document, in frames of its own, neither escaped nor scanned: encoding
# 64 MiB as JSON takes half a second in which no other green thread runs; as frames, the longest step is a few ms.
LARGE: Final = 1 << 17
_PIECE: Final = 1 << 20
# How many values of a message are looked at for large strings. Looking at all of them would cost small-valued messages
# more than encoding them does; a large string is an argument, or in a short list or dict that is one.
_LOOK: Final = 100
_LOOKED_INTO: Final = (str, dict, list, tuple)
# A body up to this size, bytes, follows in the header's frame: a frame of its own costs more than copying it. So a request is
# then written in one step, or not at all, and nobody else runs meanwhile.
INLINE: Final = 1 << 16


# What a message may have on the wire beyond its body: the header and the address.
OVERHEAD: Final = 1 << 18
# How deep values of MessagePack's extensions (sets, dates, ...) may lie in one another.
_EXTENSIONS: Final = 8
# What an error says of a stranger's bytes, characters: it is logged, and answered.
_QUOTED: Final = 300


class Key(NamedTuple):
    """What a message is addressed to. ``server`` is empty for "any server of the topic" and for fanout."""

    exchange: str
    topic: str
    server: str

    def __str__(self) -> str:
        server = f" on server {self.server!r}" if self.server else ""
        return f"topic {self.topic!r}{server} (exchange {self.exchange!r})"


class Request(NamedTuple):
    kind: int
    codec: int
    to: bytes
    sender: bytes
    id: int
    floor: int
    left: float | None
    most: int
    monitor: float | None
    key: Key
    body: Sequence[bytes]


class Answer(NamedTuple):
    kind: int
    codec: int
    server: bytes
    ids: tuple[int, ...]
    body: Sequence[bytes]


def kind_name(kind: int) -> str:
    return _NAMES.get(kind, f"kind {kind}")


def message_name(sender: bytes, id: int) -> str:
    """How a message is called in the errors and logs of both sides. It has another id with each server it is sent to."""
    return f"{sender[:4].hex()}.{id}"


def encode_key(key: Key) -> bytes:
    """The address as bytes: each part as UTF-8 behind its length.

    :raises Unserializable: a part is no text, or they are longer than 65,000 bytes together.
    """
    for name, part in zip(Key._fields, key, strict=True):
        if not isinstance(part, str):
            raise Unserializable(f"the target's {name} must be text, not {part!r}")
    parts = []
    try:
        for part in key:
            parts.append(part.encode())  # noqa: PERF401 (the error tells which part by how far it came)
    except UnicodeEncodeError as error:
        raise Unserializable(f"the target's {Key._fields[len(parts)]} is no Unicode text: {error}") from error
    size = sum(map(len, parts))
    if size > _LONGEST_KEY:
        raise Unserializable(f"the target's exchange, topic and server have {size} bytes together; {_LONGEST_KEY} is the most")
    return b"".join([struct.pack("!H", len(part)) + part for part in parts])


# The same for those that are sent to.
encoded_key = functools.lru_cache(maxsize=4096)(encode_key)


def _decode_any_key(raw: bytes) -> Key:
    parts, at = [], 0
    try:
        for _ in Key._fields:
            (size,) = struct.unpack_from("!H", raw, at)
            part = raw[at + 2 : at + 2 + size]
            if len(part) != size:
                raise WireError("the address of a request is cut off")
            parts.append(part.decode())
            at += 2 + size
    except (struct.error, UnicodeDecodeError) as error:
        raise WireError("the address of a request is malformed") from error
    if at != len(raw):
        raise WireError("the address of a request has bytes left over")
    return Key(*parts)


def encode_request(
    kind: int,
    to: bytes,
    sender: bytes,
    id: int,
    floor: int,
    left: float | None,
    key: bytes,
    *,
    codec: int = 0,
    most: int = _FOREVER,
    monitor: float | None = None,
    body: Sequence[bytes] = (),
) -> list[bytes]:
    """
    :param most: bytes that the sender takes in a reply.
    :param key: the address as :func:`encode_key` gives it.
    :param left: seconds after which the sender has given up; None: never.
    :param monitor: seconds between two heartbeats that the sender wants at the most; None: it wants none.
    """
    every = 0 if monitor is None else max(1, int(min(monitor, 4e6) * 1000))
    milliseconds = _FOREVER if left is None else int(min(max(left, 0.0), _LONGEST) * 1000)
    header = _REQUEST.pack(_MAGIC, VERSION, kind, codec, to, sender, id, floor, milliseconds, most, every, len(key))
    if len(body) == 1 and len(body[0]) <= INLINE:
        return [b"".join((header, key, body[0]))]
    return _frames(header + key, body)


def _frames(header: bytes, body: Sequence[bytes]) -> list[bytes]:
    if not body:
        return [header]
    if len(body[0]) <= INLINE:
        return [header + body[0], *body[1:]]
    return [header, *body]


def pack(messages: Sequence[bytes]) -> list[bytes]:
    """Several messages of one frame each, as one."""
    count = len(messages)
    lengths = struct.pack(f"!{count}I", *map(len, messages))
    return [b"".join((_PACK.pack(_MAGIC, VERSION, PACK, count), lengths, *messages))]


def unpack(frames: list[bytes]) -> list[list[bytes]]:
    """The messages that have come as one: what is no pack is one itself, whatever it is.

    :raises WireError: it is a pack that nobody of ours makes.
    """
    first = frames[0] if frames else b""
    if len(first) < _PACK.size or not first.startswith(_PACKED):
        return [frames]
    count = _PACK.unpack_from(first)[3]
    at = _PACK.size + 4 * count
    if len(frames) > 1 or not 1 < count <= MOST_PACKED or len(first) < at:
        raise WireError(f"a pack has {len(frames)} frames and {count} messages, or is cut off")
    messages = []
    for length in struct.unpack_from(f"!{count}I", first, _PACK.size):
        messages.append([first[at : at + length]])
        at += length
    if at != len(first):
        raise WireError("the messages of a pack are not as long as it says")
    return messages


def _explain(frames: Sequence[bytes]) -> WireError:
    """What is wrong with frames whose header cannot be unpacked, or is not what it must be."""
    if not frames or len(frames[0]) < _PREFIX.size:
        return WireError("a message is shorter than any of ours")
    magic, version, kind = _PREFIX.unpack_from(frames[0])
    if magic != _MAGIC:
        return WireError("a message does not begin as ours do")
    if version != VERSION:
        return WireVersionError(version)
    if kind not in REQUESTS and kind not in ANSWERS:
        return WireError(f"a message is of the unknown kind {kind}")
    return WireError(f"a {kind_name(kind)} is cut off, or has come the wrong way")


def decode_request(frames: Sequence[bytes]) -> Request:
    """
    :raises WireVersionError: it is of another version.
    :raises WireError: it is no request of ours.
    """
    try:
        header = frames[0]
        magic, version, kind, codec, to, sender, id, floor, left, most, every, size = _REQUEST.unpack_from(header)
    except (IndexError, struct.error):
        raise _explain(frames) from None
    if magic != _MAGIC or version != VERSION or kind not in REQUESTS:
        raise _explain(frames)
    end = _REQUEST.size + size
    raw = header[_REQUEST.size : end]
    # What strangers send must not fill the cache with megabytes.
    key = _decode_usual_key(raw) if size <= _USUAL_KEY else _decode_any_key(raw)
    if floor > id:
        raise WireError("a request says that it is closed itself")
    return Request(
        kind,
        codec,
        to,
        sender,
        id,
        floor,
        None if left == _FOREVER else left / 1000,
        most,
        every / 1000 if every else None,
        key,
        [header[end:], *frames[1:]] if len(header) > end else frames[1:],
    )


def encode_answer(kind: int, server: bytes, ids: Sequence[int], *, codec: int = 0, body: Sequence[bytes] = ()) -> list[bytes]:
    """An answer as frames.

    :param ids: the requests that are answered; several only where there is no body.
    """
    count = len(ids)
    packed = _ONE_ID.pack(ids[0]) if count == 1 else struct.pack(f"!{count}Q", *ids)
    header = _ANSWER.pack(_MAGIC, VERSION, kind, codec, server, count) + packed
    return _frames(header, body) if body else [header]


def decode_answer(frames: Sequence[bytes]) -> Answer:
    """
    :raises WireVersionError: it is of another version.
    :raises WireError: it is no answer of ours.
    """
    try:
        header = frames[0]
        magic, version, kind, codec, server, count = _ANSWER.unpack_from(header)
        if magic != _MAGIC or version != VERSION or kind not in ANSWERS:
            raise _explain(frames)
        ids = (
            struct.unpack_from(f"!{count}Q", header, _ANSWER.size) if count != 1 else _ONE_ID.unpack_from(header, _ANSWER.size)
        )
    except (IndexError, struct.error):
        raise _explain(frames) from None
    if (kind in (REPLY, FAILURE)) and count != 1:
        raise WireError(f"a {kind_name(kind)} is for {count} requests")
    end = _ANSWER.size + 8 * count
    return Answer(kind, codec, server, ids, [header[end:], *frames[1:]] if len(header) > end else frames[1:])


_decode_usual_key = functools.lru_cache(maxsize=4096)(_decode_any_key)


class _TooDeep(msgpackutils.HandlerRegistry):
    def get(self, identity: int) -> Any:
        raise ValueError(f"its extensions are nested too deep (the last is of type {identity})")


class _Inner(msgpackutils.HandlerRegistry):
    def get(self, identity: int) -> Any:
        if identity == msgpackutils.CountHandler.identity:
            raise ValueError("a count lies in another extension: sets and dates look at all of it, and it has no end")
        return super().get(identity)


def _extensions(depth: int, registry: msgpackutils.HandlerRegistry) -> msgpackutils.HandlerRegistry:
    """The usual ones, so many levels deep: each takes 40 KiB of the C stack, and a process that has none left is killed."""
    inner = _extensions(depth - 1, _Inner()) if depth else _TooDeep()
    for handler in msgpackutils.default_registry:
        registry.register(handler.copy(inner) if hasattr(handler, "copy") else handler, reserved=True)
    return registry


_registry = _extensions(_EXTENSIONS - 1, msgpackutils.HandlerRegistry())

# One encoder for all: json.dumps() with any keyword makes a new one at every call.
_json_encode = json.JSONEncoder(default=jsonutils.to_primitive, separators=(",", ":")).encode
_json_decode = json.JSONDecoder().decode


def _decode_document(raw: bytes, codec: int) -> Any:
    try:
        if codec == JSON:
            return _json_decode(raw.decode())
        if codec == MSGPACK:
            return msgpackutils.loads(raw, _registry)
    except Exception as error:  # msgpack raises a dozen kinds, its extensions whatever they like
        raise WireError(f"the body of a message cannot be decoded: {str(error)[:_QUOTED]}") from error
    raise WireError(f"the body of a message is in the unknown codec {codec}")


def _find_large(value: object) -> list[tuple[str | int, ...]]:
    """The places of the large strings in ``value``."""
    found: list[tuple[str | int, ...]] = []
    todo: list[tuple[object, tuple[str | int, ...]]] = [(value, ())]
    for inner, path in todo:
        if isinstance(inner, str):
            if len(inner) > LARGE:
                found.append(path)
        elif isinstance(inner, dict):
            items = islice(inner.items(), _LOOK)
            todo += [(v, (*path, k)) for k, v in items if type(k) is str and isinstance(v, _LOOKED_INTO)]
        elif isinstance(inner, (list, tuple)):
            todo += [(v, (*path, i)) for i, v in enumerate(inner[:_LOOK]) if isinstance(v, _LOOKED_INTO)]
        if len(todo) > _LOOK:
            del todo[_LOOK:]
    return found


def _at(value: Any, path: Sequence[str | int]) -> Any:
    for step in path:
        value = value[step]
    return value


def _with(value: Any, path: Sequence[str | int], new: object) -> Any:
    """``value`` with ``new`` at ``path``; what lies on the way is copied, the caller's objects stay as they are."""
    if not path:
        return new
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _with(copy[path[0]], path[1:], new)
    return copy


def encode_body(value: object, codec: int, pause: Callable[[], None]) -> list[bytes]:
    """A value as frames: the document, and where it holds large strings, their places and their pieces.

    :param pause: called between two pieces, so that a green thread can let others run.
    :raises Unserializable: the value, or something in it, cannot be encoded.
    """
    # Most often there is no large string. Whether there may be one must be told quickly, so all of this is one function.
    todo, large = [value], False
    beside: list[bytes] = []
    for inner in todo:
        kind = type(inner)
        if kind is str:
            large = len(inner) > LARGE  # type: ignore[arg-type]
        elif kind is dict:
            todo += islice(inner.values(), _LOOK)  # type: ignore[attr-defined]
            large = len(todo) > _LOOK
        elif kind is list or kind is tuple:
            todo += inner[:_LOOK]  # type: ignore[index]
            large = len(todo) > _LOOK
        if large:
            value, places, pieces = _take_out_large(value, pause)
            beside = [*encode_body(places, codec, pause), *pieces] if places else []
            break
    try:
        return [_json_encode(value).encode() if codec == JSON else bytes(msgpackutils.dumps(value)), *beside]
    except Exception as error:  # an object may raise anything when it is looked at
        raise Unserializable(f"a value cannot be put on the wire: {error}") from error


def _take_out_large(value: object, pause: Callable[[], None]) -> tuple[object, list[list[Any]], list[bytes]]:
    """The value without its large strings, their places with the number of their pieces, and those."""
    places: list[list[Any]] = []
    pieces: list[bytes] = []
    for path in _find_large(value):
        text = _at(value, path)
        value = _with(value, path, None)
        before = len(pieces)
        for at in range(0, len(text), _PIECE):
            pause()
            pieces.append(text[at : at + _PIECE].encode("utf-8", "surrogatepass"))
        places.append([path, len(pieces) - before])
    return value, places, pieces


def decode_body(frames: Sequence[bytes], codec: int, pause: Callable[[], None]) -> Any:
    """The value back.

    :raises WireError: they are no body.
    """
    if not frames:
        raise WireError("a message that must have a body has none")
    value = _decode_document(frames[0], codec)
    if len(frames) == 1:
        return value
    at = 2
    try:
        for path, count in _decode_document(frames[1], codec):
            pieces = frames[at : at + count]
            if len(pieces) != count:
                raise WireError("pieces of a large string are missing")
            at += count
            text = ""
            for raw in pieces:
                pause()
                # Not join(): CPython extends a string that nobody else has in place, and no step of it takes long.
                text += raw.decode("utf-8", "surrogatepass")
            if path:
                _at(value, path[:-1])[path[-1]] = text
            else:
                value = text
    except (TypeError, ValueError, LookupError) as error:
        raise WireError("the places of large strings do not fit the message") from error
    if at != len(frames):
        raise WireError("a message has frames left over")
    return value


def encode_stored(body: Sequence[bytes], codec: int) -> bytes:
    """A body as one piece, as notifications are stored."""
    lengths = struct.pack(f"!{len(body)}Q", *map(len, body))
    return b"".join((_STORED.pack(_MAGIC, VERSION, codec, len(body)), lengths, *body))


def decode_stored(data: bytes, pause: Callable[[], None]) -> Any:
    """The value.

    :raises WireVersionError: it was stored by another version.
    :raises WireError: it is none of ours.
    """
    try:
        magic, version, codec, count = _STORED.unpack_from(data)
        if magic != _MAGIC:
            raise WireError("what was stored is none of ours")
        if version != VERSION:
            raise WireVersionError(version)
        lengths = struct.unpack_from(f"!{count}Q", data, _STORED.size) if count <= len(data) else ()
    except struct.error:
        raise WireError("what was stored is cut short") from None
    frames, at = [], _STORED.size + 8 * len(lengths)
    for length in lengths:
        frames.append(data[at : at + length])
        at += length
    if at != len(data):
        raise WireError("what was stored is cut short, or has something left over")
    return decode_body(frames, codec, pause)
