"""Run the launcher as a user does: as a program, in an empty directory, with deadlines instead of sleeps."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

WORKERS = Path(__file__).resolve().parent.parent / "workers"
DEADLINE = 30.0


def gone(pid: int) -> bool:
    """Whether no process of that number lives; a zombie whose parent is slow is dead too."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE) -> None:
    """Return as soon as `condition` holds, fail when it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.005)


@dataclass
class Ended:
    """A launcher that has ended."""

    code: int
    out: bytes
    err: bytes
    seconds: float
    cwd: Path

    @property
    def stdout(self) -> str:
        return self.out.decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self.err.decode(errors="replace")

    def pids(self, pattern: str) -> list[int]:
        return [int(path.read_text()) for path in sorted(self.cwd.glob(pattern))]


class Launcher:
    """`samestep` in one working directory."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.started: list[subprocess.Popen[bytes]] = []

    def environ(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        ours = ("SAMESTEP_", "PET_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMP_", "PYTHONUNBUF")
        return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | (extra or {})

    def start(self, *words: str | Path, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start and return at once; ended with the test if it has not by itself."""
        process = subprocess.Popen(
            [sys.executable, "-m", "samestep.launcher", *map(str, words)],
            cwd=self.cwd,
            env=self.environ(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.started.append(process)
        return process

    def finish(self, process: subprocess.Popen[bytes], since: float) -> Ended:
        out, err = process.communicate(timeout=DEADLINE)
        return Ended(process.returncode, out, err, time.monotonic() - since, self.cwd)

    def __call__(self, *words: str | Path, env: dict[str, str] | None = None) -> Ended:
        """Run to the end."""
        since = time.monotonic()
        return self.finish(self.start(*words, env=env), since)

    def act(self, *parts: str, options: tuple[str, ...] = (), ranks: int = 2) -> Ended:
        """Run actors."""
        return self("run", "--nproc-per-node", str(ranks), *options, WORKERS / "actor.py", *parts)

    def start_acting(self, *parts: str, ranks: int = 2, options: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """Start actors, and return once those that are to wait do so."""
        process = self.start("run", "--nproc-per-node", str(ranks), *options, WORKERS / "actor.py", *parts)
        expected = sum(ranks if part.startswith("*") else 1 for part in parts if part.endswith("wait"))
        wait_until(lambda: len(list(self.cwd.glob("waiting-*.pid"))) == expected, "all actors wait")
        return process


@pytest.fixture
def samestep(tmp_path: Path) -> Iterator[Launcher]:
    """A launcher in an empty directory; whatever it started is ended with the test."""
    launcher = Launcher(tmp_path)
    yield launcher
    for process in launcher.started:
        if process.poll() is None:
            process.kill()
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()
        process.wait()
    for path in tmp_path.glob("*.pid"):  # a test that failed half-way must not leave actors behind
        _end_actor(int(path.read_text()))


def _end_actor(pid: int) -> None:
    try:
        process = psutil.Process(pid)
        if any("actor.py" in word or "time.sleep(3600)" in word for word in process.cmdline()):
            process.kill()
    except psutil.NoSuchProcess:
        pass
