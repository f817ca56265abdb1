# SPDX-License-Identifier: Apache-2.0
"""What a cluster of many nodes costs its directory in Redis, and how long it takes that everybody is found, or gone."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import redis

from green_zmq.bench.processes import MODELS
from tests.nodes import Nodes, topic
from tests.servers import RedisServer

INDEX = "green_zmq:members"
# The nodes of the first process pretend to be of another host, whose processes cannot be looked at.
ELSEWHERE = "another host"


class Watch:
    """Looks into Redis. What it asks itself is left out of the figures."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url, protocol=2)
        self._own: Counter[str] = Counter()

    def ask(self, *command: str) -> Any:
        self._own[command[0].lower()] += 1
        return self._client.execute_command(*command)  # type: ignore[no-untyped-call]

    def info(self, section: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("INFO", section)
        return found

    def answers(self) -> bool:
        try:
            return bool(self.ask("PING"))
        except redis.ConnectionError:
            return False

    def total(self) -> int:
        """All commands since the start of the server, those inside scripts included."""
        own = self._own.total()
        return int(self.info("stats")["total_commands_processed"]) - own

    def commands(self) -> Counter[str]:
        """The same by their names."""
        own = self._own.copy()
        stats = self.info("commandstats")
        return Counter({name.removeprefix("cmdstat_"): int(stat["calls"]) for name, stat in stats.items()}) - own

    def cpu(self) -> float:
        info = self.info("cpu")
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    def sent(self) -> int:
        """Bytes that Redis has sent, few of them to us."""
        return int(self.info("stats")["total_net_output_bytes"])

    def members(self) -> int:
        """How many listeners the index has."""
        return max(0, int(self.ask("ZCARD", INDEX)) - 1)

    def forget(self) -> None:
        """The server is a new one."""
        self._own.clear()


class Span:
    """What Redis does from here to :meth:`end`."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._commands = watch.commands()
        self._cpu = watch.cpu()
        self._sent = watch.sent()
        self._start = time.monotonic()
        self._totals = [(self._start, watch.total())]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def until(self, done: Callable[[], bool], limit: float, interval: float = 0.1) -> float:
        """Wait for it, and take down the rate meanwhile; the seconds since the beginning."""
        while not done():
            if self.seconds > limit:
                raise RuntimeError(f"not done after {limit} s")
            time.sleep(interval)
            self._totals.append((time.monotonic(), self._watch.total()))
        return self.seconds

    def end(self) -> dict[str, Any]:
        self._totals.append((time.monotonic(), self._watch.total()))
        seconds = self.seconds
        commands = self._watch.commands() - self._commands
        total = self._totals[-1][1] - self._totals[0][1]
        return {
            "seconds": seconds,
            "commands": total,
            "rate": total / seconds,
            "peak": self._peak(),
            "redis cpu": self._watch.cpu() - self._cpu,
            "MB": (self._watch.sent() - self._sent) / 1e6,
            # Nobody else reads the whole index.
            "sweeps": commands["zrange"],
            "by name": dict(commands.most_common()),
        }

    def _peak(self) -> float:
        """The most in any second or a little more."""
        peak = 0.0
        first = 0
        for at, total in self._totals:
            while first + 1 < len(self._totals) and at - self._totals[first + 1][0] >= 1:
                first += 1
            peak = max(peak, (total - self._totals[first][1]) / max(1.0, at - self._totals[first][0]))
        return peak


class Bench:
    def __init__(self, options: argparse.Namespace, processes: list[Nodes], server: RedisServer | None, address: str) -> None:
        self.options = options
        self.processes = processes
        self.server = server
        self.url = (
            f"zmq+redis://{address}?rpc_zmq_host=127.0.0.1"
            f"&zmq_target_update={options.period}&zmq_target_expire={options.expire}"
        )
        self.directory, self.topic = client(self.url)
        self.watch = Watch(f"redis://{address}")
        self.everybody = [f"node-{i}" for i in range(options.nodes)]
        self.names = [self.everybody[part :: options.processes] for part in range(options.processes)]
        self.pool = ThreadPoolExecutor(len(processes))
        self.figures: dict[str, Any] = {}

    def say(self, what: str, text: str, **figures: Any) -> None:
        self.figures[what] = figures
        if not self.options.json:
            print(f"{what:>9}  {text}", flush=True)

    def ask_all(self, name: str, arguments: list[dict[str, Any]] | None = None) -> Callable[[], bool]:
        """Tells whether all processes have answered."""
        each = arguments or [{}] * len(self.processes)
        futures = [self.pool.submit(process.ask, name, **some) for process, some in zip(self.processes, each, strict=True)]

        def answered() -> bool:
            for future in futures:
                if future.done():
                    future.result()  # or what went wrong
            return all(future.done() for future in futures)

        return answered

    def used(self) -> dict[str, float]:
        """By all processes together."""
        total: Counter[str] = Counter()
        for process in self.processes:
            total.update(process.ask("used"))
        return dict(total)

    def found(self) -> set[str]:
        return {entry.server for entry in self.directory.look_up(self.topic)}

    def all_registered(self) -> bool:
        return bool(self.watch.members() == len(self.everybody) * self.options.listeners)

    def start(self) -> None:
        options = self.options
        before = self.used()
        span = Span(self.watch)
        common = {"url": self.url, "listeners": options.listeners, "within": options.start_within}
        done = self.ask_all(
            "start", [{**common, "names": names, "host": None if i else ELSEWHERE} for i, names in enumerate(self.names)]
        )
        span.until(done, 300)
        result = span.end()
        listed = len(list(self.directory.listings()))
        after = self.used()
        cpu = (after["cpu"] - before["cpu"]) / options.nodes
        self.say(
            "start",
            f"{listed} listeners within {result['seconds']:.1f} s; {rates(result)}; a node {cpu * 1000:.0f} ms CPU,"
            f" {(after['MiB'] - before['MiB']) / options.nodes:.2f} MiB,"
            f" {(after['descriptors'] - before['descriptors']) / options.nodes:.1f} descriptors",
            listed=listed, used_before=before, used_after=after, **result,
        )  # fmt: skip
        if listed != options.nodes * options.listeners:
            raise RuntimeError(f"{listed} listeners are listed")

    def steady(self, what: str = "steady") -> None:
        options = self.options
        before = self.used()
        span = Span(self.watch)
        span.until(lambda: span.seconds >= options.periods * options.period, options.periods * options.period + 30, 1)
        result = span.end()
        cpu = (self.used()["cpu"] - before["cpu"]) / options.nodes / result["seconds"]
        limit = options.nodes / 20 * 25 / options.period  # it is for the period that is the default
        memory = self.watch.info("memory")["used_memory"] / 2**20
        self.say(
            what,
            f"{options.periods} periods of {options.period} s: {rates(result)} (limit {limit:g}/s:"
            f" {'kept' if result['rate'] <= limit else 'EXCEEDED'}), {result['sweeps']} sweeps;"
            f" Redis has {memory:.1f} MiB; a node uses {cpu * 100:.4f} % of a core",
            limit=limit, redis_mib=memory, node_cpu=cpu, **result,
        )  # fmt: skip

    def look_up(self) -> None:
        times = []
        for _ in range(21):
            start = time.perf_counter()
            found = len(self.directory.look_up(self.topic))
            times.append((time.perf_counter() - start) * 1000)
        start = time.perf_counter()
        listed = len(list(self.directory.listings()))
        listing = (time.perf_counter() - start) * 1000
        first, again = times[0], statistics.median(times[1:])
        self.say(
            "look-up",
            f"{found} servers of a topic: {first:.1f} ms at first, then {again:.1f} ms; {listed} listings: {listing:.1f} ms",
            first=first, again=again, listings=listing,
        )  # fmt: skip

    def flush(self) -> None:
        self.watch.ask("FLUSHALL")
        span = Span(self.watch)
        span.until(self.all_registered, 3 * self.options.period)
        result = span.end()
        self.say("FLUSHALL", f"all are registered again after {result['seconds']:.1f} s; {rates(result)}", **result)

    def away(self, what: str, leave: Callable[[], None], come_back: Callable[[], None]) -> None:
        """For so long that every node has missed a refresh: then all come at once, and stay in step from then on."""
        seconds = self.options.period + 3
        before = self.used()
        leave()
        time.sleep(seconds)
        away = self.used()
        come_back()
        while not self.watch.answers():
            time.sleep(0.01)
        span = Span(self.watch)
        span.until(self.all_registered, 10 * self.options.period, 0.05)
        registered = span.seconds
        span.until(lambda: span.seconds > registered + 3, 10 * self.options.period)
        result = span.end()
        after = self.used()
        cpu_away, cpu_back = away["cpu"] - before["cpu"], after["cpu"] - away["cpu"]
        self.say(
            what,
            f"Redis was away for {seconds} s: {cpu_away / self.options.nodes / seconds * 100:.2f} % of a core for each node;"
            f" all are registered {registered:.1f} s after it is back; {rates(result)}, {result['sweeps']} sweeps,"
            f" {result['MB']:.1f} MB; all nodes used {cpu_back:.1f} CPU s",
            cpu_away=cpu_away, cpu_back=cpu_back, registered=registered, **result,
        )  # fmt: skip

    def hang(self) -> None:
        if self.server is not None:
            self.away("hung", self.server.pause, self.server.resume)

    def restart(self) -> None:
        """It comes back empty."""
        if self.server is not None:

            def start() -> None:
                assert self.server is not None
                self.watch.forget()
                self.server.start()

            self.away("killed", self.server.kill, start)
            self.steady("in step")

    def kill(self) -> None:
        elsewhere, here = set(self.names[0]), set(self.names[1])
        listeners = self.options.listeners
        self.found()
        for process in self.processes[:2]:
            process.kill()
        del self.processes[:2], self.names[:2]
        span = Span(self.watch)
        limit = 3 * self.options.expire
        seen = span.until(lambda: not self.found() & here, limit, 0)
        left = (self.options.nodes - len(here)) * listeners
        swept = span.until(lambda: self.watch.members() <= left, limit)
        expired = span.until(lambda: not self.found() & elsewhere, limit)
        left -= len(elsewhere) * listeners
        gone = span.until(lambda: self.watch.members() <= left, limit)
        self.say(
            "kill -9",
            f"{len(here)} nodes of this host are found no more after {seen:.2f} s, swept after {swept:.1f} s; {len(elsewhere)}"
            f" of another host after {expired:.1f} s (they expire after {self.options.expire} s), swept after {gone:.1f} s",
            seen=seen, swept=swept, expired=expired, gone=gone,
        )  # fmt: skip

    def stop(self) -> None:
        nodes = sum(map(len, self.names))
        span = Span(self.watch)
        span.until(self.ask_all("stop"), 120)
        result = span.end()
        left = int(self.watch.ask("DBSIZE"))
        self.say(
            "stop",
            f"{nodes} nodes have stopped within {result['seconds']:.1f} s; {rates(result)}; {left} keys are left",
            left=left, **result,
        )  # fmt: skip


def client(url: str) -> tuple[Any, Any]:
    """The directory as a process that only calls has it, and a topic that all nodes listen to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eventlet's, about itself
        from oslo_config import cfg
        from oslo_messaging.transport import TransportURL

        from green_zmq.config import read
        from green_zmq.directory import open_directory
        from green_zmq.routing import Topic

        conf = cfg.ConfigOpts()
        conf([], project="benchmarks", default_config_files=[], default_config_dirs=[])
        return open_directory(read(conf, TransportURL.parse(conf, url))), Topic("openstack", topic(0))


def rates(result: dict[str, Any]) -> str:
    return (
        f"{result['commands']} commands, {result['rate']:.1f}/s, at most {result['peak']:.0f}/s;"
        f" Redis used {result['redis cpu'] / result['seconds'] * 100:.1f} % of a core"
    )


@contextlib.contextmanager
def redis_at(url: str | None) -> Iterator[tuple[RedisServer | None, str]]:
    """A server of our own, if no other is named; and what stands between :// and ? in its URL."""
    if url is not None:
        parts = urlsplit(url)
        yield None, parts.netloc + parts.path
        return
    with RedisServer() as server:
        yield server, server.address


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="threads", help="%(default)s")
    parser.add_argument("--nodes", type=int, default=500, help="%(default)s")
    parser.add_argument("--listeners", type=int, default=4, help="of each node (%(default)s)")
    parser.add_argument("--processes", type=int, default=5, help="that the nodes are spread over (%(default)s)")
    parser.add_argument("--start-within", type=float, default=8, help="seconds (%(default)s)")
    parser.add_argument("--period", type=int, default=25, help="zmq_target_update (%(default)s)")
    parser.add_argument("--expire", type=int, default=75, help="zmq_target_expire (%(default)s)")
    parser.add_argument("--periods", type=int, default=2, help="for which the steady state is watched (%(default)s)")
    parser.add_argument("--url", help="zmq+redis:// of an EMPTY Redis, all of whose databases are flushed, instead of our own")
    parser.add_argument("--json", action="store_true", help="print everything, for further use")
    options = parser.parse_args()
    if options.processes < 3:
        parser.error("two of the processes are killed, so there must be three")
    with redis_at(options.url) as (server, address), contextlib.ExitStack() as stack:
        processes = [stack.enter_context(Nodes(options.model)) for _ in range(options.processes)]
        bench = Bench(options, list(processes), server, address)
        stack.callback(bench.directory.close)
        if bench.watch.ask("DBSIZE"):
            parser.error("that Redis is not empty")
        bench.say("cluster", f"{options.nodes} nodes of {options.listeners} listeners, model {options.model}")
        bench.start()
        bench.steady()
        bench.look_up()
        bench.flush()
        bench.hang()
        bench.restart()
        bench.kill()
        bench.stop()
        if options.json:
            print(json.dumps(bench.figures, indent=1))


if __name__ == "__main__":
    main()
