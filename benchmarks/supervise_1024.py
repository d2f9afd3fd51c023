"""What supervision costs as ranks grow: `samestep run` over ranks that only sleep, watched from outside.

    python benchmarks/supervise_1024.py [RANKS ...]      16 64 256 1024 if none are given

Every rank is a real process with its own pipes, log and session. Per number of ranks one JSON line, medians of three:
seconds until all are started; share of one core that the launcher uses while nothing happens; and once one rank is
killed, milliseconds until the first other rank has ended (noticed and decided), until the last has (handled), and until
the launcher has left.
A quiet machine is needed; goals: at 1024 ranks at most 1 % of a core, and 100 ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

IDLE_SECONDS = 10.0
START_SECONDS = 300.0
ROUNDS = 3


@contextlib.contextmanager
def launched(ranks: int, folder: Path) -> Iterator[tuple[psutil.Process, list[psutil.Process], float]]:
    """A launcher whose ranks all sleep, those ranks, and the seconds that it took."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "samestep.launcher", "run", "--quiet", "--max-restarts", "0"]
    command += ["--nproc-per-node", str(ranks), "--no-python", "sleep", "3600"]
    environ = os.environ | {"SAMESTEP_RUN_DIR": str(folder)}
    with subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as popen:
        launcher = psutil.Process(popen.pid)
        try:
            asleep: list[psutil.Process] = []
            while len(asleep) < ranks:
                if popen.poll() is not None or time.perf_counter() - began > START_SECONDS:
                    raise RuntimeError(f"{len(asleep)} of {ranks} ranks started")
                time.sleep(0.05)
                asleep = [child for child in launcher.children() if _sleeps(child)]
            yield launcher, asleep, time.perf_counter() - began
        finally:
            popen.kill()


def _sleeps(process: psutil.Process) -> bool:
    try:
        return process.name() == "sleep"
    except psutil.NoSuchProcess:
        return False


def idle_share(launcher: psutil.Process) -> float:
    """CPU seconds a second."""
    before, began = launcher.cpu_times(), time.perf_counter()
    time.sleep(IDLE_SECONDS)
    after, took = launcher.cpu_times(), time.perf_counter() - began
    return (after.user + after.system - before.user - before.system) / took


def failure(launcher: psutil.Process, ranks: list[psutil.Process]) -> dict[str, float]:
    """Kill one rank in the middle, and see when the others and the launcher end, in milliseconds."""
    victim, *others = sorted(ranks, key=lambda process: process.pid != ranks[len(ranks) // 2].pid)
    watched = {os.pidfd_open(process.pid): process.pid for process in (*others, launcher)}
    poll, ends = select.poll(), dict[int, float]()
    for pidfd in watched:
        poll.register(pidfd, select.POLLIN)
    began = time.perf_counter()
    os.kill(victim.pid, signal.SIGKILL)
    while len(ends) < len(watched):
        for pidfd, _ in poll.poll(60_000):
            ends[watched[pidfd]] = 1000 * (time.perf_counter() - began)
            poll.unregister(pidfd)
            os.close(pidfd)
    gone = ends.pop(launcher.pid)
    return {"noticed_ms": min(ends.values()), "handled_ms": max(ends.values()), "launcher_gone_ms": gone}


def measure(ranks: int) -> dict[str, float]:
    """Median of some rounds."""
    found: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder, launched(ranks, Path(folder) / "run") as (launcher, asleep, took):
            share = idle_share(launcher)
            found.append({"start_s": took, "idle_core_percent": 100 * share} | failure(launcher, asleep))
    return {name: round(sorted(row[name] for row in found)[ROUNDS // 2], 3) for name in found[0]}


def main() -> None:
    for ranks in [int(word) for word in sys.argv[1:]] or [16, 64, 256, 1024]:
        print(json.dumps({"ranks": ranks} | measure(ranks)), flush=True)


if __name__ == "__main__":
    main()
