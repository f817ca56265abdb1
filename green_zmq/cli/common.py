# SPDX-License-Identifier: Apache-2.0
"""What the commands share: exit codes, errors in words, transports, output.

Oslo.messaging is imported inside functions only: ``serve --executor eventlet`` must patch the process before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from oslo_messaging.transport import TransportURL

    from green_zmq.config import Settings
    from green_zmq.directory import Directory

OK: Final = 0
REMOTE: Final = 1
USAGE: Final = 2
TIMEOUT: Final = 3
UNDELIVERED: Final = 4
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141

EXIT_CODES: Final = """\
exit codes:
  0    done
  1    the remote method raised an exception; with demo: something was not answered
  2    bad arguments, URL or concurrency model
  3    no reply in time, or the process that had the call is gone
  4    not delivered: nobody took it, no such process is registered or notification put aside, the directory or the store of
       notifications does not answer, or another transport error
  130  interrupted
  141  whoever was reading the output has gone
"""

# Of notifications, in oslo.messaging.
PRIORITIES: Final = ("audit", "debug", "info", "warn", "error", "critical", "sample")

_REMOTE_POSTFIX: Final = "_Remote"
_TRACEBACK: Final = "\nTraceback (most recent call last):"


class Failure(Exception):
    """Ends the command.

    :ivar code: the exit code.
    :ivar details: what only some want to see.
    """

    def __init__(self, code: int, text: str, details: str = "") -> None:
        super().__init__(text)
        self.code = code
        self.details = details


def as_failure(error: Exception) -> Failure:
    """An exception of oslo.messaging or of the remote side, as an exit code and a text."""
    import oslo_messaging as om
    from oslo_messaging.transport import DriverLoadFailure

    from green_zmq import errors

    remote = _as_remote(error)
    if remote is not None:
        return remote
    if isinstance(error, om.MessageUndeliverable):
        return Failure(UNDELIVERED, str(error.exception))
    if isinstance(error, om.MessagingTimeout):
        return Failure(TIMEOUT, str(error))
    usage = (
        errors.ConfigError,
        errors.ModelError,
        errors.InvalidTransportURL,
        errors.Unserializable,
        errors.MessageTooLarge,
        om.InvalidTarget,
        DriverLoadFailure,
    )
    if isinstance(error, usage):
        return Failure(USAGE, str(error))
    if isinstance(error, om.MessagingException):
        return Failure(UNDELIVERED, str(error))
    raise error  # a defect: its traceback says more than any text


def _as_remote(error: Exception) -> Failure | None:
    """Oslo.messaging rebuilds a remote exception in one of three ways: as RemoteError, as a subclass whose name ends in
    ``_Remote``, or (what is built in and cannot be subclassed at run time) as itself with the traceback in its first argument.
    """
    import oslo_messaging as om

    if isinstance(error, om.RemoteError):
        trace = error.traceback
        text = f"{error.exc_type}: {error.value}"
        return Failure(REMOTE, text, "".join(trace) if isinstance(trace, list) else str(trace or ""))
    name = type(error).__name__
    full = str(error) if name.endswith(_REMOTE_POSTFIX) else str(error.args[0]) if error.args else ""
    if name.endswith(_REMOTE_POSTFIX) or _TRACEBACK in full:
        text, _, trace = full.partition(_TRACEBACK)
        # The lines of the traceback, which end in one each, were joined with one more.
        trace = _TRACEBACK.lstrip() + trace.replace("\n\n", "\n") if trace else ""
        return Failure(REMOTE, f"{name.removesuffix(_REMOTE_POSTFIX)}: {text}".removesuffix(": "), trace)
    return None


def set_up_logging(level: int) -> None:
    """What the driver logs goes to stderr, one line each."""

    def shorten(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:
            text = f"{text}: {record.exc_info[0].__name__}: {record.exc_info[1]}"
            record.exc_info = None
        record.msg, record.args = without_passwords(text), ()
        return True

    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(shorten)
    handler.setFormatter(logging.Formatter("green-zmq: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def catch_signals() -> int:
    """A descriptor that becomes readable at SIGINT and SIGTERM: it wakes a hub at once, and nothing green runs inside a
    signal handler.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    return reader


def patch(model: str) -> None:
    """Make the process one of that concurrency model.

    :raises Failure: its library is not installed.
    """
    from green_zmq import executors

    try:
        executors.patch(model)
    except ImportError as error:
        raise Failure(
            USAGE, f"--executor {model} needs a library ({error}); install it with: pip install 'green_zmq[{model}]'"
        ) from None
    if executors.detect() != model:
        raise Failure(USAGE, f"--executor {model} cannot work: this process was patched for {executors.detect()} already.")


