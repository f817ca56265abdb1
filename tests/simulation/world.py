# SPDX-License-Identifier: Apache-2.0
"""A world that one integer decides: processes, what they say to each other, and everything that goes wrong meanwhile."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

from green_zmq import wire
from green_zmq.config import Bounds, Settings
from green_zmq.delivery import Limits
from green_zmq.wire import CALL, CAST, FANOUT, Key
from tests.simulation.clock import Clock
from tests.simulation.directory import Store
from tests.simulation.network import Network
from tests.simulation.process import Process, Service
from tests.simulation.promises import Broken, Message, Promises, Remote

# Seconds: of faults and sending, of sending after the last fault, and for everything to end.
_FAULTS = 20.0
_CALM = 5.0
_END = 120.0
_TOPICS = ("t", "u")
_SERVERS = ("a", "b", "host@backend")


class _Losses(logging.Handler):
    """Every loss must be logged: this reads the log. In a simulation everything logs from the process whose turn it is."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("lost"):
            times, _, key, reason = record.args[:4]  # type: ignore[index,misc]
            self._world.logged[self._world.turn, key] += times
            if "busy" in str(reason) or "did not begin it in time" in str(reason):
                self._world.crowded_out[self._world.turn, key] += times


class World:
    """
    :ivar gentle: every process ends as it should, if at all, and connections only break; then nothing may be lost.
    :ivar healed: when the last fault was over.
    :ivar turn: the process whose loop has its turn.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.clock = clock = Clock(seed)
        random.seed(seed)  # the jitter of what is simulated
        pick = clock.random
        self.gentle = pick.random() < 0.25
        self.local = pick.random() < 0.5
        heartbeat = pick.choice((0.5, 1.0, 3.0))
        self.settings = Settings(
            model="threads",
            directory="memory",
            directory_path=Path(),
            redis=None,
            host="",
            bind_address="*",
            min_port=1,
            max_port=2,
            expire=pick.choice((4.0, 10.0)),
            update=2.0,
            codec=wire.JSON,
            linger=10.0 if self.gentle else pick.choice((0.0, 2.0)),
            limits=Limits(
                grace=pick.choice((0.3, 1.0)),
                time_to_live=40.0 if self.gentle else pick.choice((5.0, 40.0)),
                outbox_messages=1000 if self.gentle else pick.choice((3, 1000)),
                outbox_bytes=1 << 20 if self.gentle else pick.choice((200, 1 << 20)),
                ahead=(1, 3, 256)[seed % 3],
            ),
            listener_window=pick.choice((1, 2, 100)),
            max_connections=pick.choice((1, 2, 100)),
            idle_timeout=pick.choice((1.0, 5.0, 600.0)),
            heartbeat=heartbeat,
            gc_threshold=0,
            notification_path=Path(),
            bounds=Bounds(messages=1, age=1.0, takeover=1.0, tries=1),
        )
        self.network = Network(clock, heartbeat)
        self.network.slow = pick.choice((0.0005, 0.005, 0.05))
        self.store = Store(clock, self.settings.expire, lambda instance: not self.local or self.runs(instance))
        self.promises = Promises(self)
        self.processes: list[Process] = []
        # Losses in the logs, and those of them because all servers were busy.
        self.logged: Counter[tuple[Process, Key]] = Counter()
        self.crowded_out: Counter[tuple[Process, Key]] = Counter()
        self.turn: Process | None = None
        self.healed = inf
        self.disturbed: list[tuple[float, float]] = []
        # When processes stopped, and how long a message took then.
        self.stopped: list[tuple[float, float]] = []
        # Threads that wait for the end of what they send.
        self._callers: dict[greenlet, Process] = {}
        self._workers = pick.choice((1, 1, 2, 4))
        self._rate = pick.choice((1.0, 4.0, 10.0))
        # Some worlds have much of one fault and none of another, which shows what is rare where all are mixed.
        self._emphasis = [pick.choice((0.1, 1, 1, 4)) for _ in range(40)]
        self._end = clock.now + _FAULTS
        for i in range(pick.choice((1, 2, 3, 4))):
            self.boot(f"10.0.0.{i if pick.random() < 0.7 else 0}", 5000 + i, serves=True)
        for i in range(pick.choice((1, 1, 2, 3))):
            self.boot(f"10.0.1.{i}", 6000 + i, serves=pick.random() < 0.3)

    def runs(self, instance: bytes) -> bool:
        return any(process.alive and process.instance == instance for process in self.processes)

    def disturbed_at(self, since: float, until: float) -> bool:
        return any(begin < until and end > since for begin, end in self.disturbed)

    def undisturbed(self, one: Process, other: Process, since: float, until: float) -> bool:
        """Whether there was nothing in the way of these two, in that time and a little before."""
        early = since - 2 * self.network.heartbeat - 1
        if self.disturbed_at(early, until):
            return False
        return one.alive and other.alive and not other.stopping and max(one.held, other.held) < early

    # Processes and what they say.

    def boot(self, host: str, port: int, *, serves: bool) -> Process:
        process = Process(self, host, port)
        self.clock.note(f"{process} starts")
        self.processes.append(process)
        pick = self.clock.random
        if serves:
            for topic in _TOPICS[: pick.choice((1, 2))]:
                process.serve(Key("ex", topic, pick.choice(_SERVERS)), self._workers)
        for _ in range(pick.choice((1, 2))):
            process.spawn(self._talk, process)
        return process

    def _talk(self, process: Process) -> None:
        """A thread that sends one message after another."""
        clock, pick = self.clock, self.clock.random
        while clock.now < self._end + _CALM:
            clock.sleep(pick.expovariate(self._rate))
            process.hold()
            if process.stopping:
                return
            if pick.random() < 0.5:
                process.spawn(self._send, process)
            else:
                self._send(process)
                process.hold()

    def _send(self, process: Process) -> None:
        pick = self.clock.random
        kind = pick.choice((CALL, CALL, CALL, CAST, CAST, CAST, FANOUT))
        server = "" if kind == FANOUT or pick.random() < 0.7 else pick.choice(_SERVERS)
        patient = self.gentle or pick.random() < 0.6
        message = Message(
            len(self.promises.messages),
            kind,
            Key("ex", pick.choice(_TOPICS), server),
            process,
            timeout=pick.choice((0.3, 3.0, 20.0, 80.0)) if kind == CALL else None,
            monitor=3.0 if kind == CALL and pick.random() < 0.2 else None,
            retry=None if patient else pick.choice((0, 2)),
            required=pick.random() < 0.05,
            fails=pick.random() < 0.1,
        )
        seconds = pick.choice((0.0, 0.0, 0.001, 0.03, 0.2, 2.0, 6.0 if message.monitor else 2.0))
        body = [{}, {"work": [message.number, seconds, message.fails]}]
        caller = getcurrent()
        self._callers[caller] = process
        self.promises.begins(message)
        try:
            answer = process.engine.client.send(
                kind,
                message.key,
                body,
                timeout=message.timeout,
                monitor=message.monitor,
                retry=message.retry,
                required=message.required,
            )
            if answer is not None:
                value = wire.decode_body(answer.body, answer.codec, lambda: None)
                message.outcome = value
                if answer.kind == wire.FAILURE:
                    message.outcome, message.error = None, Remote(value)
        except GreenletExit:
            message.killed = True
            raise
        except Exception as error:
            message.error = error
        finally:
            del self._callers[caller]
        self.promises.ends(message)

    # What goes wrong.

    def _faults(self) -> list[tuple[int, Callable[[], None]]]:
        gentle: list[tuple[int, Callable[[], None]]] = [
            (4, self._cut),
            (3, self._half_open),
            (3, self._part),
            (2, self._pause),
            (2, self._freeze),
            (2, self._slow_network),
            (1, self._slow_process),
            (3, self._stop_listening),
            (2, self._stop_cut_off),
            (2, self._planned_restart),
            (2, self._late_directory),
            (2, self._repeat),
        ]
        rough: list[tuple[int, Callable[[], None]]] = [
            (4, self._crash),
            (2, self._take_over),
            (1, self._kill_caller),
            (1, self._lose_power),
            (2, self._directory_away),
            (1, self._stale_directory),
            (1, self._empty_directory),
            (1, self._flap),
        ]
        return gentle if self.gentle else gentle + rough

    def _break(self) -> None:
        """One fault, and the next some time later."""
        clock = self.clock
        if clock.now >= self._end:
            return
        faults = self._faults()
        weights = [weight * emphasis for (weight, _), emphasis in zip(faults, self._emphasis, strict=False)]
        (fault,) = clock.random.choices([fault for _, fault in faults], weights)
        clock.note(f"fault: {fault.__name__}")
        fault()
        clock.after(clock.random.expovariate(1.0), self._break)

    def _for(self, seconds: float, undo: Callable[[], None]) -> None:
        """Undo it then, or when all is healed."""
        until = min(self.clock.now + seconds, self._end)
        self.disturbed.append((self.clock.now, until))
        self.clock.at(until, undo)

    def _now(self, seconds: float = 0.0) -> None:
        self.disturbed.append((self.clock.now, self.clock.now + seconds))

    def _unnoticed(self) -> None:
        """One end of a connection is lost, and the other notices that by its heartbeats."""
        self._now(3 * self.network.heartbeat)

    def _some(self, seconds: float = 1.0) -> float:
        return min(self.clock.random.expovariate(1 / seconds), 12.0)

    def _any(self, things: list[Any]) -> Any:
        return self.clock.random.choice(things) if things else None

    def _living(self) -> list[Process]:
        return [process for process in self.processes if process.alive and not process.stopping]

    def _cut(self) -> None:
        if connection := self._any(list(self.network.connections)):
            connection.cut()
            self._now()

    def _half_open(self) -> None:
        connections = list(self.network.connections)
        if connection := self._any([c for c in connections if c.up.moving or c.down.moving] or connections):
            connection.half_open()
            self._unnoticed()

    def _part(self) -> None:
        one, other = self._any(self._living()), self._any(self._living())
        if one and other and one.host != other.host:
            ways = [(one.host, other.host), (other.host, one.host)][: self.clock.random.choice((1, 2))]
            for way in ways:
                self.network.part(*way)
            self._for(self._some(3), lambda: [self.network.join(*way) for way in ways] and None)

    def _pause(self) -> None:
        if process := self._any([p for p in self._living() if not p.paused]):
            process.paused = True
            for connection in self.network.of(process):
                connection.watch()
            self._for(self._some(3), lambda: self._resume(process))

    def _resume(self, process: Process) -> None:
        process.paused = False
        process.go_on()

    def _freeze(self) -> None:
        if process := self._any([p for p in self._living() if not p.frozen]):
            process.frozen = True

            def thaw() -> None:
                process.frozen = False
                process.go_on()

            self._for(self._some(2), thaw)

    def _slow_network(self) -> None:
        before, self.network.slow = self.network.slow, self.clock.random.choice((0.1, 0.5))
        self._for(self._some(2), lambda: setattr(self.network, "slow", min(before, 0.05)))

    def _slow_process(self) -> None:
        if process := self._any(self._living()):
            process.slow = self.clock.random.choice((0.02, 0.2))
            self._for(self._some(2), lambda: self._speed_up(process))

    def _speed_up(self, process: Process) -> None:
        process.slow = 0.0005
        process.go_on()

    def _stop_listening(self) -> None:
        services = [s for process in self._living() for s in process.services if s.registered < inf]
        if service := self._any(services):
            self._begin_anew(service)

    def _begin_anew(self, service: Service) -> None:
        def again() -> None:
            if service.registered < inf:
                service.stop()
                self.clock.sleep(self._some(0.5))
                service.process.hold()
                if not service.process.stopping:
                    service.start()

        service.process.spawn(again)

    def _stop_cut_off(self) -> None:
        """A listener that stops loses those at the same time to whom it would give back what it has."""
        services = [s for process in self._living() for s in process.services if s.registered < inf]
        if service := self._any([s for s in services if s.tasks] or services):
            for connection in self.network.of(service.process):
                if connection.server is service.process:
                    connection.lose_client()
            self._unnoticed()
            self._begin_anew(service)

    def _planned_restart(self) -> None:
        servers = [p for p in self._living() if p.services and all(s.registered < inf for s in p.services)]
        if process := self._any(servers):
            keys = [service.key for service in process.services]
            host, port = process.host, process.port
            process.spawn(process.stop)
            self._boot_later(host, port + self.clock.random.choice((0, 100)), keys)

    def _boot_later(self, host: str, port: int, keys: list[Key]) -> None:
        def boot() -> None:
            if (host, port) in self.network.listening or any(
                p.alive and (p.host, p.port) == (host, port) for p in self.processes
            ):
                self.clock.after(0.5, boot)
                return
            process = self.boot(host, port, serves=False)
            for key in keys:
                process.serve(key, self._workers)

        self.clock.after(self._some(0.5), boot)

    def _late_directory(self) -> None:
        before = self.store.late
        self.store.late = late = self.clock.random.choice((0.3, 2.0))

        def over() -> None:
            self.store.late = min(before, 0.01)
            self._now(late)  # what was asked before is still on its way

        self._trouble(over)

    def _trouble(self, undo: Callable[[], None], seconds: float | None = None) -> None:
        def over() -> None:
            undo()
            self.store.troubled = self.clock.now

        self.store.troubled = inf
        self._for(self._some(3) if seconds is None else seconds, over)

    def _repeat(self) -> None:
        if connection := self._any([c for c in self.network.connections if c.up.moving or c.down.moving]):
            connection.up.repeat()
            connection.down.repeat()

    def _crash(self) -> None:
        living = self._living()
        working = [process for process in living if any(service.idle < service.workers for service in process.services)]
        if process := self._any(working or living):
            self._kill(process)

    def _kill(self, process: Process) -> None:
        keys = [service.key for service in process.services]
        host, port = process.host, process.port
        process.crash()
        self._now()
        self._boot_later(host, port + self.clock.random.choice((0, 0, 100)), keys)

    def _take_over(self) -> None:
        """Another service is given the port of one that died."""
        if process := self._any([p for p in self._living() if p.services]):
            process.crash()
            self._now()
            self._boot_later(process.host, process.port, [Key("ex", "other", "c")])
            self._boot_later(process.host, process.port + 200, [s.key for s in process.services])

    def _lose_power(self) -> None:
        """Nobody is told that the host is gone."""
        if process := self._any(self._living()):
            for other in self._living():
                if other.host != process.host:
                    self.network.part(process.host, other.host)
                    self.network.part(other.host, process.host)
            self._kill(process)
            self._for(self._some(3), self.network.heal)

    def _kill_caller(self) -> None:
        callers = [thread for thread, p in self._callers.items() if p.alive and not p.paused and not p.frozen]
        if thread := self._any(callers):
            thread.throw(GreenletExit)

    def _directory_away(self) -> None:
        self.store.away = True
        for handle in self._askers():
            handle.notice(failing=True)

        def back() -> None:
            self.store.away = False
            for handle in self._askers():
                handle.notice(failing=False)

        self._trouble(back)

    def _askers(self) -> list[Any]:
        return [p.engine._resolver._asker for p in self._living() if self.clock.random.random() < 0.7]

    def _stale_directory(self) -> None:
        self.store.behind = self._some(3)
        self._trouble(lambda: setattr(self.store, "behind", 0.0))

    def _empty_directory(self) -> None:
        self.store.lose_everything()
        self._trouble(lambda: None, self.settings.update + 1)

    def _flap(self) -> None:
        """A node's record is lost, and comes back."""
        if process := self._any([p for p in self._living() if p.services]):
            self.store.lose(process.instance)
            self._trouble(lambda: None, self.settings.update + 1)

    # All of it.

    def run(self) -> World:
        """
        :raises Broken: a promise was not kept.
        """
        log = logging.getLogger("green_zmq")
        level, propagate, handler = log.level, log.propagate, _Losses(self)
        log.setLevel(logging.ERROR)
        log.propagate = False
        log.addHandler(handler)
        try:
            self.clock.after(1.0, self._break)
            self.clock.run(self._end)
            self._heal()
            self.clock.run(self._end + _END)
            self.promises.at_end()
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate
            for process in self.processes:
                process.alive = False
            self.clock.end()
        return self

    def _heal(self) -> None:
        self.clock.note("everything is well from now on")
        self.healed = self.clock.now
        self.network.slow = min(self.network.slow, 0.05)
        self.network.heal()
        self.store.away = False
        for process in self.processes:
            process.paused = process.frozen = False
            process.go_on()


def run(seed: int) -> World:
    return World(seed).run()


__all__ = ["Broken", "World", "run"]
