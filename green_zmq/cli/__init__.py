# SPDX-License-Identifier: Apache-2.0
"""The command ``green-zmq``.

This package imports neither oslo.messaging nor the driver: ``serve --executor eventlet`` must patch the process first, and
``--help`` should not take a second.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from green_zmq import __version__
from green_zmq.cli.common import (
    BROKEN_PIPE,
    EXIT_CODES,
    INTERRUPTED,
    PRIORITIES,
    UNDELIVERED,
    Failure,
    note,
    without_passwords,
)

_MODELS = ("eventlet", "gevent", "threads")
_MODULES = {"call": "rpc", "cast": "rpc", "fanout": "rpc", "demo-client": "demo_client"}

_ARGUMENTS = """\
An ARGUMENT is NAME=VALUE, where VALUE is JSON, or else taken as the text it is (a=1 is a number, a=b and a='"1"' are
texts); or one JSON object with all arguments, such as '{"a": 1}'; or -, which reads that object from stdin.
"""

_NODES = """\
A NODE is the name of a host, the host that others connect to, HOST:PORT of a process, or its instance id, of which the
beginning will do if no other begins so (at least 4 digits): all as ls shows them. What is a host is taken for that first.
"""

_EVICT = f"""\
It is for a host that was lost and will not come back: nobody has to wait until its records expire (zmq_target_expire).
Nothing new is sent to a process that was evicted, and a call whose connection to it is lost ends at once. No process is
stopped by it: one that still runs goes on with what it has, and registers again within zmq_target_update seconds.

{_NODES}"""

_BENCH = """\
Everybody takes turns in the same processes, so compare ratios rather than numbers. A SCENARIO is PATTERN-SENDERS, then xSERVERS
if they are several, then the size of the payload if it is not 100 B. CPU US are the microseconds that the processes of sender
and servers use for one message; a broker's own are not counted.

