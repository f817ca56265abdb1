# SPDX-License-Identifier: Apache-2.0
"""Whether a process has descriptors left. Libzmq takes for granted in some places that it gets one, and ends the process."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from posix import close  # gevent's in os may leave it for later
from typing import Final

# Opening a socket takes 4 descriptors, and the first of a process some more.
_SPARE: Final = 12
# A transport that begins: its context, poller and directory, the first socket, and the hub of a native thread.
TO_BEGIN: Final = 32
# Since 6.2, Linux says there how many descriptors a process has; before, the size is 0.
_DESCRIPTORS: Final = Path("/proc/self/fd")
_COUNTED: Final = _DESCRIPTORS.exists()


def shortage(spare: int = _SPARE) -> str:
    """Why no socket can be opened, if descriptors are the reason; empty if there are enough of them."""
    used = _DESCRIPTORS.stat().st_size if _COUNTED else 0
    if used:
        return no_descriptors(errno.EMFILE) if used + spare > resource.getrlimit(resource.RLIMIT_NOFILE)[0] else ""
    taken: list[int] = []
    try:
        for _ in range(spare):
            taken.append(os.eventfd(0))  # noqa: PERF401 (what was taken before an error must be given back)
    except OSError as error:
        return no_descriptors(error.errno)
    finally:
        for descriptor in taken:
            close(descriptor)
    return ""


def no_descriptors(number: int | None) -> str:
    if number == errno.ENFILE:
        return "the system is out of descriptors; raise its limit (sysctl fs.file-max)"
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"this process is out of descriptors, of which it may have {limit}; raise its limit of open files (ulimit -n, "
        f"LimitNOFILE= of a systemd unit; the hard limit is {most}): it needs 4 for each server that it sends to, and 1 for "
        "each process that sends to it"
    )


class Wake:
    """An eventfd that wakes a native thread, and is closed when nobody can write to it any more.

    :raises OSError: this process is out of descriptors.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __call__(self) -> None:
        os.eventfd_write(self.fd, 1)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            close(self.fd)
