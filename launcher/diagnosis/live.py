"""The ranks of a run that goes on now, found through its run directory: who holds the lock, and which ranks it has."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from samestep.launcher.contract import RunDir, UsageError
from samestep.launcher.diagnosis import stack_probe
from samestep.launcher.diagnosis.stacks import render_all
from samestep.launcher.lock import Owner

_LOG_HEADER = re.compile(rb"^--- rank (\d+), generation \d+, pid (\d+), ", re.MULTILINE)


def stacks_of_run(path: Path) -> str:
    """Stacks of all ranks of the run, as text.

    Raises:
        UsageError: there is no such run, it does not go on, or it does so elsewhere.
    """
    run_dir = RunDir(path)
    ranks = live_ranks(run_dir, owner(run_dir))
    return render_all(stack_probe.take(list(ranks.values())), ranks, {})


def owner(run_dir: RunDir) -> Owner:
    """The living process on this host that holds the run directory.

    Raises:
        UsageError: nobody does, or somebody on another host, or it can't be read.
    """
    try:
        if not run_dir.path.is_dir():
            raise UsageError(
                f"stacks is expected to be followed by a run directory, but there is no folder {run_dir.path}",
                "the default is runs/<recipe> below the folder in which the run was started",
            )
        found = Owner.of(run_dir.lock.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        found = Owner()
    except OSError as error:
        raise UsageError(f"{error.filename} can't be read: {error.strerror}", "ask who started the run") from None
    if not found.may_live():
        raise UsageError(
            f"the run in {run_dir.path} is expected to go on, but nobody holds its lock",
            "a run that has ended has no stacks; what it left is in its logs and errors folders",
        )
    if found.host != socket.gethostname():
        raise UsageError(
            f"the run in {run_dir.path} is expected to go on here, but pid {found.pid} on {found.host} holds its lock",
            f"run samestep stacks on {found.host}",
        )
    return found


def live_ranks(run_dir: RunDir, holder: Owner) -> dict[int, int]:
    """Rank -> pid of the ranks that live, each a child of the lock's holder, or beside it under another launcher.

    Raises:
        UsageError: none lives: they are about to start, or to end.
    """
    parents = {holder.pid, _parent(holder.pid)}
    found = {rank: pid for rank, pid in _mentioned(run_dir) if pid == holder.pid or _parent(pid) in parents}
    if not found:
        raise UsageError(
            f"the run in {run_dir.path} is expected to have ranks, but none lives at this moment",
            "try again in a second: it is starting, or about to end",
        )
    return found


def _parent(pid: int) -> int:
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return -1


def _mentioned(run_dir: RunDir) -> Iterator[tuple[int, int]]:
    """(rank, pid) of all starts, the newest last: from the logs, which know a rank before it has joined, and events."""
    for log in sorted(run_dir.logs.glob("rank-*.log")):
        with contextlib.suppress(OSError):
            for rank, pid in _LOG_HEADER.findall(log.read_bytes()):
                yield int(rank), int(pid)
    with contextlib.suppress(OSError):
        for line in run_dir.events.read_bytes().splitlines():
            if b'"run_started"' in line or b'"restarted"' in line:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    yield from ((int(rank["rank"]), int(rank["pid"])) for rank in json.loads(line)["ranks"])