"""

_JSON = "as a JSON array, with everything that is known"
_EXCHANGE = "the exchange (default: oslo.messaging's, openstack)"


class _Parser(argparse.ArgumentParser):
    """One that does not repeat passwords."""

    def error(self, message: str) -> NoReturn:
        super().error(without_passwords(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what eventlet and oslo.messaging deprecate is no news for who runs this
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            args = _parse(argv)
            module = importlib.import_module(f"green_zmq.cli.{_MODULES.get(args.command, args.command)}")
            code: int = module.run(args)
            return code
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except Failure as failure:
        note(str(failure))
        return failure.code
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:  # of stdout: all others were made failures
        # Else the interpreter tries, and complains, again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        note(f"The output cannot be written: {error}.")
        return UNDELIVERED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    # argparse itself refuses arguments of a method that come behind an option.
    args, more = parser.parse_known_args(argv)
    if more and (not hasattr(args, "arguments") or any(text.startswith("-") and text != "-" for text in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        args.arguments += more
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="green-zmq",
        description="Try, use and look into oslo.messaging over ZeroMQ, without a broker.",
        epilog=f"example: green-zmq demo\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"green-zmq {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(
        name: str, text: str, example: str, epilog: str = "", hidden: bool = False, to: Any = commands
    ) -> argparse.ArgumentParser:
        listed: dict[str, Any] = {} if hidden else {"help": text}
        command: argparse.ArgumentParser = to.add_parser(
            name,
            **listed,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example: {example}\n\n{epilog}{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name not in ("demo", "bench"):
            command.add_argument(
                "--url",
                # One within another leaves what was given before it.
                default=argparse.SUPPRESS if to is not commands else os.environ.get("GREEN_ZMQ_URL") or "zmq://",
                help="the transport URL (default: $GREEN_ZMQ_URL, where a password is not seen in ps; or else zmq://)",
            )
        return command

    demo = add(
        "demo",
        "start a server and a client of each concurrency model, and let each client call, cast and fan out to every server",
        "green-zmq demo",
    )
    demo.add_argument("--url", help="the transport URL (default: a directory of its own, so that it disturbs nobody)")
    _add_calls(demo)

    serve = add(
        "serve",
        "serve a topic until interrupted, with methods to try: echo(...), inspect(), sleep(seconds), fail(message), "
        "count(key, number)",
        "green-zmq serve compute --server host1 --executor gevent",
    )
    serve.add_argument("topic", type=_name, metavar="TOPIC")
    serve.add_argument("--server", type=_name, help="the name of the server (default: the name of this host)")
    serve.add_argument("--exchange", type=_name, help=_EXCHANGE)
    _add_executor(serve)
    serve.add_argument("--with-parent", action="store_true", help=argparse.SUPPRESS)  # ends when stdin does

    for name, text, example in (
        ("call", "call a method and print its result as JSON", "green-zmq call compute echo text=hello n=1 --timeout 5"),
        ("cast", "have a method run by one server; done when a server has taken it", "green-zmq cast compute echo n=1"),
        ("fanout", "have a method run by all servers of a topic; done when all have taken it", "green-zmq fanout compute echo"),
    ):
        _add_rpc(add(name, text, example, f"{_ARGUMENTS}\n"))

    ls = add("ls", "list who serves what", "green-zmq ls --json")
    ls.add_argument("topic", type=_name, metavar="TOPIC", nargs="?", help="only this topic")
    _add_json(ls)

    _add_json(
        add("topics", "list the topics, each with how many serve it, in which models, and for how long", "green-zmq topics")
    )

    sweep = add("sweep", "remove from the directory what is dead, as it does by itself in time", "green-zmq sweep --dry-run")
    _add_dry_run(sweep)
    _add_json(sweep)

    evict = add(
        "evict", "remove processes from the directory that are known to be lost", "green-zmq evict host1", f"{_EVICT}\n"
    )
    evict.add_argument("nodes", type=_name, metavar="NODE", nargs="+", help="a host, HOST:PORT or instance id; see below")
    _add_dry_run(evict)
    _add_json(evict)

    figures = add(
        "figures",
        "ask processes that listen what they have counted, and list their connections",
        "green-zmq figures host1 --json",
        f"{_NODES}\n",
    )
    figures.add_argument(
        "nodes", type=_name, metavar="NODE", nargs="*", help="a host, HOST:PORT or instance id; see below (default: all)"
    )
    figures.add_argument(
        "--timeout", type=_seconds, default=2.0, metavar="S", help="seconds to wait for all answers (default: 2)"
    )
    _add_json(figures)

    notifications = add(
        "notifications",
        "list the notifications that are stored and who is to process them; see those put aside, follow or publish some",
        "green-zmq notifications --json",
    )
    _add_json(notifications)
    _add_notifications(notifications.add_subparsers(dest="action", metavar="ACTION"), add)
    notifications.set_defaults(action="ls")

    bench = add(
        "bench",
        "measure calls, casts, fanouts and notifications, beside a bare ZeroMQ loop and any other transport",
        "green-zmq bench --url rabbit://guest:guest@localhost/ --models eventlet --plot bench.svg",
        _BENCH,
    )
    _add_bench(bench)

    client = add("demo-client", "a client of the demo", "green-zmq demo", hidden=True)
    client.add_argument("topic", type=_name)
    client.add_argument("servers", type=_name, nargs="+")
    _add_executor(client)
    _add_calls(client)
    return parser


def _add_rpc(command: argparse.ArgumentParser) -> None:
    name = command.prog.split()[-1]
    command.add_argument("topic", type=_name, metavar="TOPIC")
    command.add_argument("method", type=_name, metavar="METHOD")
    command.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="NAME=VALUE, '{JSON object}' or -; see below")
    if name == "fanout":
        command.set_defaults(server=None)
    else:
        command.add_argument("--server", type=_name, help="only this server (default: any of the topic)")
    command.add_argument("--exchange", type=_name, help=_EXCHANGE)
    command.add_argument("--namespace", help="the namespace of the method (default: none)")
    command.add_argument("--rpc-version", type=_version, metavar="X.Y", help="the version of the method (default: none)")
    command.add_argument("--context", default="{}", metavar="JSON", help="the request context (default: {})")
    retries = (
        "give up after N + 1 seconds (of cast_grace) in which no server took it (default: when the time is up)"
        if name == "call"
        else "go on for N + 1 seconds (of cast_grace) if no server takes it (default: 0)"
    )
    command.add_argument("--retry", type=_count, metavar="N", help=retries)
    if name == "cast":
        command.set_defaults(timeout=None)
    else:
        seconds, what = (10.0, "the reply") if name == "call" else (5.0, "all servers to take it")
        command.add_argument(
            "--timeout", type=_seconds, default=seconds, metavar="S", help=f"seconds to wait for {what} (default: {seconds:g})"
        )
    command.add_argument("--at-least-once", action="store_true", help="fail at once if no server is registered")
    if name == "call":
        command.add_argument("--traceback", action="store_true", help="print the remote traceback on stderr too")
    else:
        command.set_defaults(traceback=False)


def _add_notifications(actions: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    def add_action(name: str, text: str, example: str, json: str = _JSON) -> argparse.ArgumentParser:
        action = add(name, text, f"green-zmq notifications {example}", to=actions)
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=json)
        return action

    add_action("ls", "list the topics and their pools of listeners (the default)", "ls")

    dead = add_action("dead", "list the notifications that were put aside, the oldest first", "dead --body")
    dead.add_argument("--body", action="store_true", help="with all that was sent")

    back = add_action(
        "put-back", "have notifications that were put aside processed once more, as new ones of their pool", "put-back 17 18"
    )
    which = back.add_mutually_exclusive_group(required=True)
    which.add_argument("names", type=_name, metavar="NAME", nargs="*", default=[], help="as 'dead' shows it")
    which.add_argument("--all", action="store_true", help="all of them")

    tail = add_action(
        "tail",
        "print notifications as they are stored, until interrupted; no pool misses them because of that",
        "tail notifications versioned_notifications.error",
        "each as a JSON object in a line, with everything that is known",
    )
    tail.add_argument(
        "topics",
        type=_name,
        metavar="TOPIC",
        nargs="+",
        help=f"TOPIC.PRIORITY, or a topic with all priorities: {', '.join(PRIORITIES)}",
    )
    tail.add_argument("--exchange", type=_name, help=_EXCHANGE)

    publish = add_action(
        "publish",
        "send a notification; done when it is stored",
        """publish notifications thing.created '{"id": 1}' --priority warn""",
        "print it as tail --json would",
    )
    publish.add_argument("topic", type=_name, metavar="TOPIC", help="without a priority")
    publish.add_argument("event_type", type=_name, metavar="EVENT_TYPE")
    publish.add_argument("payload", metavar="PAYLOAD", nargs="?", default="{}", help="JSON, or - for stdin (default: {})")
    publish.add_argument("--priority", choices=PRIORITIES, default="info", help="(default: info)")
    publish.add_argument("--publisher-id", type=_name, metavar="ID", help="who sends it (default: green-zmq. and this host)")
    publish.add_argument("--exchange", type=_name, help=_EXCHANGE)
    publish.add_argument(
        "--retry", type=_count, default=0, metavar="N", help="try N times more if it cannot be stored (default: 0)"
    )


def _add_bench(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--url",
        action="append",
        default=[],
        help="another transport to measure; as often as you like, but of other schemes each",
    )
    command.add_argument(
        "--models",
        type=_models,
        default=_MODELS,
        metavar="MODEL,…",
        help=f"the concurrency models (default: {','.join(_MODELS)})",
    )
    command.add_argument("--rounds", type=_some, default=5, metavar="N", help="of each contender (default: 5)")
    command.add_argument("--seconds", type=_seconds, default=1.0, metavar="S", help="of sending in a round (default: 1)")
    command.add_argument(
        "--oslo-executors",
        action="store_true",
        help="run what comes with oslo.messaging's own executors, as services do that have its servers, not those of "
        "green_zmq.get_rpc_server",
    )
    command.add_argument("--plot", metavar="FILE", help="write a picture of the ratios, as .svg or .png")
    command.add_argument("--json", action="store_true", help="as a JSON object, with the figures of all contenders")
    command.add_argument(
        "scenarios", type=_name, metavar="SCENARIO", nargs="*", help="call-1, call-64x4, fanout-1x8 … (default: all)"
    )


def _add_executor(command: argparse.ArgumentParser) -> None:
    command.add_argument("--executor", choices=_MODELS, default="threads", help="the concurrency model (default: threads)")


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help=_JSON)


def _add_dry_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dry-run", action="store_true", help="only tell what would be removed")


def _add_calls(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--calls", type=_count, default=300, metavar="N", help="calls of each client to each server (default: 300)"
    )


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it must not be empty")
    return text


def _models(text: str) -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in _MODELS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(_MODELS)}")
    return found


def _version(text: str) -> str:
    if not re.fullmatch(r"\d+\.\d+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no version such as 1.0")
    return text


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 999999")
    return int(text)


def _some(text: str) -> int:
    if not _count(text):
        raise argparse.ArgumentTypeError("it must be at least 1")
    return _count(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds, above 0 and at most a million")
    return seconds
