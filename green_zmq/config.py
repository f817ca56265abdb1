# SPDX-License-Identifier: Apache-2.0
"""Options and transport URL -> one frozen :class:`Settings`. Nothing else reads either."""

from __future__ import annotations

import importlib.util
import ipaddress
import math
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from oslo_config import cfg
from oslo_messaging.transport import TransportHost, TransportURL

from green_zmq import executors, wire
from green_zmq.delivery import Limits
from green_zmq.errors import ConfigError, InvalidTransportURL

GROUP: Final = "oslo_messaging_zmq"

OPTIONS: Final = [
    cfg.StrOpt(
        "executor",
        default="auto",
        choices=[
            ("auto", "what the process is monkey-patched for"),
            ("eventlet", "green threads of eventlet"),
            ("gevent", "greenlets of gevent"),
            ("threads", "native threads"),
            ("threading", "the same, as oslo.messaging calls it"),
        ],
        help="The concurrency model. 'auto' takes the one that the process is monkey-patched for, and native threads if it "
        "is patched for none. A model needs naming only in an unpatched process that uses eventlet or gevent.",
    ),
    cfg.StrOpt(
        "rpc_zmq_host",
        help="The address or name of this host that other processes connect to; it may be another one than is listened on. By "
        "default the address that is listened on if rpc_zmq_bind_address names one, or an interface; else the loopback address "
        "with the embedded directory (zmq://), or the name of this host.",
    ),
    cfg.StrOpt(
        "rpc_zmq_bind_address",
        help="The IPv4 or IPv6 address or the network interface to listen on; '*' for all, of IPv6 too where there is it. By "
        "default the loopback address if rpc_zmq_host is one, or is not set with the embedded directory (zmq://); else '*'.",
    ),
    cfg.PortOpt("rpc_zmq_min_port", default=49153, min=1, help="The first port that may be listened on."),
    cfg.IntOpt(
        "rpc_zmq_max_port",
        default=65536,
        min=1,
        max=65536,
        help="The end of the range of ports that may be listened on; itself it is not used. Each process that listens takes "
        "one port for each of its transports.",
    ),
    cfg.IntOpt(
        "zmq_target_expire",
        default=75,
        min=3,
        help="Seconds after which a process that has not refreshed its record in the directory is taken for dead.",
    ),
    cfg.IntOpt(
        "zmq_target_update",
        default=25,
        min=1,
        help="Seconds between two refreshes of the record; less than half of zmq_target_expire.",
    ),
    cfg.StrOpt(
        "rpc_zmq_serialization",
        default="json",
        choices=[("json", "as text"), ("msgpack", "as bytes")],
        help="How messages are encoded. Receivers take either.",
    ),
    cfg.FloatOpt(
        "zmq_linger",
        default=5.0,
        min=0,
        help="The most seconds that closing a transport waits for messages that are still to be delivered.",
    ),
    cfg.StrOpt(
        "directory_path",
        help="The file of the embedded directory (zmq://). By default green_zmq/directory.sqlite in the runtime folder of the "
        "user ($XDG_RUNTIME_DIR, /run/user/UID), or else in green_zmq-UID in the folder for temporary files. All processes "
        "that are to find each other must name the same.",
    ),
    cfg.StrOpt(
        "redis_prefix",
        default="green_zmq",
        help="What the keys and channels of a Redis directory begin with. Clouds that share a Redis need one each.",
    ),
    cfg.FloatOpt(
        "redis_timeout",
        default=2.0,
        min=0.1,
        help="Seconds that Redis or a sentinel has to accept a connection, and to answer a command.",
    ),
    cfg.BoolOpt("redis_tls", default=False, help="Whether Redis and sentinels are reached over TLS."),
    cfg.StrOpt(
        "redis_ca_file",
        help="The file with the certificates of the authorities that may have signed those of Redis and sentinels. By default "
        "those that the system trusts.",
    ),
    cfg.StrOpt("redis_cert_file", help="The file with the certificate that we show to Redis and sentinels, if they ask."),
    cfg.StrOpt("redis_key_file", help="The file with the key to redis_cert_file, unless that has it."),
    cfg.StrOpt("redis_sentinel_username", help="The user for sentinels; the URL has that of Redis itself."),
    cfg.StrOpt(
        "redis_sentinel_password", secret=True, help="The password for sentinels. The one in the URL is for Redis itself."
    ),
    cfg.FloatOpt(
        "cast_grace",
        default=1.0,
        min=0,
        help="Seconds a cast waits for a server to take it, at each of its tries; then the sender keeps it in its outbox and "
        "goes on trying, or raises MessageDeliveryFailure if it was made with a number of retries.",
    ),
    cfg.FloatOpt(
        "message_ttl",
        default=300.0,
        min=0,
        help="Seconds a cast or fanout is kept for a server that does not take it; then it is lost, and logged.",
    ),
    cfg.IntOpt(
        "outbox_messages",
        default=1000,
        min=1,
        help="The most messages that are kept for servers that do not take them; above it, callers wait, then get errors.",
    ),
    cfg.IntOpt("outbox_bytes", default=64 << 20, min=1, help="As outbox_messages, in bytes."),
    cfg.IntOpt(
        "listener_window",
        default=256,
        min=1,
        help="The most messages a listener takes ahead of those whose processing has begun. Above it, senders are told that "
        "it is busy, and go to another server or ask again.",
    ),
    cfg.IntOpt(
        "max_message_bytes",
        default=256 << 20,
        min=1024,
        help="A larger message is refused where it is sent.",
    ),
    cfg.IntOpt(
        "max_connections",
        default=1000,
        min=1,
        help="The most connections to servers that are kept open; above it the least recently used one that nothing needs is "
        "closed. Each takes 4 descriptors.",
    ),
    cfg.FloatOpt("connection_idle_timeout", default=600.0, min=1, help="Seconds after which an unused connection is closed."),
    cfg.FloatOpt(
        "heartbeat_interval",
        default=10.0,
        min=0.1,
        help="Seconds between two heartbeats on an idle connection; a host that misses them for twice that is taken for lost.",
    ),
    cfg.IntOpt(
        "gc_threshold",
        default=5000,
        min=0,
        help="Python looks for cyclic garbage among its youngest objects whenever there are so many more. Of its own accord it "
        "does so at 700 or 2,000, which a burst of messages takes; so it would find those under way again and again, take them "
        "for long-lived, and soon look through the whole process, which stands still for as long: 45 ms and more. Set when a "
        "transport begins its work, unless the service has set one itself. 0: Python's own.",
    ),
    cfg.StrOpt(
        "notification_path",
        help="The file that keeps notifications with the embedded directory (zmq://). By default notifications.sqlite beside "
        "directory_path if that is set, or else in green_zmq in the folder of the user for what programs keep "
        "($XDG_STATE_HOME, ~/.local/state). Notifiers and listeners must name the same.",
    ),
    cfg.IntOpt(
        "notification_messages",
        default=100_000,
        min=1,
        help="The most notifications that are kept of each topic and priority; above it the oldest are dropped, and logged. "
        "Notifiers and listeners should have the same.",
    ),
    cfg.FloatOpt(
        "notification_age",
        default=86400.0,
        min=1,
        help="Seconds a notification is kept for listeners that do not take it; then it is dropped, and logged. Notifiers and "
        "listeners should have the same.",
    ),
    cfg.FloatOpt(
        "notification_takeover",
        default=30.0,
        min=1,
        help="Seconds after which what a listener had when it died is taken over by another of its pool. Listeners must have "
        "the same.",
    ),
    cfg.IntOpt(
        "notification_tries",
        default=10,
        min=1,
        help="How often it is tried to process a notification whose listener dies of it, or gives it back (requeue); then it "
        "is put aside, and logged: see green-zmq notifications.",
    ),
]

