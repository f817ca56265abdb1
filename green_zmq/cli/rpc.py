# SPDX-License-Identifier: Apache-2.0
"""``green-zmq call``, ``cast`` and ``fanout``: any method on any target, from the shell."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

from green_zmq.cli.common import (
    OK,
    UNDELIVERED,
    USAGE,
    Failure,
    as_failure,
    open_transport,
    parse_json,
    primitive,
    print_json,
    set_up_logging,
)

# Parameters of oslo.messaging's RPCClient.call(), which therefore no argument of a method can be named as.
_TAKEN: Final = frozenset(("self", "ctxt", "method"))
# While servers are awaited that have not taken a fanout.
_LOOK: Final = 0.01


def run(args: argparse.Namespace) -> int:
    set_up_logging(logging.ERROR)
    arguments = read_arguments(args.arguments)
    context = _read_object(args.context, "--context")
    import oslo_messaging as om

    # A command does not stay to deliver later what nobody takes now: without retries it would be told nothing of that.
    retry = args.retry if args.retry is not None or args.command == "call" else 0
    fanout = args.command == "fanout"
    target = om.Target(
        exchange=args.exchange,
        topic=args.topic,
        namespace=args.namespace,
        version=args.rpc_version,
        server=None if fanout else args.server,
        fanout=fanout or None,
    )
    with open_transport(args.url, linger=0 if fanout else None) as transport:
        client = om.get_rpc_client(
            transport,
            target,
            timeout=args.timeout,
            retry=retry,
            transport_options=om.TransportOptions(at_least_once=args.at_least_once),
        )
        try:
            if args.command == "call":
                result = client.call(context, args.method, **arguments)
            else:
                client.cast(context, args.method, **arguments)
        except Exception as error:
            failure = as_failure(error)
            if args.traceback and failure.details:
                print(failure.details.rstrip("\n"), file=sys.stderr)
            raise failure from None
        if args.command == "call":
            print_json(primitive(result))
        elif fanout:
            _await_fanout(transport, args.timeout)
    return OK


def read_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """What is given as NAME=VALUE, as JSON objects, or as ``-`` for such an object on stdin.

    :raises Failure: one of them is neither, or a name is given twice.
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        if text == "-" or text.lstrip().startswith("{"):
            new = _read_object(sys.stdin.read() if text == "-" else text, "stdin" if text == "-" else text)
        else:
            name, equals, value = text.partition("=")
            if not (name and equals):
                raise Failure(
                    USAGE, f"The argument {text!r} is neither NAME=VALUE nor a JSON object; write NAME={text} or '{{…}}'."
                )
            try:
                new = {name: parse_json(value)}
            except ValueError:
                new = {name: value}
        for name in new:
            if name in arguments:
                raise Failure(USAGE, f"The argument {name!r} is given twice.")
            if name in _TAKEN:
                raise Failure(USAGE, f"No argument can be named {name!r}: oslo.messaging's client has that name for itself.")
        arguments |= new
    return arguments


def _read_object(text: str, what: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise Failure(USAGE, f"{what} is no JSON: {error}.") from None
    if not isinstance(value, dict):
        raise Failure(USAGE, f"{what} must be a JSON object, such as '{{\"name\": 1}}'.")
    return value


def _await_fanout(transport: Any, timeout: float) -> None:
    """The driver goes on delivering a fanout after the cast returned; wait until each server has taken it.

    :raises Failure: some did not; the log names them.
    """
    driver = transport._driver  # oslo.messaging has no way to ask a driver what it still holds
    until = time.monotonic() + timeout
    while (left := driver.counts()["messages in the outbox"]) and time.monotonic() < until:
        time.sleep(_LOOK)
    missed = left + driver.counts().get("messages lost", 0)
    if missed:
        raise Failure(UNDELIVERED, f"{missed} of the servers did not take the fanout within {timeout:g} s.")
