# SPDX-License-Identifier: Apache-2.0
"""``green-zmq notifications``: what is stored of them, who is to process it, and what was put aside; some of them live, or
one more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import select
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from green_zmq.cli.common import (
    OK,
    PRIORITIES,
    UNDELIVERED,
    USAGE,
    Failure,
    as_failure,
    catch_signals,
    note,
    open_transport,
    parse_json,
    primitive,
    print_json,
    print_records,
    print_table,
    printable,
    read_url,
    set_up_logging,
)
from green_zmq.cli.nodes import count, duration

if TYPE_CHECKING:
    from green_zmq.notifications import Dead, State, Store
    from green_zmq.routing import Topic

# How often it is looked for what is new, seconds.
_LOOK: Final = 0.25
# What is shown of a message where not all is.
_SHOWN: Final = ("event_type", "publisher_id", "message_id")
# In a table: the default pool, which has no name, and what is not there.
_NONE: Final = "-"


def run(args: argparse.Namespace) -> int:
    set_up_logging(logging.WARNING if args.action == "publish" else logging.ERROR)  # of why it is tried again
    actions = {"ls": _list, "dead": _list_dead, "put-back": _put_back, "tail": _tail, "publish": _publish}
    actions[args.action](args)
    return OK


def _list(args: argparse.Namespace) -> None:
    with _open_store(args.url) as store:
        found = records(store.overview(), store.dead())
    if not found:
        note("There are no notifications.")
    if args.json:
        print_records(found)
    elif found:
        rows = []
        for topic in found:
            words = (topic["exchange"], topic["topic"])
            numbers = (str(topic["kept"]), _age(topic["oldest"]), str(topic["dropped"]), str(topic["dead"]))
            for pool in topic["pools"]:
                counts = (str(pool[name]) for name in ("consumers", "waiting", "taken"))
                rows.append((*words, pool["pool"] or _NONE, *counts, _age(pool["lag"]), *numbers))
            if not topic["pools"]:
                rows.append((*words, *[_NONE] * 5, *numbers))
        headings = ("exchange", "topic", "pool", "consumers", "waiting", "taken", "lag", "kept", "oldest", "dropped", "dead")
        print_table(headings, rows, numbers=8)


def records(states: Iterable[State], dead: Iterable[Dead]) -> list[dict[str, Any]]:
    """Of each topic what is known of it: also of those from which nothing is left but what was put aside."""
    aside = Counter(message.topic for message in dead)
    found = {
        state.topic: {
            "kept": state.kept,
            "oldest": _rounded(state.oldest),
            "dropped": state.dropped,
            "pools": [
                {
                    "pool": pool.name,
                    "consumers": pool.consumers,
                    "waiting": pool.waiting,
                    "taken": pool.taken,
                    "lag": _rounded(pool.oldest),
                }
                for pool in sorted(state.pools, key=lambda pool: pool.name)
            ],
        }
        for state in states
    }
    nothing: dict[str, Any] = {"kept": 0, "oldest": None, "dropped": 0, "pools": []}
    return [
        {**_record(topic), **found.get(topic, nothing), "dead": aside[topic]} for topic in sorted(found.keys() | aside.keys())
    ]


def _list_dead(args: argparse.Namespace) -> None:
    with _open_store(args.url) as store:
        found = store.dead()
    _print_dead(found, args)
    if not found:
        note("Nothing is put aside.")


def _put_back(args: argparse.Namespace) -> None:
    with _open_store(args.url) as store:
        found = store.dead()
        if not args.all:
            known = {message.name: message for message in found}
            for name in args.names:
                if name not in known:
                    raise Failure(
                        UNDELIVERED,
                        f"No notification that was put aside has the name {name!r}; 'green-zmq notifications dead' lists them.",
                    )
            found = [known[name] for name in dict.fromkeys(args.names)]
        number = store.put_back([message.name for message in found])
    _print_dead(found, args)
    note(f"{count(number, 'notification', 'notifications')} put back." if found else "Nothing is put aside.")


def _print_dead(found: Sequence[Dead], args: argparse.Namespace) -> None:
    whole = args.action == "dead" and args.body
    rows: list[Any] = []
    for each in found:
        body = _decode(each.body)
        known = {"name": each.name, **_record(each.topic), "pool": each.pool, "age": round(each.age, 3), "tries": each.tries}
        if args.json:
            rows.append({**known, **body})
        else:
            row = (each.name, *each.topic, each.pool or _NONE, *_values(body["message"], _SHOWN))
            text = body.get("error") or json.dumps(body, ensure_ascii=False)
            rows.append((*row, *([text] if whole else []), str(each.tries), duration(each.age)))
    if args.json:
        print_records(rows)
    elif rows:
        headings = ("name", "exchange", "topic", "pool", *_SHOWN, *(["body"] if whole else []), "tries", "age")
        print_table(headings, rows, numbers=2)


def _tail(args: argparse.Namespace) -> None:
    wake = catch_signals()
    topics = _topics(args, [name for text in args.topics for name in _with_priorities(text)])
    with _open_store(args.url) as store:
        from green_zmq.errors import StoreError

        places = {topic: store.since(topic, None)[0] for topic in topics}
        note(f"following {', '.join(printable(topic.name) for topic in topics)} of exchange {topics[0].exchange!r}")
        failing = False
        while not select.select([wake], [], [], _LOOK)[0]:
            try:
                for topic in topics:
                    places[topic], bodies = store.since(topic, places[topic])
                    for body in bodies:
                        _print_line(topic, body, args)
            except StoreError as error:
                if not failing:
                    note(f"{error} It is tried again.")
                failing = True
            else:
                if failing:
                    note("The notifications can be read again.")
                failing = False
            sys.stdout.flush()


def _print_line(topic: Topic, body: bytes, args: argparse.Namespace) -> None:
    found = _decode(body)
    if args.json:
        print_json({**_record(topic), **found})
    elif "error" in found:
        print(f"{printable(topic.name)}  {printable(found['error'])}")
    else:
        stamp, *rest = _values(found["message"], ("timestamp", *_SHOWN))
        print("  ".join(map(printable, (stamp, topic.name, *rest))))


def _publish(args: argparse.Namespace) -> None:
    text, what = (sys.stdin.read(), "stdin") if args.payload == "-" else (args.payload, "PAYLOAD")
    try:
        payload = parse_json(text)
    except ValueError as error:
        raise Failure(USAGE, f"{what} is no JSON: {error}.") from None
    name, _, last = args.topic.rpartition(".")
    if name and last in PRIORITIES:
        raise Failure(USAGE, f"The topic {args.topic!r} ends in a priority; write it as {name!r}, with --priority {last}.")
    (topic,) = _topics(args, [f"{args.topic}.{args.priority}"])
    publisher = args.publisher_id or f"green-zmq.{socket.gethostname()}"
    import oslo_messaging as om

    with open_transport(args.url, notifications=True) as transport:
        sent: list[Any] = []
        send = transport._send_notification

        def tell(target: Any, context: Any, message: Any, **options: Any) -> None:
            """Oslo.messaging's notifier knows no exchange but the default one, and only logs errors."""
            failed = None
            try:
                send(target(exchange=topic.exchange), context, message, **options)
            except Exception as error:
                failed = error
            sent.append((context, message, failed))

        transport._send_notification = tell
        notifier = om.Notifier(transport, publisher, driver="messagingv2", topics=[args.topic], retry=args.retry)
        getattr(notifier, args.priority)({}, args.event_type, payload)
    ((context, message, failed),) = sent
    if failed is not None:
        raise as_failure(failed) from None
    if args.json:
        print_json({**_record(topic), "context": context, "message": message})


