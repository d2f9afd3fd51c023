"""Run the launcher as a user does: as a program, in an empty directory, with deadlines instead of sleeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from samestep.launcher.report.history import History, fold

WORKERS = Path(__file__).resolve().parent.parent / "workers"
DEADLINE = 30.0

Event = dict[str, Any]


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


PHASES = ("data", "forward", "backward", "sync", "optimizer")


def step_event(step: int, *, at: float | None = None, loss: float | None = 0.5, ranks: int = 2, **more: Any) -> Event:
    """One optimizer step as a run writes it: 64 samples in 20 ms, rank 1 the slowest in backward."""
    seconds = {phase: {"mean": 0.002 * n, "max": 0.002 * n, "slowest_rank": 0} for n, phase in enumerate(PHASES)}
    seconds["backward"] |= {"max": 0.006, "slowest_rank": ranks - 1}
    return {
        "event": "step",
        "time": 1000.0 + step / 10 if at is None else at,
        "step": step,
        "epoch": 1 + (step - 1) // 50,
        "loss": loss,
        "loss_hex": float("nan" if loss is None else loss).hex(),
        "samples": 64,
        "samples_per_s": 3200.0,
        "seconds": seconds,
        **more,
    }


def run_events(steps: int = 100, *, crash_after: int | None = None, ranks: int = 2, finish: bool = True) -> list[Event]:
    """The events of a whole run, with a failure and a restart if asked for."""
    rank_infos = [{"rank": n, "local_rank": n, "host": "here", "pid": 100 + n} for n in range(ranks)]
    started: Event = {"generation": 0, "world_size": ranks, "shards": 4, "ranks": rank_infos}
    events: list[Event] = [{"event": "run_started", "time": 1000.0, **started}]
    for step in range(1, steps + 1):
        loads: Event = {}
        if step % 10 == 0:
            memory = {"host": [(300 + step + n) << 20 for n in range(ranks)], "device": [0] * ranks}
            loads = {
                "rank_seconds": {p: [0.001 * (n + 1)] * ranks for n, p in enumerate((*PHASES, "between"))},
                "memory": memory,
            }
        events.append(step_event(step, loss=2.0 / step, ranks=ranks, **loads))
        now = 1000.0 + step / 10
        if step % 25 == 0:
            events.append({"event": "eval", "time": now, "step": step, "metrics": {"loss": 1 / step, "accuracy": 0.9}})
            events.append({"event": "checkpoint", "time": now, "step": step, "path": "p", "seconds": 0.1})
        if step == crash_after:
            failed = {"rank": 1, "step": step, "phase": "backward", "cause": "killed by SIGKILL (signal 9)"}
            events.append({"event": "worker_failed", "time": now, "exit_code": 1, **failed})
            events.append({"event": "restarted", "time": now, **started, "generation": 1})
            events.append({"event": "resumed", "time": now, "step": step, "epoch": 1, "checkpoint": "step-1"})
    if finish:
        end = {"digest": "ab" * 32, "steps": steps, "restarts": int(crash_after is not None), "goodput": 0.75}
        events.append({"event": "run_finished", "time": 1000.0 + steps / 10, **end})
    return events


def write_run(path: Path, events: list[Event], config: Event | None = None) -> Path:
    """A run directory as a run leaves it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    options = {"epochs": 2, "seed": 0} | (config or {})
    (path / "config.json").write_text(
        json.dumps({"config": options, "total_steps": 100, "environment": {"torch": "2"}})
    )
    return path


def history_of(events: Iterable[Event], name: str = "run") -> History:
    """What the report makes of events, without a run directory."""
    return fold(name, {}, (json.dumps(event).encode() for event in events))


@pytest.fixture(scope="session")
def made() -> SimpleNamespace:
    """Ways to make events, what a report has read, and run directories, without a run."""
    return SimpleNamespace(step=step_event, events=run_events, history=history_of, run=write_run)
