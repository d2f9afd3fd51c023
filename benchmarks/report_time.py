"""What the page at the end of `samestep run` costs, and how large it is, by the length of the run.

    python benchmarks/report_time.py [STEPS ...]

Each row is a fresh process, so imports are counted. Prints one line of JSON a row.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PHASES = ("data", "forward", "backward", "sync", "optimizer")
MAKE = """
import sys, time
since, began = time.perf_counter(), time.process_time()
from pathlib import Path
from samestep.launcher.contract import RunDir
from samestep.launcher.report.command import at_the_end
problem = at_the_end(RunDir(Path(sys.argv[1])))
assert not problem, problem
print(time.perf_counter() - since, time.process_time() - began)
"""


def write_run(path: Path, steps: int) -> None:
    """events.jsonl of a run of two ranks, evaluated every hundred steps."""
    info = [{"rank": rank, "local_rank": rank, "host": "here", "pid": 1} for rank in range(2)]
    with (path / "events.jsonl").open("w") as file:
        started = {"event": "run_started", "time": 0.0, "generation": 0, "world_size": 2, "shards": 2, "ranks": info}
        file.write(json.dumps(started) + "\n")
        for step in range(1, steps + 1):
            loss = 1.0 + (step * 7919 % 1000) / 1000
            spread = {"mean": loss / 1000, "max": loss / 900, "slowest_rank": step % 2}
            event = {"event": "step", "time": step / 100, "step": step, "epoch": 1, "loss": loss, "samples": 64}
            event |= {"loss_hex": loss.hex(), "samples_per_s": 6400 / loss, "seconds": dict.fromkeys(PHASES, spread)}
            if step % 100 == 0:
                event |= {
                    "rank_seconds": {phase: [loss] * 2 for phase in PHASES},
                    "memory": {"host": [1 << 29, 1 << 28]},
                }
                metrics = {
                    "event": "eval",
                    "time": step / 100,
                    "step": step,
                    "metrics": {"loss": loss, "accuracy": 1 / loss},
                }
                file.write(json.dumps(metrics) + "\n")
            file.write(json.dumps(event) + "\n")


def measure(steps: int, rounds: int) -> dict[str, object]:
    """Median and range of some rounds, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_run(path, steps)
        seconds, cpu = [], []
        for _ in range(rounds):
            (path / "report.html").unlink(missing_ok=True)
            done = subprocess.run([sys.executable, "-c", MAKE, folder], check=True, capture_output=True, text=True)
            wall, work = map(float, done.stdout.split())
            seconds.append(wall)
            cpu.append(work)
        return {
            "steps": steps,
            "seconds": round(statistics.median(seconds), 3),
            "range": [round(min(seconds), 3), round(max(seconds), 3)],
            "cpu_seconds": round(min(cpu), 3),
            "events_megabytes": round((path / "events.jsonl").stat().st_size / 1e6, 1),
            "page_megabytes": round((path / "report.html").stat().st_size / 1e6, 2),
        }


if __name__ == "__main__":
    for steps in [int(word) for word in sys.argv[1:]] or [1_000, 10_000, 100_000, 1_000_000]:
        print(json.dumps(measure(steps, rounds=5 if steps < 100_000 else 1)), flush=True)
