"""How a worker ends: which record it leaves, what it prints, and that it really ends, with its own exit status.

While the interpreter finalises, a thread of the process group that wants the interpreter lock (to drop a tensor) is
ended by CPython in a way that C++ answers with std::terminate: "terminate called without an active exception", status
134. Destroying the group instead can deadlock: its destructor joins such a thread. So group and DDP objects are kept
for ever, a thread that is to be terminated sleeps, and glibc's `on_exit` ends the process right after Python ran exit
handlers and flushed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.utils.data._utils import signal_handling

from samestep.launcher.contract import (
    ENV_LAUNCHED,
    EXIT_MEANING,
    ErrorRecord,
    ExitCode,
    RefusedStepError,
    RunDir,
    UsageError,
    WorkerEnv,
)
from samestep.launcher.lock import SupersededError
from samestep.train import elastic_error, program
from samestep.train.cause import cause_of

_BROKEN_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
_DOCUMENTED = frozenset(ExitCode) - {ExitCode.DONE, ExitCode.FAILED}
_BEFORE_TRAINING = frozenset({"joining", "build"})
_LOADER_DIED = re.compile(r"DataLoader worker \(pid \d+\) ")  # with the signal or status, which torch then leaves out
_LOADER_LOOKS, _LOADER_PAUSE = 10, 0.02
_LATE = "it hangs or is slow before it calls train(): see its log; --join-timeout waits longer"
_immortal: list[Any] = []


def end_hard(*keep: object) -> None:
    """Keep `keep` alive for ever, and make the end of this process independent of threads that still run."""
    if not _immortal:
        _sleep_instead_of_terminate()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "on_exit"):
            libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)
    group = [dist.group.WORLD] if dist.is_initialized() else []
    for thing in (*keep, *group):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
        _immortal.append(thing)


def _sleep_instead_of_terminate() -> None:
    """std::set_terminate(pause), at the last moment: until then a terminate is a real error and has to be seen."""
    with contextlib.suppress(OSError, AttributeError):
        cxx = ctypes.CDLL("libstdc++.so.6")
        set_terminate, pause = cxx._ZSt13set_terminatePFvvE, ctypes.CDLL(None).pause
        atexit.register(lambda: set_terminate(ctypes.cast(pause, ctypes.c_void_p)))


@contextlib.contextmanager
def nondeterminism_named() -> Iterator[None]:
    """Turn torch's refusal of a kernel that has no deterministic form into a usage error.

    Raises:
        UsageError: in its place.
    """
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise UsageError(
            f"every kernel is expected to be deterministic, but {operation} has no deterministic form here",
            "replace the operation, or accept other bits in each run with --allow-nondeterministic",
        ) from error


@contextlib.contextmanager
def deaths_of_children_unheard() -> Iterator[None]:
    """No death of a data loading process interrupts: torch's SIGCHLD handler raises wherever the rank happens to be.

    End those that are left before it is over.
    """
    here = threading.current_thread() is threading.main_thread()  # where handlers run
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if here else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGCHLD, before)


def loader_death(error: BaseException) -> BaseException:
    """The death of a data loading process where `error` is only what the rank saw of it; else `error` itself.

    To be called where `deaths_of_children_unheard`.
    """
    before = error.__cause__ or error.__context__
    if before is not None and _LOADER_DIED.match(str(before)):
        return before.with_traceback(error.__traceback__)
    looks = _LOADER_LOOKS if isinstance(error, ConnectionError | EOFError) else 1
    for look in range(looks):
        try:
            signal_handling._error_if_any_worker_fails()
        except RuntimeError as death:
            return death.with_traceback(error.__traceback__)
        if look + 1 < looks:
            time.sleep(_LOADER_PAUSE)  # its sockets close a moment before it has ended
    return error


def is_consequence(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    text = str(error)
    network = isinstance(error, dist.DistNetworkError | dist.DistBackendError | dist.DistStoreError)
    return network or (isinstance(error, RuntimeError) and any(phrase in text for phrase in _BROKEN_CONNECTION))


def error_record(
    error: BaseException, rank: int, generation: int, step: int, phase: str, accused: int | None = None
) -> ErrorRecord:
    """What the launcher reads to find the culprit; `accused` is a rank that this one waited for in vain."""
    usage, refused = isinstance(error, UsageError), isinstance(error, RefusedStepError)
    cause = cause_of(error)
    return ErrorRecord(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        generation=generation,
        step=step,
        phase=phase,
        kind=cause.kind,
        message=error.message if isinstance(error, UsageError) else cause.message,
        frame=cause.frame,
        traceback="".join(traceback.format_exception(error)),
        exit_code=int(error.exit_code) if isinstance(error, UsageError) else int(ExitCode.FAILED),
        time_ns=time.time_ns(),
        consequence=error.consequence if isinstance(error, RefusedStepError) else not usage and is_consequence(error),
        hint=error.hint if isinstance(error, UsageError) else (_LATE if accused is not None else ""),
        accused=accused,
        final=refused or isinstance(error, SupersededError),  # its folder is another start's now
    )


def early_exit(leaving: SystemExit, rank: int, generation: int, step: int, phase: str) -> ErrorRecord | None:
    """What the launcher reads where a recipe ends one rank in the middle; None where the end is one of ours."""
    code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    if phase in ("joining", "closing") or code in _DOCUMENTED:
        return None
    record = error_record(leaving, rank, generation, step, phase)
    hint = "every rank must take part in every step: raise an exception, or end all ranks after the same step"
    return replace(record, message=f"left with {code} before the run was done", exit_code=code or 1, hint=hint)


def prefix(rank: int) -> str:
    """Who speaks; the launcher puts that before what it passes on."""
    return "" if rank == 0 or ENV_LAUNCHED in os.environ else f"[rank {rank}] "


def if_it_never_began(asked: BaseException, phase: str, rank: int) -> None:
    """End a call that was interrupted before training: a person changed their mind, and made no mistake.

    Once training is under way signals are noted, so there it is the recipe's own exception, as one with a text is.

    Raises:
        SystemExit: with 130.
    """
    of_signal = isinstance(asked, KeyboardInterrupt) and not asked.args
    if not of_signal or phase not in _BEFORE_TRAINING or program.in_notebook():
        return
    code = ExitCode.INTERRUPTED
    if rank == 0 and ENV_LAUNCHED not in os.environ:  # else the launcher says it
        print(f"samestep: {EXIT_MEANING[code]}; exit code {int(code)}", file=sys.stderr, flush=True)
    raise SystemExit(int(code)) from None


def is_to_tell(record: ErrorRecord, env: WorkerEnv, run_dir: RunDir) -> bool:
    """Write a mistake in usage down, and say whether this rank is the one that prints it.

    Without a run directory, which no mistake makes, there is nowhere to ask what rank zero says; below one agent all
    ranks have the same words and variables, and so the same mistake.
    """
    if not os.path.isdir(run_dir.path):  # noqa: PTH112 (which raises for a name that is too long)
        elastic_error.write(record, os.environ)
        return env.local_rank == 0 or not elastic_error.below_agent(os.environ)
    if not write_record(record, run_dir) and record.phase == "closing":
        return env.rank == 0  # where there is no room for records, nobody can ask: that late, all ranks say the same
    return env.rank == 0 or not said_by_rank_zero(record, run_dir)


def write_record(record: ErrorRecord, run_dir: RunDir) -> bool:
    """Leave the record where launchers look; a full disk must not hide the error itself. Whether it is there."""
    elastic_error.write(record, os.environ)
    temporary = run_dir.error(record.rank).with_suffix(f".tmp-{os.getpid()}")
    try:
        run_dir.errors.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text(record.to_json())
        temporary.rename(run_dir.error(record.rank))
    except OSError as problem:
        with contextlib.suppress(OSError):
            temporary.unlink()
        print(f"warning: no error record in {run_dir.errors}: {problem}", file=sys.stderr)
        return False
    return True


def said_by_rank_zero(record: ErrorRecord, run_dir: RunDir, deadline_s: float = 2.0) -> bool:
    """Whether rank zero stops for the same mistake and prints it; waits for its record a moment."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        try:
            other = json.loads(run_dir.error(0).read_text())
            if other["generation"] == record.generation and other["message"] == record.message:
                return True
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(0.02)
    return False