# By scheme: the directory, and the port of its hosts.
_DIRECTORIES: Final = {
    "zmq": ("sqlite", 0),
    "zmq+memory": ("memory", 0),
    "zmq+redis": ("redis", 6379),
    "zmq+sentinel": ("redis", 26379),
}


@dataclass(frozen=True)
class Redis:
    """How Redis is reached.

    :ivar hosts: of Redis, replicas of one another; with a ``group``, of sentinels.
    :ivar group: what the sentinels call the Redis they watch.
    :ivar user: and password: of Redis; the sentinels have their own.
    :ivar timeout: for a connection, and for a command, seconds.
    """

    hosts: tuple[tuple[str, int], ...]
    group: str
    database: int
    user: str | None
    password: str | None = field(repr=False)
    sentinel_user: str | None
    sentinel_password: str | None = field(repr=False)
    prefix: str
    timeout: float
    tls: bool
    ca_file: str | None
    cert_file: str | None
    key_file: str | None

    def __str__(self) -> str:
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"{self.group} of the sentinels {hosts}" if self.group else f"Redis {hosts}"


@dataclass(frozen=True)
class Bounds:
    """Of notifications.

    :ivar messages: how many are kept of a topic; above it the oldest go.
    :ivar age: seconds after which one goes.
    :ivar takeover: seconds after which another consumer has what a dead one had.
    :ivar tries: how often one is taken before it is put aside.
    """

    messages: int
    age: float
    takeover: float
    tries: int


