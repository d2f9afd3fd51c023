"""Take the stacks of running processes.

py-spy reads another process's memory, so it works while the interpreter lock is held and on a stopped process. Where
the system does not let it, the process writes its own stacks: a recipe's ranks do so on SIGUSR2 (see
stack_signal), into a nameless file that is read through /proc.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from samestep.launcher.diagnosis.stack_signal import STACKS_FILE
from samestep.launcher.diagnosis.stacks import Stacks, Thread, parse_faulthandler, parse_spy

SECONDS = 8.0  # for all processes of a run together, which are looked at at once
_SIGNAL_SECONDS = 2.0


def take(pids: Sequence[int], seconds: float = SECONDS) -> dict[int, Stacks]:
    """Stacks of these processes and the Python processes they started, all at once; never raises for a dead one."""
    parents = dict.fromkeys(pids, 0) | {child: pid for pid in pids for child in _children(pid)}
    found = _spied(parents, seconds)
    for pid in [pid for pid in pids if not found[pid].threads]:
        told = _told_by_itself(pid)
        found[pid] = Stacks(pid, told, "" if told else found[pid].problem)
    return found


def _children(pid: int) -> list[int]:
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child.pid for child in children if _is_python(child)]


def _is_python(process: psutil.Process) -> bool:
    try:
        return "python" in Path(process.exe()).name
    except (psutil.Error, OSError):
        return False


def _spied(parents: Mapping[int, int], seconds: float) -> dict[int, Stacks]:
    program = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if program is None:
        return {pid: Stacks(pid, problem="py-spy is not installed", parent=parent) for pid, parent in parents.items()}
    end = time.monotonic() + seconds
    # a stopped process can't be paused once more, and native frames need that
    first = {pid: _start(program, pid, "--nonblocking" if is_stopped(pid) else "--native") for pid in parents}
    found = {pid: _answer(first[pid], pid, parents[pid], end) for pid in parents}
    again = {pid: _start(program, pid, "--nonblocking") for pid, stacks in found.items() if not stacks.threads}
    return found | {pid: _answer(spy, pid, parents[pid], end + 1) for pid, spy in again.items()}


def _start(program: str, pid: int, how: str) -> subprocess.Popen[bytes]:
    words = [program, "dump", "--json", how, "--pid", str(pid)]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _answer(spy: subprocess.Popen[bytes], pid: int, parent: int, end: float) -> Stacks:
    with spy:
        try:
            out, err = spy.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            spy.kill()
            return Stacks(pid, problem="py-spy took too long", parent=parent)
    try:
        return Stacks(pid, parse_spy(out), parent=parent)
    except ValueError:
        said = [line.strip() for line in err.decode(errors="replace").splitlines() if line.strip()]
        reason = next((line for line in said if line.startswith(("Reason:", "Error:"))), "no answer")
        return Stacks(pid, problem=f"py-spy: {reason}", parent=parent)


def is_stopped(pid: int) -> bool:
    """Whether somebody sent it SIGSTOP."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False


def _told_by_itself(pid: int, now: Callable[[], float] = time.monotonic) -> tuple[Thread, ...]:
    """Ask with SIGUSR2, where it is known that the process has an ear for it."""
    file = _stacks_file(pid)
    if file is None or not _catches(pid, signal.SIGUSR2):
        return ()
    try:
        before = file.stat().st_size
        os.kill(pid, signal.SIGUSR2)
        end, size = now() + _SIGNAL_SECONDS, -1
        while now() < end and (size != file.stat().st_size or size == before):
            size = file.stat().st_size
            time.sleep(0.05)
        return parse_faulthandler(file.read_bytes()[before:].decode(errors="replace"))
    except OSError:
        return ()


def _stacks_file(pid: int) -> Path | None:
    try:
        return next(
            (fd for fd in Path(f"/proc/{pid}/fd").iterdir() if str(fd.readlink()).startswith(f"/memfd:{STACKS_FILE}")),
            None,
        )
    except OSError:
        return None


def _catches(pid: int, signum: signal.Signals) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (signum - 1) & 1)
