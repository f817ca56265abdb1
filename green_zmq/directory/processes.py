# SPDX-License-Identifier: Apache-2.0
"""Whether a process of this machine still runs. A pid alone does not tell: it is given to another some day."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def boot_id() -> str:
    """Of the time from one start of this machine to the next; empty if it cannot be told.

    :raises OSError: not now: out of descriptors, say. What is empty now would be so for ever.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, PermissionError):
        return ""


def process_id(pid: int | str) -> str:
    """What tells a process from a later one with its pid, within this boot; empty if there is none.

    :raises OSError: that cannot be told now: out of descriptors, say.
    """
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
        # The name, in parentheses, may hold anything; the start time is the 20th field after it (proc(5)).
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if started[0] in "ZX" else f"{namespace} {pid} {started[19]}"
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return ""


@cache
def _namespace() -> str:
    return process_id("self").partition(" ")[0]


def runs(process: str) -> bool:
    """Whether the process of that id, of this boot, runs; True if that cannot be told from here: from another container."""
    namespace, _, rest = process.partition(" ")
    if not namespace or namespace != _namespace():
        return True
    try:
        return process_id(rest.partition(" ")[0]) == process
    except OSError:
        return True


def known_to_run(process: str) -> bool:
    """Whether the process of that id, of this boot, runs; False if that cannot be told from here."""
    return bool(process) and process.partition(" ")[0] == _namespace() and runs(process)
