"""What this host has left for loader workers: cores, /dev/shm, memory; limits of the cgroup count."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil

from samestep.launcher.diagnosis import memory_signs
from samestep.train.data.workers import Room

_CGROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own


def room_of(
    ranks: int, threads: int, cgroup: Path = _CGROUP, memory_left: Callable[[], int] = memory_signs.left
) -> Room:
    """Each of `ranks` ranks on this host gets an equal part; `threads` is what its step keeps busy."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        shared = shutil.disk_usage("/dev/shm").free  # noqa: S108 (asked how full it is)
    except OSError:
        shared = 0
    return Room(
        cores=min(float(cpus), _quota(cgroup)) / ranks,
        threads=threads,
        shared_bytes=shared // ranks,
        memory_bytes=min(psutil.virtual_memory().available, memory_left()) // ranks,
    )


def _quota(cgroup: Path) -> float:
    """Cores that the cgroup may use; see `cpu.max` in the kernel's cgroup-v2 documentation."""
    quota, _, period = _text(cgroup / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else float("inf")


def copied_bytes(pids: list[int]) -> int:
    """Most memory that one of these processes has for itself: of a forked one, what it has written to since.

    Reading a Python object counts: its reference count is written. 0 where the kernel does not tell.
    """
    return max((_private(pid) for pid in pids), default=0)


def _private(pid: int) -> int:
    fields = [line.split() for line in _text(Path(f"/proc/{pid}/smaps_rollup")).splitlines()]
    return sum(1024 * int(words[1]) for words in fields if words[0] in ("Private_Dirty:", "Private_Clean:"))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
