"""Run a script or module as the interpreter would, in a process that was something else before, and leave.

Taking a forked interpreter apart copies all its pages (0.4 s and more), so the process ends after threads, exit
handlers and flushed streams: what comes after them tells nobody anything.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import runpy
import signal
import sys
import threading
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import NoReturn


class _ScriptLoader(SourceFileLoader):
    """Neither reads nor leaves bytecode: a script's is not cached."""

    def get_code(self, fullname: str) -> CodeType:
        """Compiled now."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def run_and_leave(target: str, arguments: list[str], *, is_module: bool) -> NoReturn:
    """`python target arguments…`, or with `-m`."""
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    sys.argv = [target, *arguments]
    sys.orig_argv = [sys.executable, *(["-m"] if is_module else []), target, *arguments]
    sys.path.insert(0, str(Path.cwd()) if is_module else str(Path(target).resolve().parent))
    code = 1
    try:
        if is_module:
            runpy._run_module_as_main(target)  # type: ignore[attr-defined]  # what python -m calls
        else:
            _run_script(target, main)
        code = 0
    except SystemExit as leaving:
        code = _status(leaving)
    except BaseException as error:  # noqa: BLE001 (as the interpreter does)
        trace = _without_ours(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    _leave(code)


def _run_script(target: str, main: ModuleType) -> None:
    path = str(Path.cwd() / target)
    loader = _ScriptLoader("__main__", path)
    main.__file__, main.__loader__ = path, loader
    loader.exec_module(main)


def _status(leaving: SystemExit) -> int:
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or 0
    sys.stderr.write(f"{leaving.code}\n")
    return 1


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    """A traceback that begins in the script: not with this file, nor with the import system's and runpy's frames."""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__ and not file.startswith("<frozen "):
            return trace
        trace = trace.tb_next
    return None


def _leave(code: int) -> NoReturn:
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()  # prints what a handler raises
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    ctypes.CDLL(None).fflush(None)  # what native code has printed
    os._exit(code & 0xFF)
