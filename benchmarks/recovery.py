"""How long from the death of a rank to the next step, under samestep and under what others use.

    python benchmarks/recovery.py [--rounds 20] [--ranks 2] [--launchers samestep,torchrun,accelerate]
        [--by kill|exit] [--ignore-term]

Ends a random rank, and waits until a rank of the next start has done a step. Prints one row a launcher, as JSON: how
many restarts came back at all (of the tried ones), seconds from the rank's end until the launcher saw it (samestep
tells), until all old ranks were gone, to the next step, and where the time went. torchrun and accelerate run a
hand-written script with checkpoints and resume.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
WORKER, BIN = str(HERE / "recovery_worker.py"), Path(sys.executable).parent
LOST_SECONDS = 30.0  # a restart that takes longer is counted as one that never came back
SETTLE_STEPS = 30


@dataclass(frozen=True)
class Stamp:
    """One line of what the ranks wrote."""

    at: float
    pid: int
    rank: int
    what: str


def command(launcher: str, ranks: int, folder: Path) -> list[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    script = [WORKER, "script", str(folder)]
    restarts = "100000"
    return {
        "samestep": [
            *[str(BIN / "samestep"), "run", "--nproc-per-node", str(ranks), "--max-restarts", restarts, WORKER],
            *["recipe", "--epochs", "1000", "--checkpoint-every", "20", "--log-every", "20"],
            *["--run-dir", str(folder / "run"), "--device", "cpu"],
        ],
        "torchrun": [
            *[str(BIN / "torchrun"), f"--nproc-per-node={ranks}", "--master-port", port],
            *["--max-restarts", restarts, "--monitor-interval", "0.1", *script],
        ],
        "accelerate": [
            *[str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", str(ranks), "--num_machines", "1"],
            *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port],
            *["--max_restarts", restarts, "--monitor_interval", "0.1", *script],
        ],
    }[launcher]


def stamps(path: Path, offset: int = 0) -> list[Stamp]:
    if not path.exists():
        return []
    rows = [line.split() for line in path.read_text()[offset:].splitlines()]
    return [Stamp(float(row[0]), int(row[1]), int(row[2]), row[3]) for row in rows if len(row) == 4]


def wait(path: Path, offset: int, ready: object, seconds: float) -> list[Stamp] | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = stamps(path, offset)
        if ready(found):  # type: ignore[operator]
            return found
        time.sleep(0.002)
    return None


def working(found: list[Stamp], ranks: int, steps: int, without: frozenset[int] = frozenset()) -> bool:
    """Whether every rank of one start has begun so many steps."""
    done: dict[int, int] = {}
    for item in found:
        if item.what == "loss" and item.pid not in without:
            done[item.rank] = done.get(item.rank, 0) + 1
    return len(done) == ranks and min(done.values()) > steps


def pids(found: list[Stamp]) -> dict[int, int]:
    return {item.rank: item.pid for item in found}


def strike(path: Path, ranks: int, choose: random.Random, by: str) -> dict[str, float] | None:
    """End one rank; None if no step follows."""
    offset = path.stat().st_size
    before = wait(path, offset, lambda found: working(found, ranks, SETTLE_STEPS), LOST_SECONDS)
    if before is None:
        return None
    old = pids(before)
    olds = [psutil.Process(pid) for pid in old.values() if psutil.pid_exists(pid)]
    offset, killed, struck = path.stat().st_size, time.time(), choose.randrange(ranks)
    if by == "kill":
        os.kill(old[struck], signal.SIGKILL)
    else:
        path.with_name(f"leave-{struck}").touch()
        left = wait(path, offset, lambda found: any(item.what == "exit" for item in found), LOST_SECONDS)
        if left is None:
            return None
        killed = next(item.at for item in left if item.what == "exit")
    _, alive = psutil.wait_procs(olds, timeout=LOST_SECONDS)
    gone = time.time() - killed
    known = frozenset(old.values())
    after = wait(path, offset, lambda found: working(found, ranks, 1, known), LOST_SECONDS)
    if after is None or alive:
        return None
    new = [item for item in after if item.pid not in known]
    every = range(ranks)
    first = {what: max(min(i.at for i in new if i.what == what and i.rank == rank) for rank in every) for what in PARTS}
    second = max(sorted(i.at for i in new if i.what == "loss" and i.rank == rank)[1] for rank in every)
    parts = {"ranks start": first["script"], "model is built": first["build"], "first step begins": first["loss"]}
    seen = seen_after(path.with_name("run") / "events.jsonl", killed)
    told = {} if seen is None else {"seen": seen - killed}
    return {**told, "gone": gone, "step": second - killed, **{name: at - killed for name, at in parts.items()}}


def seen_after(events: Path, killed: float) -> float | None:
    """When samestep first saw that a rank had ended, after that moment; of other launchers nobody knows."""
    rows = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    return next((row["seen"] for row in rows if row["event"] == "worker_failed" and row["time"] > killed), None)


PARTS = ("script", "build", "loss")


def measure(launcher: str, ranks: int, rounds: int, by: str, *, ignore_term: bool) -> dict[str, object]:
    """One row. A launcher whose restart never comes is ended and started anew."""
    choose, lost = random.Random(1), 0
    results: list[dict[str, float]] = []
    while len(results) + lost < rounds:
        with tempfile.TemporaryDirectory(prefix="recovery-") as temporary:
            folder = Path(temporary)
            environ = os.environ | {"STAMPS": str(folder / "stamps"), "ACCELERATE_USE_CPU": "true"}
            environ |= {"IGNORE_TERM": "1"} if ignore_term else {}
            started = subprocess.Popen(
                command(launcher, ranks, folder), env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                wait(folder / "stamps", 0, lambda found: working(found, ranks, 1), 4 * LOST_SECONDS)
                while len(results) + lost < rounds:
                    result = strike(folder / "stamps", ranks, choose, by)
                    if result is None:
                        lost += 1
                        break
                    results.append(result)
            finally:
                _end(started)
    row: dict[str, object] = {
        "launcher": launcher,
        "ranks": ranks,
        "by": by,
        "tried": rounds,
        "came back": len(results),
    }
    for name in results[0] if results else ():
        values = sorted(result[name] for result in results)
        row[name] = {"median": round(statistics.median(values), 3), "max": round(values[-1], 3)}
    return row


def _end(started: subprocess.Popen[bytes]) -> None:
    """The launcher and all that it started, also what outlives it."""
    below = []
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(started.pid).children(recursive=True)
    started.kill()
    started.wait()
    for process in below:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(below, timeout=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launchers", default="samestep,torchrun,accelerate")
    parser.add_argument("--by", choices=("kill", "exit"), default="kill", help="SIGKILL, or an exit of its own")
    parser.add_argument("--ignore-term", action="store_true", help="ranks ignore SIGTERM")
    options = parser.parse_args()
    for launcher in options.launchers.split(","):
        row = measure(launcher, options.ranks, options.rounds, options.by, ignore_term=options.ignore_term)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
