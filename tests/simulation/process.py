# SPDX-License-Identifier: Apache-2.0
"""A simulated process: a real engine on a simulated loop, and the threads that use it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import zmq
from greenlet import getcurrent, greenlet

from green_zmq.engine import Engine
from green_zmq.errors import TransportClosed
from green_zmq.server import Incoming, Listener, Revoked
from green_zmq.wire import Key
from tests.simulation.clock import Event
from tests.simulation.directory import Asker
from tests.simulation.network import Router, Socket, closed

if TYPE_CHECKING:
    from tests.simulation.world import World


class Loop:
    """With the interface of green_zmq.loop.Loop; it reads what there is in any order, and in bursts of any length."""

    def __init__(self, process: Process) -> None:
        clock = process.world.clock
        self.process = process
        self.model = SimpleNamespace(
            NAME="threads", Event=partial(Event, clock), pause=lambda: None, native_lock=threading.Lock
        )
        self.timed: list[Any] = []
        self.settle: Callable[[], None] = lambda: None
        self.is_settled: Callable[[], bool] = lambda: True
        self.on_crash: Callable[[], None] | None = None
        self.over = False
        self._clock = clock
        self._mailbox: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._handlers: dict[Socket, Callable[[list[bytes]], None]] = {}
        self._due = inf
        self._spins = 0
        self._stopping = False
        self._ended: list[Event] = []

    def start(self) -> None:
        self.wake()

    def post(self, fn: Callable[..., object], *arguments: Any) -> None:
        if self.over or not self.process.alive:
            raise TransportClosed("The transport was closed.")
        self._mailbox.append((fn, arguments))
        self.wake()

    def call(self, fn: Callable[..., object], *arguments: Any) -> bool:
        rests = self.process.alive and not self.over and not self._mailbox and self._clock.random.random() < 0.5
        if rests:
            fn(*arguments)
            self.wake()
        return rests

    def post_lazily(self, fn: Callable[..., object], *arguments: Any) -> None:
        self._mailbox.append((fn, arguments))

    def join(self) -> None:
        if not self.over:
            event = Event(self._clock)
            self._ended.append(event)
            event.wait()

    def open(self, kind: int, on_message: Callable[[list[bytes]], None]) -> Socket:
        socket = Socket(self, kind)
        self._handlers[socket] = on_message
        return socket

    def monitor(self, socket: Socket, events: int, on_message: Callable[[Socket, list[bytes]], None]) -> Socket:
        monitor = self.open(0, lambda frames: on_message(monitor, frames))
        socket.monitor = monitor
        return monitor

    def watch(self, socket: Socket) -> None: ...

    def close(self, socket: Socket, linger: float) -> None:
        if self._handlers.pop(socket, None) is not None:
            closed(socket)

    def send(self, socket: Socket, frames: Sequence[bytes]) -> bool:
        self.process.world.promises.written(self.process, list(frames))
        if socket.connection is not None:
            socket.connection.up.send(list(frames))
            return True
        return self._clock.random.random() < 0.5  # libzmq may not know yet that the connection is gone

    def read(self, socket: Socket, most: int) -> bool:
        while socket.inbox and most and socket in self._handlers:
            most -= 1
            frames = socket.inbox.popleft()
            if socket.kind == zmq.DEALER:
                self.process.world.promises.read(self.process, frames)
            self._handlers[socket](frames)
        return bool(socket.inbox)

    def finish(self) -> None:
        self._stopping = True

    def wake(self) -> None:
        self._turn_at(self._clock.now + self._clock.random.random() * self.process.slow)

    def _turn_at(self, when: float) -> None:
        if when < self._due:
            self._due = when
            self._clock.at(when, self._turn, when)

    def _turn(self, when: float) -> None:
        process, random = self.process, self._clock.random
        if when != self._due or self.over or not process.alive:
            return
        self._due = inf
        process.world.turn = process
        if process.paused or process.frozen:
            return
        for _ in range(min(len(self._mailbox), random.choice((1, 3, 100)))):
            fn, arguments = self._mailbox.popleft()
            fn(*arguments)
        ready = [socket for socket in self._handlers if socket.inbox]
        random.shuffle(ready)
        for socket in ready:
            self.read(socket, random.choice((1, 3, 100)))
        self.settle()
        now = self._clock.now
        due = [timed for timed in self.timed if timed.due <= now]
        for timed in due:
            timed.tick(now)
        self.settle()
        self._spins = self._spins + 1 if due and min(timed.due for timed in self.timed) <= now else 0
        assert self._spins < 1000, "it is due again and again although no time passes"
        process.world.promises.after_turn(process)
        if self._stopping:
            self._end()
        elif self._mailbox or any(socket.inbox for socket in self._handlers):
            self.wake()
        else:
            self._turn_at(max(now, min(timed.due for timed in self.timed)))

    def _end(self) -> None:
        self.over = True
        while self._mailbox:
            fn, arguments = self._mailbox.popleft()
            fn(*arguments)
        for socket in list(self._handlers):
            self.close(socket, 0)
        for event in self._ended:
            event.set()


class Service:
    """What a process offers at one address, as oslo.messaging's server would: a queue and some workers."""

    def __init__(self, process: Process, key: Key, workers: int) -> None:
        self.process = process
        self.key = key
        self.workers = workers
        self.listener: Listener | None = None
        self.registered = inf
        self.tasks: deque[Incoming] = deque()
        self.idle = workers

    def start(self) -> None:
        """In a thread."""
        process = self.process
        while process.alive and not process.engine.over:
            listener = Listener(process.engine.server, self.key, 1, None)
            try:
                listener.start(self._take)
            except TransportClosed:
                return
            except Exception:  # the directory is away; a service would be started again
                process.world.clock.sleep(0.5)
                continue
            self.listener = listener
            self.registered = process.world.clock.now
            return

    def stop(self) -> None:
        """In a thread: and what has begun is ended."""
        listener, self.listener, self.registered = self.listener, None, inf
        if listener is not None:
            listener.stop()

    def _take(self, batch: list[Incoming]) -> None:
        self.tasks += batch
        if self.idle:
            self.idle -= 1
            self.process.spawn(self._work)

    def _work(self) -> None:
        while self.tasks:
            self._run(self.tasks.popleft())
        self.idle += 1

    def _run(self, incoming: Incoming) -> None:
        world, process = self.process.world, self.process
        try:
            incoming.acknowledge()
        except (Revoked, TransportClosed):
            return
        number, seconds, fails = incoming.message["work"]
        world.promises.runs(number, process, self.key)
        while seconds > 0:
            step = min(seconds, incoming.client_timeout / 3 if incoming.client_timeout else seconds)
            world.clock.sleep(step)
            process.hold()
            seconds -= step
            if incoming.client_timeout:
                incoming.heartbeat()
        if fails:
            error = ValueError(str(number))
            incoming.reply(failure=(ValueError, error, None))
        else:
            incoming.reply(number)


