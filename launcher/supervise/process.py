"""The life of one rank: start, SIGTERM, SIGKILL with everything it started, status."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO

import psutil

from samestep.launcher.plan import Command
from samestep.launcher.supervise.signals import OPERATOR

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_prctl: Callable[..., int] | None = None
if sys.platform == "linux":
    with contextlib.suppress(OSError, AttributeError):
        _prctl = ctypes.CDLL(None).prctl  # looked up here: after fork, a child should do as little as it can


def adopt_orphans() -> None:
    """Make processes that lose their parent below us our children, so that none escapes `sweep`."""
    if _prctl is not None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def sweep(seconds: float = 1.0) -> None:
    """Kill and reap every process below us: only ranks ever start any, and no rank is left."""
    left = psutil.Process().children(recursive=True)
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
    """One rank as a process, leader of its own session and process group."""

    def __init__(self, command: Command, environ: Mapping[str, str]) -> None:
        """Start it.

        Raises:
            OSError: the program can't be executed.
        """
        self.command = command
        self.signalled = False  # we asked it to end: its status tells nothing about why
        self.ended_ns = 0  # wall clock, comparable with the time in an error record
        self.returncode: int | None = None
        launcher = os.getpid()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, OPERATOR)
        try:
            self._popen = subprocess.Popen(
                command.argv,
                env=command.environment(environ),
                stdin=None if command.rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=command.pass_fds,
                start_new_session=True,
                # safe: this process has one thread, and what runs in the child is a handful of system calls
                preexec_fn=lambda: _before_exec(launcher, blocked),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self.stdout, self.stderr = _pipe(self._popen.stdout), _pipe(self._popen.stderr)
        self.pid = self._popen.pid

    def collect(self) -> bool:
        """Take the status if the process has ended, and end what it left in its process group."""
        if self.returncode is not None:
            return True
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self.ended_ns = time.time_ns()
        # before the status is taken: until then the number can't belong to another group
        self._signal_group(signal.SIGKILL)
        self.returncode = self._popen.wait()
        return True

    def terminate(self) -> None:
        """SIGTERM to the rank alone: its data loading processes must outlive it while it saves."""
        if self.returncode is None:
            self.signalled = True
            if self.command.signal_group:
                self._signal_group(signal.SIGTERM)
            else:
                os.kill(self.pid, signal.SIGTERM)

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
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()

    def _signal_group(self, signum: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; macOS says EPERM for a zombie group
            os.killpg(self.pid, signum)


def _before_exec(launcher: int, mask: set[int | signal.Signals]) -> None:
    """Runs in the child between fork and exec."""
    signal.set_wakeup_fd(-1)  # shared with the launcher until exec
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it died before the line above
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _pipe(file: IO[bytes] | None) -> int:
    assert file is not None
    fd = os.dup(file.fileno())
    file.close()
    os.set_blocking(fd, False)
    return fd