@contextlib.contextmanager
def _open_store(url: str) -> Iterator[Store]:
    """The store of a transport URL, closed at the end.

    :raises Failure: the URL is none, or the store cannot be used.
    """
    _, settings = read_url(url)
    from green_zmq.errors import StoreError
    from green_zmq.notifications import open_store

    try:
        opened = open_store(settings)
        try:
            yield opened
        finally:
            opened.close()
    except StoreError as error:
        raise as_failure(error) from None


def _with_priorities(text: str) -> list[str]:
    """What is given as TOPIC.PRIORITY as it is, a topic with all priorities."""
    name, _, last = text.rpartition(".")
    return [text] if name and last in PRIORITIES else [f"{text}.{priority}" for priority in PRIORITIES]


def _topics(args: argparse.Namespace, names: Sequence[str]) -> list[Topic]:
    """The topics of these names in the exchange, each once.

    :raises Failure: a name is none, or the URL.
    """
    url, _ = read_url(args.url)
    from green_zmq.errors import Unserializable
    from green_zmq.routing import Topic
    from green_zmq.wire import Key, encode_key

    topics = [Topic(args.exchange or url.conf.control_exchange, name) for name in dict.fromkeys(names)]
    try:
        for topic in topics:
            encode_key(Key(*topic, ""))
    except Unserializable as error:
        raise as_failure(error) from None
    return topics


def _decode(body: bytes) -> dict[str, Any]:
    """The context and the message, as JSON can have them; or an error instead."""
    from green_zmq.errors import WireError
    from green_zmq.wire import decode_stored

    try:
        context, message = decode_stored(body, lambda: None)
    except (WireError, TypeError, ValueError) as error:
        return {"context": None, "message": None, "error": f"it cannot be made out: {error}"}
    return {"context": primitive(context), "message": primitive(message)}


def _values(message: object, names: Sequence[str]) -> list[str]:
    """What a message has of these names, for people."""
    known = message if isinstance(message, dict) else {}
    return [_NONE if known.get(name) is None else str(known[name]) for name in names]


def _record(topic: Topic) -> dict[str, Any]:
    return {"exchange": topic.exchange, "topic": topic.name}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _age(seconds: float | None) -> str:
    return _NONE if seconds is None else duration(seconds)
