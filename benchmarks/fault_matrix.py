"""Which faults a run survives, in its own bits: samestep beside torchrun with a careful script.

    python benchmarks/fault_matrix.py [--trials 1] [--kinds rank-kill,…] [--launchers samestep,torchrun] [--quiet 90]
        [--chaos FILE]

Each trial strikes one run of fault_matrix_worker.py once, at one of the six moments of `samestep chaos`. Launchers may
restart three times; one that was hit itself is started again by hand. Survived: the run ends in the digest of the
launcher's own undisturbed run. Prints a JSON line a trial to stderr, and markdown to stdout: a row a kind with survived
of injected and median recovery, then all that was not survived. `--chaos` adds what `samestep chaos --json` said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from samestep.launcher.chaos.kinds import BY_NAME, Aim, Kind, Moment
from samestep.launcher.chaos.plan import Course, Fault, plan
from samestep.launcher.chaos.strike import strike
from samestep.launcher.chaos.trace import Trace
from samestep.launcher.contract import ExitCode, RunDir

HERE = Path(__file__).resolve().parent
WORKER, BIN = str(HERE / "fault_matrix_worker.py"), Path(sys.executable).parent
RANKS, STEPS, IN_EPOCH, SAVE_EVERY = 2, 100, 25, 5
SAVED = (ExitCode.PREEMPTED_SAVED, ExitCode.PREEMPTED_KEPT)  # a rank was asked to stop, and so all have saved
INSIDE = ("exception", "exit-0", "segfault")
OUTSIDE = ("rank-kill", "rank-term", "rank-abrt", "rank-pause", "rank-stop", "all-kill", "loader-kill")
OF_LAUNCHER = ("launcher-kill", "launcher-term", "launcher-int")
KINDS = (*(Kind(name, Aim.RANK) for name in INSIDE), *(BY_NAME[name] for name in (*OUTSIDE, *OF_LAUNCHER)))


Row = dict[str, Any]


class Run:
    """One launcher with its job, in a folder of its own."""

    def __init__(self, launcher: str, folder: Path, quiet: float) -> None:
        self.name, self.folder, self.trace = launcher, folder, Trace(RunDir(folder / "run"))
        self.quiet = quiet  # seconds without a step, after which it counts as lost
        self.begin()

    def begin(self) -> None:
        environ = os.environ | {"STAMPS": str(self.folder / "stamps"), "ACCELERATE_USE_CPU": "true"}
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(self.command(), env=environ, stdin=quiet, stdout=quiet, stderr=quiet)

    def command(self) -> list[str]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        if self.name == "torchrun":
            options = [f"--nproc-per-node={RANKS}", "--master-port", port, "--max-restarts=3", "--monitor-interval=0.1"]
            return [str(BIN / "torchrun"), *options, WORKER, "script", str(self.folder)]
        options = ["--quiet", "--nproc-per-node", str(RANKS), "--max-restarts", "3", WORKER, "recipe"]
        flags = ["--epochs", str(STEPS // IN_EPOCH), "--checkpoint-every", str(SAVE_EVERY), "--log-every", "1"]
        words = [*options, *flags, "--num-workers", "1", "--device", "cpu", "--run-dir", str(self.folder / "run")]
        return [str(BIN / "samestep"), "run", *words]

    def stamps(self) -> list[tuple[float, int, int, str, int]]:
        path = self.folder / "stamps"
        rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(float(row[0]), int(row[1]), int(row[2]), row[3], int(row[4])) for row in rows if len(row) == 5]

    def ranks(self, since: float = 0.0) -> dict[int, int]:
        return {rank: pid for at, pid, rank, what, _ in self.stamps() if what == "script" and at >= since}

    @property
    def step(self) -> int:
        if self.name == "torchrun":
            return max((step for *_, what, step in self.stamps() if what == "step"), default=0)
        self.trace.update()
        return self.trace.step

    @property
    def digest(self) -> str:
        if self.name == "torchrun":
            path = self.folder / "digest"
            return path.read_text() if path.exists() else ""
        self.trace.update()
        return str(self.trace.last("run_finished").get("digest", ""))

    def until(self, condition: Callable[[], bool]) -> bool:
        """Whether it came true, before the launcher ended and before nothing moved any more."""
        moved, before = time.monotonic(), -1
        while not condition():
            if self.process.poll() is not None:
                return False
            size = (self.folder / "stamps").stat().st_size if (self.folder / "stamps").exists() else 0
            if size != before:
                moved, before = time.monotonic(), size
            elif time.monotonic() - moved > self.quiet:
                return False
            time.sleep(0.003)
        return True

    def family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def end(self) -> None:
        below = [*self.family(), *(psutil.Process(pid) for pid in self.ranks().values() if psutil.pid_exists(pid))]
        self.process.kill()
        self.process.wait()
        for process in below:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(below, timeout=10)


def trial(launcher: str, fault: Fault, expected: str, quiet: float) -> Row:
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        run = Run(launcher, Path(temporary), quiet)
        try:
            return struck(run, fault, expected)
        finally:
            run.end()


def struck(run: Run, fault: Fault, expected: str) -> Row:
    if not run.until(lambda: reached(run, fault)):
        return {"hit": False, "trouble": "it never got there", "seconds": None}
    time.sleep(fault.delay)
    family, wall, hit = run.family(), time.time(), True
    if fault.kind.name in INSIDE:
        (run.folder / f"fault-{fault.rank}").write_text(fault.kind.name)
    else:
        hit = strike(fault.kind, fault.rank, run.process, run.ranks(), RunDir(run.folder / "run"))
    left = ""
    if fault.kind.aim is Aim.LAUNCHER:
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(35)
        _, alive = psutil.wait_procs(family, timeout=2)
        if alive:
            left = f"{len(alive)} processes outlived the launcher"
        if run.process.poll() != 0:
            run.begin()
    run.until(bool)  # until it ends
    if run.process.poll() in SAVED:
        run.begin()  # as a scheduler would
        run.until(bool)
    if fault.kind.name in INSIDE:
        hit = not (run.folder / f"fault-{fault.rank}").exists()  # it came in time
    again = [at for at, _, _, what, _ in run.stamps() if what == "loss" and at > began_again(run, wall)]
    seconds = sorted(again)[RANKS] - wall if len(again) > RANKS else None
    return {"hit": hit, "trouble": left or trouble(run, expected), "seconds": seconds}


def reached(run: Run, fault: Fault) -> bool:
    if fault.moment is Moment.JOINING:
        return bool(run.ranks())
    if fault.moment is Moment.FIRST_STEP:
        return len({rank for _, _, rank, what, _ in run.stamps() if what == "build"}) == RANKS
    return fault.after_step is not None and run.step >= fault.after_step


def began_again(run: Run, wall: float) -> float:
    """When ranks were started after the strike."""
    return min((at for at, _, _, what, _ in run.stamps() if what == "script" and at > wall), default=float("inf"))


def trouble(run: Run, expected: str) -> str:
    code = run.process.poll()
    if code is None:
        return f"no step for {run.quiet:.0f} s"
    if code:
        return f"ended with {code if code > 0 else signal.Signals(-code).name}"
    return (
        "" if run.digest == expected else "ended in other bits" if run.digest else "ended with 0 before the last step"
    )


def undisturbed(launcher: str, quiet: float) -> str:
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        run = Run(launcher, Path(temporary), quiet)
        try:
            run.until(bool)
            return run.digest
        finally:
            run.end()


def cell(rows: list[Row]) -> str:
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None and not row["trouble"]]
    median = f"{statistics.median(seconds):.2f} s" if seconds else "-"
    return f"{sum(not row['trouble'] for row in rows)} of {len(rows)}, {median}" if rows else "-"


def table(rows: list[Row]) -> list[str]:
    """Survived of injected and median recovery by kind and launcher, then what was not survived."""
    hits, launchers = [row for row in rows if row["hit"]], list(dict.fromkeys(row["launcher"] for row in rows))
    lines = [f"| Fault | {' | '.join(launchers)} |", "|" + "---|" * (1 + len(launchers))]
    for name in (*(kind.name for kind in KINDS), "all"):
        own = [row for row in hits if name in (row["kind"], "all")]
        if own:
            cells = [cell([row for row in own if row["launcher"] == launcher]) for launcher in launchers]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    wrong = [row for row in hits if row["trouble"]]
    return [*lines, "", *(f"* {row['launcher']}, {row['kind']} at {row['moment']}: {row['trouble']}" for row in wrong)]


def chaos_rows(verdict: dict[str, Any]) -> list[str]:
    """A row a kind of what `samestep chaos --json` printed."""
    lines = ["", "| `samestep chaos` | Injected | Survived in the same bits | Recovery, median |", "|---|---|---|---|"]
    hits = [fault for fault in verdict["faults"] if fault["hit"]]
    for key in ("kind", "moment"):
        for name in sorted({fault[key] for fault in hits}):
            own = [fault for fault in hits if fault[key] == name]
            seconds = [fault["seconds"] for fault in own if fault["seconds"] is not None]
            good = sum(fault["survived"] and fault["same"] for fault in own)
            lines.append(
                f"| {name} | {len(own)} | {good} | {f'{statistics.median(seconds):.2f} s' if seconds else '-'} |"
            )
    return [*lines, "", *(f"* {f['kind']} at {f['moment']}: {f['trouble']}" for f in hits if not f["survived"])]


def measure(launcher: str, kinds: list[Kind], trials: int, quiet: float) -> Iterator[Row]:
    """Each kind at each moment, in a seeded order."""
    expected = undisturbed(launcher, quiet)
    join = 0.15 if launcher == "samestep" else 1.5  # from a rank's first line to its first step, about
    ends, saves = tuple(range(IN_EPOCH, STEPS, IN_EPOCH)), tuple(range(SAVE_EVERY, STEPS, SAVE_EVERY))
    count = trials * len(kinds) * len(Moment)
    for (fault,) in plan(1, count, 1, kinds, Course(STEPS, ends, saves, join), RANKS):
        row = {"launcher": launcher, "kind": fault.kind.name, "moment": fault.moment.value}
        yield {**row, **trial(launcher, fault, expected, quiet)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trials", type=int, default=1, help="of each kind at each moment")
    parser.add_argument("--kinds", default=",".join(kind.name for kind in KINDS))
    parser.add_argument("--launchers", default="samestep,torchrun")
    parser.add_argument("--quiet", type=float, default=90.0, help="seconds without a step: the run is lost")
    parser.add_argument("--rows", type=Path, nargs="*", help="rows that were measured before, in place of new ones")
    parser.add_argument("--chaos", type=Path, help="what `samestep chaos --json` has printed")
    given = parser.parse_args()
    kinds = [kind for kind in KINDS if kind.name in given.kinds.split(",")]
    rows = [json.loads(line) for path in given.rows or () for line in path.read_text().splitlines()]
    for launcher in given.launchers.split(",") if given.rows is None else ():
        for row in measure(launcher, kinds, given.trials, given.quiet):
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
    print("\n".join(table(rows)))
    if given.chaos:
        print("\n".join(chaos_rows(json.loads(given.chaos.read_text()))))


if __name__ == "__main__":
    main()