# What means every address of this host.
ALL: Final = ("*", "0.0.0.0", "::", "[::]")  # noqa: S104


@dataclass(frozen=True)
class Settings:
    """What a transport was told, checked. Times are seconds."""

    model: str
    directory: str
    directory_path: Path
    redis: Redis | None
    # Empty: what it is bound to, or the name of this host if that is all there is.
    host: str
    bind_address: str
    min_port: int
    max_port: int
    expire: float
    update: float
    codec: int
    linger: float
    limits: Limits
    listener_window: int
    max_connections: int
    idle_timeout: float
    heartbeat: float
    gc_threshold: int
    notification_path: Path
    bounds: Bounds

    @property
    def store_place(self) -> str:
        """Where notifications are, for messages."""
        return f"in {self.redis or (self.notification_path if self.directory == 'sqlite' else 'memory')}"

    @property
    def directory_place(self) -> str:
        """Where the directory is, for messages."""
        return f"in {self.redis}" if self.redis else str(self.directory_path) if self.directory == "sqlite" else "in memory"


def list_opts() -> list[tuple[str, list[Any]]]:
    """For oslo-config-generator."""
    return [(GROUP, OPTIONS)]


def read(conf: cfg.ConfigOpts, url: TransportURL) -> Settings:
    """The settings of a transport: what its URL's query says, else the options.

    :raises InvalidTransportURL: the URL has a scheme, host or query that means nothing here.
    :raises ConfigError: options do not fit each other.
    :raises ModelError: the concurrency model cannot work in this process.
    """
    if url.transport not in _DIRECTORIES:
        known = ", ".join(f"{scheme}://" for scheme in _DIRECTORIES)
        raise InvalidTransportURL(_without_password(url), f"'{url.transport}://' is no transport of green_zmq; it has {known}.")
    directory, port = _DIRECTORIES[url.transport]
    if not port and (url.hosts or (url.virtual_host or "").strip("/")):
        raise InvalidTransportURL(
            _without_password(url),
            f"{url.transport}:// names no host and no path; the file of its directory is directory_path.",
        )
    values = _values(conf, url)
    if values["rpc_zmq_max_port"] <= values["rpc_zmq_min_port"]:
        raise ConfigError(
            f"rpc_zmq_max_port ({values['rpc_zmq_max_port']}) must be above rpc_zmq_min_port ({values['rpc_zmq_min_port']})."
        )
    if values["zmq_target_expire"] < 2 * values["zmq_target_update"]:
        raise ConfigError(
            f"zmq_target_expire ({values['zmq_target_expire']}) must be at least twice zmq_target_update "
            f"({values['zmq_target_update']}), or live servers are taken for dead."
        )
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} ({value}) must be a finite number of seconds.")
    if values["message_ttl"] <= values["cast_grace"]:
        raise ConfigError(
            f"message_ttl ({values['message_ttl']:g}) must be above cast_grace ({values['cast_grace']:g}), "
            "or messages are given up before they are kept."
        )
    bind_address = values["rpc_zmq_bind_address"] or ""
    # With everybody on one machine, nobody else is to reach it.
    host = values["rpc_zmq_host"] or ("" if port or bind_address not in ("", *ALL) else "127.0.0.1")
    return Settings(
        model=executors.choose(values["executor"]),
        directory=directory,
        redis=_redis(url, values, port) if port else None,
        directory_path=Path(values["directory_path"]) if values["directory_path"] else _default_path(),
        host=host,
        bind_address=bind_address or (host if _is_loopback(host) else "*"),
        min_port=values["rpc_zmq_min_port"],
        max_port=values["rpc_zmq_max_port"],
        expire=values["zmq_target_expire"],
        update=values["zmq_target_update"],
        codec=wire.CODECS[values["rpc_zmq_serialization"]],
        linger=values["zmq_linger"],
        limits=Limits(
            grace=values["cast_grace"],
            time_to_live=values["message_ttl"],
            outbox_messages=values["outbox_messages"],
            outbox_bytes=values["outbox_bytes"],
            message_bytes=values["max_message_bytes"],
        ),
        listener_window=values["listener_window"],
        max_connections=values["max_connections"],
        idle_timeout=values["connection_idle_timeout"],
        heartbeat=values["heartbeat_interval"],
        gc_threshold=values["gc_threshold"],
        notification_path=_notification_path(values),
        bounds=Bounds(
            messages=values["notification_messages"],
            age=values["notification_age"],
            takeover=values["notification_takeover"],
            tries=values["notification_tries"],
        ),
    )


