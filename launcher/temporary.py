"""Folders for sockets and pipes of a rank's data loading processes, named so that anybody can tell whose they are.

multiprocessing makes a folder of a random name in each rank and removes it when the rank ends by itself: one that is
killed leaves it. Names here say which process it was, so what a dead one has left can be told and removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from samestep.launcher.lock import start_time


def folder(base: Path | None = None) -> Path | None:
    """A folder of this process, made if it is not there; None where the system can't tell processes apart."""
    prefix, started = _prefix(), start_time(os.getpid())
    if not prefix or started < 0:  # which a process that is out of descriptors can't read
        return None
    path = (base or Path(tempfile.gettempdir())) / f"{prefix}{os.getpid()}-{started}"
    try:
        path.mkdir(mode=0o700)  # never one that somebody else has put there
    except FileExistsError:
        return path if _is_ours(path) else None
    except OSError:
        return None
    return path


def sweep(base: Path | None = None) -> None:
    """Remove what processes have left that live no more."""
    prefix = _prefix()
    base = base or Path(tempfile.gettempdir())
    for path in base.glob(f"{prefix}*-*") if prefix else ():
        pid, _, started = path.name.removeprefix(prefix).partition("-")
        if pid.isdecimal() and started != str(start_time(int(pid))) and _is_ours(path):
            shutil.rmtree(path, ignore_errors=True)


def _prefix() -> str:
    """Numbers of processes mean something within one user and one namespace only: a container may share the folder."""
    with contextlib.suppress(OSError, AttributeError):
        return f"samestep-{os.getuid()}-{Path('/proc/self/ns/pid').stat().st_ino}-"
    return ""


def _is_ours(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.getuid()
    return False
