# SPDX-License-Identifier: Apache-2.0
"""Programs and libraries that the tests need and that no Python package has: from this system, else out of Debian's packages.

Those are unpacked into a folder of the tests' own; nothing is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_NFT = ("nftables", "libnftables1", "libnftnl11", "libjansson4", "libmnl0", "libxtables12", "libedit2", "libbsd0", "libmd0")
_FAKETIME = ("libfaketime",)


@cache
def nft() -> list[str]:
    """The command of nftables, with what must stand before it.

    :raises RuntimeError: it is neither installed nor to be had.
    """
    path = shutil.which("nft") or shutil.which("nft", path="/usr/sbin:/sbin")
    if path:
        return [path]
    root = _unpacked(_NFT, "nft")
    libraries = ":".join(str(folder) for folder in root.glob("usr/lib/*-linux-*"))
    return ["env", f"LD_LIBRARY_PATH={libraries}", str(root / "usr/sbin/nft")]


@cache
def libfaketime() -> Path:
    """The library for programs with threads.

    :raises RuntimeError: it is neither installed nor to be had.
    """
    name = "faketime/libfaketimeMT.so.1"
    found = [*Path("/usr/lib").glob(f"*/{name}"), *Path("/usr/lib").glob(name)]
    return found[0] if found else next(_unpacked(_FAKETIME, "libfaketime").glob(f"usr/lib/*/{name}"))


def kept_folder(name: str) -> Path:
    """A folder that is kept for other runs; any number of processes may want it at once.

    :raises RuntimeError: another user could have written to it.
    """
    folder = Path(tempfile.gettempdir(), f"green_zmq-{os.getuid()}-{name}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RuntimeError(f"{folder} could have been written by another user: remove it")
    return folder


def _unpacked(packages: tuple[str, ...], name: str) -> Path:
    """The files of these packages."""
    kept = kept_folder(name)
    root = kept / "root"
    if root.exists():
        return root
    with tempfile.TemporaryDirectory(dir=kept) as temporary:
        try:
            _run("apt-get", "download", *packages, folder=temporary)
        except (OSError, subprocess.SubprocessError):
            try:  # a fresh machine does not know yet what there is
                _run("apt-get", "update", folder=temporary)
                _run("apt-get", "download", *packages, folder=temporary)
            except (OSError, subprocess.SubprocessError) as error:
                said = getattr(error, "stderr", None) or error
                wanted = f"the tests need {name}: install the package {packages[0]} of your distribution"
                raise RuntimeError(f"{wanted}. Debian's was tried: {said}") from error
        new = Path(temporary, "root")
        for package in Path(temporary).glob("*.deb"):
            _run("dpkg-deb", "--extract", str(package), str(new), folder=temporary)
        try:
            new.rename(root)
        except OSError:
            if not root.exists():  # else somebody else was faster
                raise
    return root


def _run(*command: str, folder: str) -> None:
    subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=True)
