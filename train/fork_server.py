"""A process that has imported torch once and forks ranks for the launcher, at the start and at every restart.

It holds one thread, runs no tensor operation and touches no CUDA, so what it forks can do all of that. A rank is
forked by a process in between that ends at once: the launcher, a subreaper, becomes the rank's parent and sees its end
as that of any child. Requests and answers are JSON lines; a rank's pipes and sockets come with the request.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import samestep.train.entry  # noqa: F401 (all that a recipe needs)
from samestep.launcher.command_line import options
from samestep.launcher.liveness import die_with
from samestep.train.as_main import run_and_leave
from samestep.train.config import TrainConfig

_MOST_FDS = 8


@dataclass(frozen=True, slots=True)
class _Rank:
    """A request, in the process that is to become the rank."""

    job: dict[str, Any]
    fds: list[int]


def main(descriptor: int) -> None:
    """Serve on a socket until the launcher closes it; in a rank, run the recipe and never return."""
    options.load(TrainConfig, [], {})  # what every rank does first, so that it finds modules and caches filled
    own = set(sys.modules)
    gc.freeze()  # a rank that collects would copy all pages
    gc.enable()
    with socket.socket(fileno=descriptor) as launcher:
        _answer(launcher, {"ready": os.getpid()})
        rank = _serve(launcher, own)
    if rank is not None:
        _become(rank)
        job = rank.job
        run_and_leave(job["target"], job["arguments"], is_module=job["is_module"])


def _serve(launcher: socket.socket, own: Collection[str]) -> _Rank | None:
    for job, fds in _requests(launcher):
        problem = _unfit(job, own)
        if problem:
            _answer(launcher, {"refused": problem})
        else:
            try:
                pid, gate = _fork()
            except OSError as error:
                _answer(launcher, {"refused": str(error)})
            else:
                if pid == 0:
                    return _Rank(job, fds)
                _answer(launcher, {"pid": pid})
                with contextlib.suppress(BrokenPipeError):  # it was killed already
                    os.write(gate, b"go")
                os.close(gate)
        for fd in fds:
            os.close(fd)
    return None


def _requests(launcher: socket.socket) -> Iterator[tuple[dict[str, Any], list[int]]]:
    buffer, fds = b"", list[int]()
    while True:
        data, received, _, _ = socket.recv_fds(launcher, 1 << 16, _MOST_FDS)
        if not data:
            return
        buffer, fds = buffer + data, fds + received
        if buffer.endswith(b"\n"):  # the launcher waits for an answer before it asks again
            yield json.loads(buffer), fds
            buffer, fds = b"", []


def _answer(launcher: socket.socket, answer: dict[str, Any]) -> None:
    launcher.sendall(json.dumps(answer).encode() + b"\n")


def _unfit(job: dict[str, Any], own: Collection[str]) -> str:
    """Why this rank must be a program of its own, or an empty string."""
    threads = psutil.Process().num_threads()
    if threads != 1:
        return f"the fork server has {threads} threads"
    if not job["is_module"] and not _is_text(Path(job["target"])):
        return f"{job['target']} is compiled or an archive, which python itself runs"
    folder = Path.cwd() if job["is_module"] else Path(job["target"]).resolve().parent
    hidden = shadowed([path.name for path in folder.iterdir()], own) if folder.is_dir() else ""
    return f"{hidden} in the recipe's folder has the name of a module that is imported already" if hidden else ""


def _is_text(path: Path) -> bool:
    try:
        return b"\0" not in path.read_bytes()
    except OSError:
        return True  # the rank will say what is wrong with it


def shadowed(names: Collection[str], modules: Collection[str]) -> str:
    """The first file or package among `names` that a script would import in place of one of `modules`. Pure."""
    top = {module for module in modules if "." not in module} - {"__main__", "samestep"}
    found = [name for name in sorted(names) if name.endswith(".py") and name.removesuffix(".py") in top]
    return found[0] if found else ""


def _fork() -> tuple[int, int]:
    """Fork a process whose parent is the launcher; its number, and where to write that it may begin.

    In that process zero, once this was written, and -1. A launcher that got no answer in time starts the rank in
    another way and ends this server: then nothing is written, and the process ends.

    Raises:
        OSError: the system refuses.
    """
    told, tell = os.pipe()
    go, gate = os.pipe()
    between = os.fork()
    if between == 0:
        pid = _fork_again()
        if pid:
            os.write(tell, str(pid).encode())
            os._exit(0)
        for fd in (told, tell, gate):
            os.close(fd)
        if not os.read(go, 2):
            os._exit(1)  # whose server was killed in this moment: the launcher waits for this rank
        os.close(go)
        return 0, -1
    for fd in (tell, go):
        os.close(fd)
    text = os.read(told, 32)
    os.waitpid(between, 0)
    os.close(told)
    if not text or int(text) < 0:
        os.close(gate)
        raise OSError("the system starts no further process")
    return int(text), gate


def _fork_again() -> int:
    try:
        return os.fork()
    except OSError:
        return -1


def _become(rank: _Rank) -> None:
    """Descriptors, environment and settings of a program that the launcher has started."""
    job, (out, err, pipe, *handed_down) = rank.job, rank.fds
    os.setsid()
    die_with(job["launcher"], pipe)
    for fd, standard in ((out, 1), (err, 2)):
        os.dup2(fd, standard)
        os.close(fd)
    if not job["stdin"]:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
    os.environ.clear()
    os.environ.update(job["env"])
    os.environ.update(zip(job["fds"], map(str, handed_down), strict=True))
    torch.set_num_threads(_default_threads())
    np.random.seed()  # every process begins with another state, unless it is forked


def _default_threads() -> int:
    """What torch takes when it starts with this environment."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        text = os.environ.get(name, "").partition(",")[0]
        if text.isdecimal() and int(text):
            return int(text)
    return min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
