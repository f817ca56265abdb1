# SPDX-License-Identifier: Apache-2.0
"""What is common to all that is kept in Redis or Valkey: how it is reached, how topics are named, what its errors mean."""

from __future__ import annotations

import encodings.idna  # noqa: F401 (resolving a name imports it, in native threads: see green_zmq.directory.load)
from collections.abc import Callable
from typing import Any, Final, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from green_zmq.config import Redis
from green_zmq.routing import Topic

_T = TypeVar("_T")


class Hosts:
    """The hosts of a Redis, one of which is in use. With sentinels it is one, which asks them where to go.

    :param connect: makes with :attr:`client` what its user needs of connections.
    :param disconnect: does away with them.
    """

    def __init__(self, address: Redis, connect: Callable[[], None], disconnect: Callable[[], None]) -> None:
        self._clients = _clients(address)
        self._connect, self._disconnect = connect, disconnect
        self.client = self._clients[0]
        self.connected = False

    def do(self, job: Callable[[], _T], *, twice: bool = True) -> _T:
        """Each of the hosts is tried, and the one that was in use twice, since it may have closed an idle connection.

        :param twice: whether the job may be repeated; else it is only where nothing of it was done.
        """
        failed = 0
        while True:
            connected = self.connected
            try:
                if not connected:
                    self._connect()
                    self.connected = True
                return job()
            except (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError, OSError) as error:
                begun = self.connected
                self.disconnect()
                if begun and not twice and not isinstance(error, redis.ReadOnlyError):
                    raise
                if not connected or isinstance(error, redis.TimeoutError | redis.ReadOnlyError):
                    failed += 1
                    if failed == len(self._clients):
                        raise
                    self.client = self._clients[(self._clients.index(self.client) + 1) % len(self._clients)]

    def disconnect(self) -> None:
        self.connected = False
        self._disconnect()
        self.client.connection_pool.disconnect()

    def close(self) -> None:
        self.disconnect()
        for client in self._clients:
            client.close()


def encode_topic(topic: Topic) -> bytes:
    """What the names of a topic begin with, and those of no other."""
    exchange, name = topic.exchange.encode(), topic.name.encode()
    return b"%d:%s%d:%s" % (len(exchange), exchange, len(name), name)


def decode_topic(text: bytes) -> tuple[Topic, bytes]:
    """The topic that this begins with, and the rest.

    :raises ValueError: it begins with none.
    """
    names = []
    for _ in Topic._fields:
        length, _, text = text.partition(b":")
        names.append(text[: int(length)].decode())
        text = text[int(length) :]
    return Topic(*names), text


_NONE_OF_OURS: Final = "what is stored is none of ours: set redis_prefix to another"

# By what is in the text, also where it is the error of a script.
_ADVICE: Final = {
    "NOAUTH": (_LOGIN := "correct the user and password in the transport URL, or what that user may do in Redis"),
    "NOPERM": _LOGIN,
    "The user executing the script can't": _LOGIN,
    "max number of clients": (
        "raise maxclients of Redis, and its limit of open files: each transport of a process has two connections"
    ),
    "used memory > 'maxmemory'": "raise maxmemory of Redis, or have it keep less",
    "MISCONF": "Redis cannot write to its disk: see its log, and make room",
    "NOREPLICAS": "Redis has fewer replicas than min-replicas-to-write: see to them",
    "WRONGTYPE": _NONE_OF_OURS,
}


def explain(error: Exception) -> str:
    """What it says, and what to do next."""
    # That no master was found is followed by all that there is to know of the clients that looked.
    said = str(error).partition(" : <")[0].rstrip(".") or type(error).__name__
    return f"({said}); {_advice(error, said)}"


def _advice(error: Exception, said: str) -> str:
    if isinstance(error, redis.AuthenticationError | NoPermissionError):
        return _LOGIN
    for part, found in _ADVICE.items():
        if part in said:
            return found
    if isinstance(error, MasterNotFoundError):
        return "check that the sentinels run and know that group, and that the transport URL is right"
    if isinstance(error, redis.ReadOnlyError):
        return "it is a replica: name its master, or use zmq+sentinel://"
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
        return "check that it runs, and that the transport URL is right"
    if "unknown command" in said.lower():
        return "Redis 6.2 or later, or Valkey, is needed"
    if isinstance(error, redis.ResponseError):
        return "see Redis's log and configuration"
    return _NONE_OF_OURS


def _clients(address: Redis) -> list[Any]:
    """One for each host; with sentinels only one, which asks them where to go."""
    common: dict[str, Any] = {
        "socket_timeout": address.timeout,
        "socket_connect_timeout": address.timeout,
        "socket_keepalive": True,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "ssl": address.tls,
    }
    if address.tls:
        common |= {"ssl_ca_certs": address.ca_file, "ssl_certfile": address.cert_file, "ssl_keyfile": address.key_file}
    redis_only = {"db": address.database, "username": address.user, "password": address.password}
    to_redis: Any = redis.Redis
    to_sentinels: Any = Sentinel
    if not address.group:
        return [to_redis(host, port, **common, **redis_only) for host, port in address.hosts]
    sentinels = to_sentinels(
        address.hosts,
        sentinel_kwargs={**common, "username": address.sentinel_user, "password": address.sentinel_password},
        **common,
        **redis_only,
    )
    return [sentinels.master_for(address.group)]
