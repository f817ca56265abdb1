# SPDX-License-Identifier: Apache-2.0
"""What a concurrency model must provide. A model is a module that has these names; there is nothing to inherit from."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, Protocol

import zmq

if TYPE_CHECKING:
    import select
    import socket
    from concurrent import futures


# A wait may end so much later than it was to, seconds: a timer that is armed anew costs as much as the rest of a wake-up.
SLACK: Final = 0.001


class Event(Protocol):
    """Something that happens once. One thread (green or native) waits for it, any other sets it."""

    def set(self) -> None: ...

    def wait(self) -> None: ...


class Lock(AbstractContextManager[Any], Protocol):
    """As ``threading.Lock``."""

    def acquire(self, blocking: bool = True, /) -> bool: ...

    def release(self) -> None: ...


class OwnedLock(Protocol):
    """As ``threading.RLock``: only the native thread that has it can release it, others get a RuntimeError."""

    def acquire(self, blocking: bool = True, /) -> bool: ...

    def release(self) -> None: ...


class Poller(Protocol):
    """Lets a loop wait for its sockets. Made and used in the thread of that loop; only what says so is for all.

    :ivar lock: who has it may use what is the loop's, if that waits; for all. A loop with a native thread of its own gives it
        up only while it waits; in a green model other green threads run only then.

    Which sockets are ready is for the loop to find out: ``zmq.FD`` is edge-triggered, and any use of a socket may swallow
    the edge. So the loop looks at ``zmq.EVENTS`` before it waits, and after.
    """

    @property
    def lock(self) -> OwnedLock: ...

    def register(self, socket: zmq.Socket[bytes]) -> None: ...

    def unregister(self, socket: zmq.Socket[bytes]) -> None: ...

    def wait(self, timeout: float | None) -> Collection[zmq.Socket[bytes]]:
        """Wait until a socket's descriptor fires, :meth:`wake` is called, or so many seconds have passed.

        In a green model other green threads run meanwhile, even if the time is 0. Returns the sockets that fired.
        """

    def wake(self) -> None:
        """End the wait, or the next one if there is none; from any thread."""

    def is_here(self) -> bool:
        """Whether who asks may take the lock: for a green model another native thread may not. For all."""

    def close(self) -> None: ...

    def abandon(self) -> None:
        """In a forked child: stop watching what is the parent's, leaving that undisturbed."""


class Model(Protocol):
    """A concurrency model."""

    NAME: str
    Context: type[zmq.Context[Any]]
    # A native lock for what two native threads of this process must not do at once, and during which nothing may wait.
    # (The locks of patched modules do not work between native threads.) A forked child has a new one.
    LOCK: AbstractContextManager[Any]

    @property
    def Event(self) -> type[Event]: ...

    @property
    def Poller(self) -> type[Poller]: ...

    @property
    def Executor(self) -> Callable[..., futures.Executor]:
        """What can run the messages of oslo.messaging's servers: made with ``max_workers``."""

    def spawn(self, fn: Callable[[], None]) -> None:
        """Run a loop in a thread of this model, for as long as it likes."""

    def start_native(self, fn: Callable[[], None]) -> None:
        """Run a function that may block in a native thread of its own."""

    def current(self) -> object:
        """What tells the thread of this model that runs from others."""

    def native_lock(self) -> Lock:
        """Excludes native threads from one another; one that waits for it keeps its green threads waiting."""

    def native_owned_lock(self) -> OwnedLock:
        """The same, for what may be ended at any step: who does not have it cannot release it."""

    def native_poll(self) -> select.poll:
        """For a native thread to wait with: patching takes it away from the module ``select``."""

    def native_sleep(self, seconds: float, /) -> None:
        """For a native thread."""

    @property
    def native_socket(self) -> type[socket.socket]:
        """Blocks the native thread that uses it, as it does without patching."""

    def wait_readable(self, fd: int, seconds: float) -> None:
        """Wait until a descriptor can be read, or for so long. In a green model other green threads run meanwhile."""

    def pause(self) -> None:
        """Let other green threads run."""

    def after_fork(self) -> None:
        """In a forked child: make the hub and the lock its own."""
