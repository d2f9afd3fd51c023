"""The launcher's end of a process that forks ranks; its other end is samestep.train.fork_server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

from samestep.launcher.command_line.argv import Kind
from samestep.launcher.contract import HANDED_DOWN
from samestep.launcher.plan import Command
from samestep.launcher.supervise.events import Stream
from samestep.launcher.supervise.process import Worker, start_in_session

_ANSWER_SECONDS = 10.0
# Taken from the path first: a file in the working directory must not pass for a module of the standard library.
# Imports make no garbage worth a fifth of their time. Looking for a folder for temporary files writes one there, which
# would stay if the server were killed in that moment.
_IMPORTS = "import gc, sys; gc.disable(); sys.path.pop(0); import tempfile; tempfile.tempdir = sys.argv[2]"
_PROGRAM = f"{_IMPORTS}; from samestep.train.fork_server import main; main(int(sys.argv[1]))"
# torch and numpy hold one thread only if they are told so before they load; CUDA must not be touched before a fork
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


class NoForkError(Exception):
    """This rank has to be a program of its own; the text says why."""


class ForkServer:
    """Starts at once, is ready a second or two later."""

    def __init__(self, python: str, environ: Mapping[str, str], liveness: int) -> None:
        """Start it.

        Raises:
            OSError: `python` can't be executed.
        """
        self._liveness = liveness
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(_ANSWER_SECONDS)
        self._ready = False
        with theirs:
            self._popen = start_in_session(
                (python, "-c", _PROGRAM, str(theirs.fileno()), tempfile.gettempdir()),
                dict(environ) | _ENVIRONMENT,
                liveness,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        self.pid = self._popen.pid

    def fileno(self) -> int:
        """Readable when it is ready, or has ended."""
        return self._socket.fileno()

    @property
    def lives(self) -> bool:
        """Whether it is ready, or may still become so."""
        return self._popen.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether it has said so and still lives."""
        return self._ready and self.lives

    def greet(self) -> bool:
        """Take its first words; False if it has ended instead."""
        self._ready = "ready" in self._read()
        return self._ready

    def fork(self, command: Command, environ: Mapping[str, str]) -> Worker:
        """Start a rank.

        Raises:
            NoForkError: it refuses, or has ended.
        """
        recipe = command.recipe
        assert recipe is not None
        pipes, theirs = _streams(command)
        env = command.environment(environ)
        handed_down = [name for name in HANDED_DOWN if name in env]
        request = {
            "target": recipe.target,
            "arguments": recipe.arguments,
            "is_module": recipe.kind is Kind.MODULE,
            "env": env,
            "fds": handed_down,
            "stdin": command.reads_stdin,
            "launcher": os.getpid(),
        }
        try:
            answer = self._ask(request, [*theirs, self._liveness, *(int(env[name]) for name in handed_down)])
        finally:
            for fd in theirs:
                os.close(fd)
        if "pid" not in answer:
            for fd in pipes.values():
                os.close(fd)
            if "refused" not in answer:
                self._give_up()
            raise NoForkError(answer.get("refused", "the fork server has ended, or does not answer"))
        return Worker(command, answer["pid"], pipes)

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._abandon()

    def _give_up(self) -> None:
        """Have it fork nobody any more: an answer that comes late would be taken for that to the next request."""
        self._abandon()
        self._socket.setblocking(False)
        late = self._read().get("pid")  # it may have answered in the last moment
        if late is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(late, signal.SIGKILL)

    def _abandon(self) -> None:
        self._ready = False
        if self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._popen.wait()

    def _ask(self, request: Mapping[str, Any], fds: list[int]) -> dict[str, Any]:
        data = json.dumps(request).encode() + b"\n"
        try:
            sent = socket.send_fds(self._socket, [data], fds)
            self._socket.sendall(data[sent:])
        except OSError:
            return {}
        return self._read()

    def _read(self) -> dict[str, Any]:
        data = b""
        try:
            while not data.endswith(b"\n"):
                part = self._socket.recv(4096)
                if not part:
                    return {}
                data += part
        except OSError:
            return {}
        answer: dict[str, Any] = json.loads(data)
        return answer


def _streams(command: Command) -> tuple[dict[Stream, int], tuple[int, int]]:
    """Our ends of a rank's output, which do not block, and what it gets as stdout and stderr."""
    if command.has_terminal:
        return {}, (os.dup(1), os.dup(2))
    (out, their_out), (err, their_err) = os.pipe(), os.pipe()
    os.set_blocking(out, False)
    os.set_blocking(err, False)
    return {"stdout": out, "stderr": err}, (their_out, their_err)
