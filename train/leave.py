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
import socket
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from samestep.launcher.contract import ErrorRecord, ExitCode, RefusedStepError, RunDir, UsageError

_BROKEN_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
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


def is_consequence(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    text = str(error)
    network = isinstance(error, dist.DistNetworkError | dist.DistBackendError | dist.DistStoreError)
    return network or (isinstance(error, RuntimeError) and any(phrase in text for phrase in _BROKEN_CONNECTION))


def error_record(error: BaseException, rank: int, generation: int, step: int, phase: str) -> ErrorRecord:
    """What the launcher reads to find the culprit."""
    usage, refused = isinstance(error, UsageError), isinstance(error, RefusedStepError)
    return ErrorRecord(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        generation=generation,
        step=step,
        phase=phase,
        kind=type(error).__name__,
        message=error.message if isinstance(error, UsageError) else str(error),
        frame=_user_frame(error),
        traceback="".join(traceback.format_exception(error)),
        exit_code=int(error.exit_code) if isinstance(error, UsageError) else int(ExitCode.FAILED),
        time_ns=time.time_ns(),
        consequence=error.consequence if isinstance(error, RefusedStepError) else not usage and is_consequence(error),
        hint=error.hint if isinstance(error, UsageError) else "",
        final=refused,
    )


def _user_frame(error: BaseException) -> str:
    """Innermost frame that is neither ours nor a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    others = (str(Path(__file__).parent) + os.sep, sysconfig.get_path("stdlib") + os.sep, "<")
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(others)]
    if not own:
        return ""
    frame = own[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}"


def write_record(record: ErrorRecord, run_dir: RunDir) -> None:
    """Leave the record where the launcher looks; a full disk must not hide the error itself."""
    try:
        run_dir.errors.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = run_dir.error(record.rank).with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(record.to_json())
        temporary.rename(run_dir.error(record.rank))
    except OSError as problem:
        print(f"warning: no error record in {run_dir.errors}: {problem}", file=sys.stderr)


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
