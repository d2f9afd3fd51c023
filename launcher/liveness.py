"""No process of a run outlives its launcher: the kernel ends it, whatever it is doing.

The launcher alone holds the write end of a pipe and never writes. Every rank owns a read end that has the kernel send
SIGKILL to the rank's process group once the last writer is gone (O_ASYNC, F_SETSIG). That needs no thread, no
interpreter lock and nothing of the program that runs there; processes that the rank started die with it, unless they
left its group. The parent-death signal is the second layer, for a program that closes descriptors it does not know.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping

import psutil

from samestep.launcher.contract import ENV_LAUNCHED

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PTRACER = 0x59616D61  # of the Yama security module; without it the kernel says no, and nobody minds
prctl: Callable[..., int] | None = None
_followed: list[int] = []
_OF_RANK = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_ERROR_FILE", "RANK", "MASTER_PORT")
_MOST_BETWEEN = 16
if sys.platform == "linux":
    with contextlib.suppress(OSError, AttributeError):
        prctl = ctypes.CDLL(None).prctl  # looked up here: after fork, a child should do as little as it can


def adopt_orphans() -> bool:
    """Make processes that lose their parent below us our children; False where the system can't."""
    return prctl is not None and prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def end_with(parent: int) -> None:
    """In a child that `parent` forked itself: have the kernel end it with its parent, where it can."""
    if prctl is None or os.getppid() != parent:  # a fork server's child has another one
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def end_with_agent(environ: Mapping[str, str]) -> None:
    """In a rank that torchrun or `accelerate launch` started: end it when that launcher ends, which kills none itself.

    Or when a process between the two ends, such as the shell of `--no-python`. Not by the parent-death signal: it comes
    when the parent's thread ends, and any thread of a program may start ranks.
    """
    if not environ.get("TORCHELASTIC_RUN_ID") or environ.get(ENV_LAUNCHED) or _followed:
        return
    for parent in _up_to_agent(environ):
        with contextlib.suppress(OSError, AttributeError):  # no pidfd here: the rank lives on, as ever
            _followed.append(os.pidfd_open(parent))
    if _followed:
        threading.Thread(target=_end_with, args=(tuple(_followed),), name="agent", daemon=True).start()


def _up_to_agent(environ: Mapping[str, str]) -> list[int]:
    """Our parents, nearest first, up to the one that has not been given what the agent gives to this rank alone."""
    above = [os.getppid()]
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process().parent()
        while parent is not None and len(above) < _MOST_BETWEEN:
            theirs = parent.environ()
            if any(theirs.get(name) != environ.get(name) for name in _OF_RANK):
                break
            parent = parent.parent()
            above += [] if parent is None else [parent.pid]
    return above


def _end_with(pidfds: Iterable[int]) -> None:
    ended = select.poll()
    for pidfd in pidfds:
        ended.register(pidfd, select.POLLIN)
    ended.poll()
    os.kill(os.getpid(), signal.SIGKILL)


def die_with(parent: int, pipe: int) -> None:
    """In a child that leads its own process group: end it with its `parent`, who writes to `pipe`.

    The pipe is opened anew under its number, because owner and signal belong to the open description, which all ranks
    would share. Ends the process here if the parent is gone already.
    """
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(_PR_SET_PTRACER, parent, 0, 0, 0)  # what it starts may read our stacks, where only a debugger's child may
    if hasattr(fcntl, "F_SETSIG"):
        own = os.open(f"/proc/self/fd/{pipe}", os.O_RDONLY | os.O_NONBLOCK)
        os.dup2(own, pipe, inheritable=True)
        os.close(own)
        fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    watch = select.poll()
    watch.register(pipe, 0)
    if os.getppid() != parent or watch.poll(0):  # it died before the lines above
        os._exit(1)
