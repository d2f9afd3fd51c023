"""The life of one rank: start, a request to end, SIGKILL with everything it started, status."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO

import psutil

from samestep.launcher.liveness import die_with
from samestep.launcher.plan import Command
from samestep.launcher.supervise.events import Stream
from samestep.launcher.supervise.signals import OPERATOR

_GONE_SECONDS = 10.0
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # getrusage(2): macOS counts bytes


def below_us() -> frozenset[psutil.Process]:
    """Our children, and theirs; each is told by its start time from one that gets its number later."""
    return frozenset(psutil.Process().children(recursive=True))


def sweep(keep: int | None = None, inherited: frozenset[psutil.Process] = frozenset(), seconds: float = 1.0) -> None:
    """Kill and reap every process below us but `keep`: only ranks ever start any, and no rank is left.

    `inherited` were there before the first rank, and are spared with what they start: a shell has started them, and
    then became us by exec.
    """
    spared = {keep}
    for process in inherited:
        with contextlib.suppress(psutil.NoSuchProcess):
            spared |= {process.pid, *(child.pid for child in process.children(recursive=True))}
    left = [process for process in below_us() if process.pid not in spared]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=seconds)


def reap_adopted() -> None:
    """Collect the status of adopted processes that have ended; the living ones stay."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


class Worker:
    """One rank as a process, leader of its own session and process group, and a child of ours however it started."""

    def __init__(self, command: Command, pid: int, pipes: Mapping[Stream, int]) -> None:
        self.command = command
        self.pid = pid
        self.pipes = pipes  # read ends, which do not block
        self.signalled = False  # we asked it to end: its status tells nothing about why
        self.ended_ns = 0  # wall clock, comparable with the time in an error record
        self.returncode: int | None = None
        self.peak_bytes = 0

    def collect(self) -> bool:
        """Take the status if the process has ended, and end what it left in its process group."""
        if self.returncode is not None:
            return True
        if not _has_ended(self.pid):
            return False
        self.ended_ns = time.time_ns()
        # before the status is taken: until then the number can't belong to another group
        self._signal_group(signal.SIGKILL)
        _, status, used = os.wait4(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)
        self.peak_bytes = used.ru_maxrss * _MAXRSS_UNIT
        return True

    def terminate(self, signum: signal.Signals = signal.SIGTERM) -> None:
        """A signal to the rank alone: its data loading processes must outlive it while it saves."""
        if self.returncode is None:
            self.signalled = True
            if self.command.signal_group:
                self._signal_group(signum)
            else:
                os.kill(self.pid, signum)

    def kill(self) -> None:
        """SIGKILL to the rank and everything that it started."""
        if self.returncode is not None:
            return
        self.signalled = True
        try:
            children = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        self._signal_group(signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # a rank that was forked this moment leads no group yet
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()

    def _signal_group(self, signum: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; macOS says EPERM for a zombie group
            os.killpg(self.pid, signum)


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; its status stays to be taken. On macOS Python has no waitid before 3.13."""
    if hasattr(os, "waitid"):
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


class Program(Worker):
    """A rank that is a program of its own."""

    def __init__(self, command: Command, environ: Mapping[str, str], liveness: int) -> None:
        """Start it; `liveness` is the read end of the pipe whose writer is this process.

        Raises:
            OSError: the program can't be executed.
        """
        self._popen = start_in_session(
            command.argv,
            command.environment(environ),
            liveness,
            stdin=None if command.reads_stdin else subprocess.DEVNULL,
            stdout=None if command.has_terminal else subprocess.PIPE,
            stderr=None if command.has_terminal else subprocess.PIPE,
            pass_fds=command.pass_fds,
        )
        streams: dict[Stream, IO[bytes] | None] = {"stdout": self._popen.stdout, "stderr": self._popen.stderr}
        pipes = {stream: _pipe(file) for stream, file in streams.items() if file is not None}
        super().__init__(command, self._popen.pid, pipes)

    def collect(self) -> bool:
        """As for any worker; Popen is told, or it would look for a status that is gone."""
        ended = super().collect()
        self._popen.returncode = self.returncode
        return ended


def start_in_session(
    argv: Sequence[str],
    env: Mapping[str, str],
    liveness: int,
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    pass_fds: tuple[int, ...] = (),
) -> subprocess.Popen[bytes]:
    """Start a program as leader of a session that dies with this process.

    Raises:
        OSError: it can't be executed.
    """
    launcher = os.getpid()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, OPERATOR)
    try:
        return subprocess.Popen(
            argv,
            env=env,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            bufsize=0,
            pass_fds=(*pass_fds, liveness),
            start_new_session=True,
            # safe: this process has one thread, and what runs in the child is a handful of system calls
            preexec_fn=lambda: _before_exec(launcher, liveness, blocked),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def end(launcher: subprocess.Popen[bytes]) -> None:
    """Kill a launcher that was started so, and wait until nothing below it lives."""
    below = []
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(launcher.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        launcher.kill()
    launcher.wait()
    psutil.wait_procs(below, timeout=_GONE_SECONDS)


def _before_exec(launcher: int, liveness: int, mask: set[int | signal.Signals]) -> None:
    """Runs in the child between fork and exec."""
    signal.set_wakeup_fd(-1)  # shared with the launcher until exec
    die_with(launcher, liveness)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _pipe(file: IO[bytes]) -> int:
    fd = os.dup(file.fileno())
    file.close()
    os.set_blocking(fd, False)
    return fd