def read_url(text: str) -> tuple[TransportURL, Settings]:
    """:raises Failure: it is no URL of this driver's."""
    import oslo_messaging as om
    from oslo_config import cfg
    from oslo_messaging.transport import TransportURL

    from green_zmq import config

    if not text:
        raise Failure(USAGE, "The transport URL is empty; leave --url out for zmq://.")
    # The global one, because oslo.messaging registers its tracing options only there. It reads no files of services.
    cfg.CONF([], project="green-zmq", default_config_files=[], default_config_dirs=[])
    try:
        url = TransportURL.parse(cfg.CONF, text)
        if "@" in (url.virtual_host or ""):
            raise ValueError("a part of the password was taken for the path")
        return url, config.read(cfg.CONF, url)
    except om.MessagingException as error:
        raise as_failure(error) from None
    except ValueError:
        # Neither the URL nor what the error quotes of it: it may be the password that is written wrongly.
        scheme, colon, _ = text.partition("://")
        raise Failure(
            USAGE,
            f"The transport URL {scheme + colon if colon else ''}… cannot be parsed: a port must be a number, an IPv6 address "
            "be in brackets (of several hosts all or none, each with its port), and in a user or password each of :/?#[],@% "
            "be written as % and its code, such as %2F for /.",
        ) from None


def without_passwords(text: str) -> str:
    """The text without what is before the hosts in any URL, and without passwords in a query.

    What begins with a bracket is our own word for how a URL is written.
    """
    return re.sub(r"(password=)[^\s&'\"]+", r"\1***", re.sub(r"://(?!\[)[^\s'\"]*@", "://***@", text))


@contextlib.contextmanager
def open_directory(text: str) -> Iterator[Directory]:
    """The directory of a transport URL, closed at the end.

    :raises Failure: the URL is none, or the directory cannot be read or written.
    """
    _, settings = read_url(text)
    from green_zmq import directory
    from green_zmq.errors import DirectoryError

    try:
        opened = directory.open_directory(settings)
        try:
            yield opened
        finally:
            opened.close()
    except DirectoryError as error:
        raise as_failure(error) from None


@contextlib.contextmanager
def open_transport(text: str, linger: float | None = None, *, notifications: bool = False) -> Iterator[Any]:
    """A transport, cleaned up at the end.

    :param linger: how long that may take, unless the URL says so.
    :param notifications: whether it is for these.
    :raises Failure: it cannot be made.
    """
    import oslo_messaging as om

    url, _ = read_url(text)
    if linger is not None:
        url.query.setdefault("zmq_linger", str(linger))
    try:
        transport = (om.get_notification_transport if notifications else om.get_rpc_transport)(url.conf, url)
    except om.MessagingException as error:
        raise as_failure(error) from None
    try:
        yield transport
    finally:
        transport.cleanup()


def parse_json(text: str) -> Any:
    """:raises ValueError: it is no JSON; Python's own NaN and Infinity are none."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def primitive(value: Any) -> Any:
    """The value with what JSON has not (dates, sets and more, which MessagePack has) as texts and arrays."""
    try:
        json.dumps(value)
    except TypeError:
        from oslo_serialization import jsonutils

        try:
            return jsonutils.to_primitive(value, fallback=repr)
        except ValueError:  # bytes that are no text
            return repr(value)
    return value


def print_json(value: object, indent: int | None = None) -> None:
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    print(json.dumps(value, ensure_ascii=encoding != "utf8", indent=indent))


def print_records(records: Sequence[object]) -> None:
    """As a JSON array, for people as well."""
    print_json(records, indent=2 if records else None)


def note(text: str) -> None:
    """What is no output: a script that reads that is not to trip over it."""
    print(f"green-zmq: {without_passwords(text)}", file=sys.stderr)


def printable(text: str) -> str:
    """Names come from other processes: none of them may move the cursor or break a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def on_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown")


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> None:
    """A table: drawn on a terminal, else plain columns as wide as what is in them, for scripts to cut.

    :param numbers: so many of the last columns are aligned to the right.
    """
    texts = [[printable(cell) for cell in row] for row in rows]
    words = len(headings) - numbers
    if on_terminal():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="right" if i >= words else "left", overflow="fold")
        for row in texts:
            table.add_row(*map(Text, row))  # as Text, since a name may look like markup
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(headings, *texts, strict=True)]
    for row in [[heading.upper() for heading in headings], *texts]:
        cells = [c.rjust(w) if i >= words else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