def _values(conf: cfg.ConfigOpts, url: TransportURL) -> dict[str, Any]:
    conf.register_opts(OPTIONS, group=GROUP)
    options = {option.dest: option for option in OPTIONS}
    values = {name: conf[GROUP][name] for name in options}
    for name, text in url.query.items():
        if name not in options:
            raise InvalidTransportURL(
                _without_password(url),
                f"The query of the transport URL has the unknown option {name!r}; known are {', '.join(options)}.",
            )
        try:
            values[name] = options[name].type(text)
        except ValueError as error:
            raise InvalidTransportURL(
                _without_password(url), f"In the query of the transport URL, {name}={text} is wrong: {error}."
            ) from None
    return values


def _redis(url: TransportURL, values: dict[str, Any], port: int) -> Redis:
    """
    :raises InvalidTransportURL: the URL's hosts, credentials or path do not tell what is to be reached.
    :raises ConfigError: the options for it do not fit each other.
    """
    sentinel = url.transport == "zmq+sentinel"
    form = (
        "zmq+sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST...]/GROUP[/DB]"
        if sentinel
        else ("zmq+redis://[USER:PASSWORD@]HOST[:PORT][,HOST...][/DB]")
    )

    def wrong(what: str) -> InvalidTransportURL:
        return InvalidTransportURL(_without_password(url), f"{what}; the transport URL is to be {form}.")

    if importlib.util.find_spec("redis") is None:
        raise ConfigError(f"{url.transport}:// needs the library redis; install it with: pip install 'green_zmq[redis]'")
    if not url.hosts or not all(host.hostname for host in url.hosts):
        raise wrong("It names no host" if not url.hosts else "A host has no name")
    if any(host.port is not None and not 0 < host.port < 1 << 16 for host in url.hosts):
        raise wrong("A port is not from 1 to 65535")
    user, password = _credentials(url, wrong)
    group, _, database = (url.virtual_host or "").partition("/") if sentinel else ("", "", url.virtual_host or "")
    database = database.strip("/")
    if sentinel and not group:
        raise wrong("It names no group of the sentinels")
    if not re.fullmatch(r"\d{0,5}", database, re.ASCII):
        raise wrong("Its path has no number of a database")
    if not values["redis_prefix"]:
        raise ConfigError("redis_prefix must not be empty.")
    for name in ("redis_ca_file", "redis_cert_file", "redis_key_file"):
        if values[name] and not values["redis_tls"]:
            raise ConfigError(f"{name} is set, but redis_tls is not: set it too, or Redis is reached without TLS.")
    return Redis(
        hosts=tuple((host.hostname, port if host.port is None else host.port) for host in url.hosts),
        group=group,
        database=int(database or 0),
        user=user,
        password=password,
        sentinel_user=values["redis_sentinel_username"],
        sentinel_password=values["redis_sentinel_password"],
        prefix=values["redis_prefix"],
        timeout=values["redis_timeout"],
        tls=values["redis_tls"],
        ca_file=values["redis_ca_file"],
        cert_file=values["redis_cert_file"],
        key_file=values["redis_key_file"],
    )


def _credentials(url: TransportURL, wrong: Callable[[str], Exception]) -> tuple[str | None, str | None]:
    """The user and password, which are the same at all hosts that have any."""
    found = {(host.username or None, host.password) for host in url.hosts if host.username or host.password}
    if len(found) > 1:
        raise wrong("Its hosts have different users or passwords")
    user, password = found.pop() if found else (None, None)
    if user and password is None:
        raise wrong("Its user has no password")
    return user, password


def _without_password(url: TransportURL) -> str:
    """For messages, which end in logs. What an option that we do not know says may be a password as well."""
    told = {option.dest for option in OPTIONS if not option.secret}
    hosts = [TransportHost(h.hostname, h.port, h.username, h.password and "***") for h in url.hosts]
    query = {name: text if name in told else "***" for name, text in url.query.items()}
    return unquote(str(TransportURL(url.conf, url.transport, url.virtual_host, hosts, query)))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _notification_path(values: dict[str, Any]) -> Path:
    if values["notification_path"]:
        return Path(values["notification_path"])
    if values["directory_path"]:
        return Path(values["directory_path"]).parent / "notifications.sqlite"
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(state) / "green_zmq" / "notifications.sqlite"


def _default_path() -> Path:
    user = os.getuid()
    for folder in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{user}"):
        if folder and os.access(folder, os.W_OK):
            return Path(folder) / "green_zmq" / "directory.sqlite"
    return Path(tempfile.gettempdir()) / f"green_zmq-{user}" / "directory.sqlite"
