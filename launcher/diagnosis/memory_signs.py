"""What the kernel counts about memory: kills for lack of it, the limit, shared memory. Standard library, no torch.

Formats: `memory.events` and `memory.max` of cgroup v2 (Documentation/admin-guide/cgroup-v2.rst), `memory.oom_control`
`memory.limit_in_bytes` and `memory.stat` of v1 (cgroup-v1/memory.rst), `smaps_rollup` (filesystems/proc.rst).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_SHARED = Path("/dev/shm")  # noqa: S108 (looked at, never written)
_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class MemorySigns:
    """Memory of this host or container, in bytes; zero where the system doesn't tell."""

    oom_kills: int = 0  # processes that the kernel has ended for lack of memory, in our cgroup
    limit: int = 0  # of the tightest cgroup, or of the machine
    shared_size: int = 0
    shared_used: int = 0

    def since(self, earlier: MemorySigns) -> MemorySigns:
        """These, with the kills that have come since `earlier`."""
        return replace(self, oom_kills=max(0, self.oom_kills - earlier.oom_kills))


NOTHING_COUNTED = MemorySigns()


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of one process, in bytes: what it has mapped in, and its fair share where pages are shared."""

    resident: int
    proportional: int


def read(cgroups: Path = _CGROUPS, own: Path = _OWN, shared: Path = _SHARED) -> MemorySigns:
    """The counters as they are now."""
    folders = list(_folders(cgroups, own))
    kills = [_kills(folder) for folder in folders[:1]]
    limits = [limit for folder in folders if (limit := _limit(folder)) < _UNLIMITED]
    size, used = _space(shared)
    return MemorySigns(sum(kills), min([*limits, _machine()], default=0), size, used)


def left(cgroups: Path = _CGROUPS, own: Path = _OWN) -> int:
    """Bytes until the first limit of our cgroups is reached; file pages that can be given back count as free."""
    known = [(limit, folder) for folder in _folders(cgroups, own) if (limit := _limit(folder)) < _UNLIMITED]
    return min([max(0, limit - _used(folder)) for limit, folder in known], default=_UNLIMITED)


def footprint(pid: int, proc: Path = Path("/proc")) -> Footprint | None:
    """Memory of a process now; None if it is gone or the system doesn't tell."""
    try:
        fields = _words((proc / str(pid) / "smaps_rollup").read_text().replace(":", ""))
    except OSError:
        return None
    return Footprint(1024 * fields["Rss"], 1024 * fields["Pss"]) if {"Rss", "Pss"} <= fields.keys() else None


def peak_resident(proc: Path = Path("/proc")) -> int | None:
    """Bytes that this process has held at most, since its program began; None where the system doesn't tell."""
    try:
        fields = _words((proc / "self" / "status").read_text().replace(":", ""))
    except OSError:
        return None
    return 1024 * fields["VmHWM"] if "VmHWM" in fields else None


def size(number: int) -> str:
    """`1.5 GiB`."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number / 1024:.0f} KiB" if number >= 1024 else f"{number} B"


def _folders(cgroups: Path, own: Path) -> Iterator[Path]:
    """Our memory cgroup and those above it; in a container the path may be the host's, and only the root be there."""
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = cgroups / "memory" if "memory" in controllers.split(",") else cgroups
            if controllers and "memory" not in controllers.split(","):
                continue
            folder = root / path.lstrip("/")
            for candidate in (folder, *folder.parents):
                if candidate.is_relative_to(root) and _knows_memory(candidate):
                    yield candidate


def _knows_memory(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("memory.events", "memory.oom_control"))


def _kills(folder: Path) -> int:
    for name in ("memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError):
            return _words((folder / name).read_text()).get("oom_kill", 0)
    return 0


def _limit(folder: Path) -> int:
    for name in ("memory.max", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int((folder / name).read_text())  # v2 says "max" where there is none
    return _UNLIMITED


def _used(folder: Path) -> int:
    for name, given_back in (("memory.current", "inactive_file"), ("memory.usage_in_bytes", "total_inactive_file")):
        with contextlib.suppress(OSError, ValueError):
            used = int((folder / name).read_text())
            return used - _words((folder / "memory.stat").read_text()).get(given_back, 0)
    return 0


def _machine() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return _UNLIMITED


def _space(folder: Path) -> tuple[int, int]:
    try:
        space = os.statvfs(folder)
    except OSError:
        return 0, 0
    return space.f_blocks * space.f_frsize, (space.f_blocks - space.f_bfree) * space.f_frsize


def _words(text: str) -> dict[str, int]:
    """`name number …` a line."""
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