class Process:
    """
    :ivar alive: it was not killed.
    :ivar paused: it is stopped as a whole; frozen: its hub is, while ZeroMQ's thread goes on.
    :ivar slow: the most seconds from something that is to be done until its loop does it.
    :ivar held: when it was last paused or frozen.
    """

    def __init__(self, world: World, host: str, port: int) -> None:
        self.world = world
        self.host = host
        self.port = port
        self.alive = True
        self.paused = self.frozen = False
        self.held = -inf
        self.stopping = False
        self.slow = 0.0005
        self.router: Router | None = None
        self.services: list[Service] = []
        self.topics: set[tuple[str, str]] = set()
        self.instance = world.clock.random.randbytes(16)
        self._waiting: list[greenlet] = []
        self.loop = Loop(self)
        self.engine = Engine(
            world.settings,
            self.loop,  # type: ignore[arg-type]
            Router(self),  # type: ignore[arg-type]
            Asker(self, world.store),  # type: ignore[arg-type]
            self.instance,
            world.clock.time,
        )
        self.engine.start()

    def __repr__(self) -> str:
        return f"{self.host}:{self.port}/{self.instance[:2].hex()}"

    def spawn(self, fn: Callable[..., None], *args: Any) -> greenlet:
        def run(*args: Any) -> None:
            self.hold()
            fn(*args)

        return self.world.clock.spawn(run, *args)

    def hold(self) -> None:
        """In a thread: nothing of a process goes on while it is paused, nor once it is dead."""
        while self.paused or self.frozen or not self.alive:
            self._waiting.append(getcurrent())
            self.world.clock.wait()

    def go_on(self) -> None:
        self.held = self.world.clock.now
        if self.alive and not self.paused and not self.frozen:
            for thread in self._waiting:
                self.world.clock.after(0, thread.switch)
            self._waiting.clear()
            self.loop.wake()
            self.world.network.pump()

    def crash(self) -> None:
        if self.alive:
            self.alive = False
            for service in self.services:
                service.registered = inf
            self.services.clear()
            self.world.network.listening.pop((self.host, self.port), None)
            self.world.network.died(self)
            self._waiting.clear()

    def serve(self, key: Key, workers: int) -> None:
        service = Service(self, key, workers)
        self.services.append(service)
        self.topics.add((key.exchange, key.topic))
        self.spawn(service.start)

    def stop(self) -> None:
        """In a thread: a planned stop."""
        self.stopping = True
        for service in self.services:
            service.stop()
        while any(service.idle < service.workers or service.tasks for service in self.services):
            self.world.clock.sleep(0.05)
            self.hold()
        self.services.clear()
        self.engine.close()
        self.world.stopped.append((self.world.clock.now, 2 * self.world.network.slow))
        self.crash()
