"""How soon a hang is found, whether the right rank is named, and how often a clean run is taken for a hang.

    python benchmarks/hangs.py [--trials 5] [--clean 50]

Each trial strikes a random rank in a random step, with one kind of hang; a clean run has one step 20 times as long as
the others. Wants an idle machine: a crowded one stretches the watchdog's time on purpose. Prints markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samestep.launcher.heartbeat import Board, pulse

KINDS = ("sleep", "lock", "regex", "stop", "data", "skip")
RECIPE = """
import ctypes, os, re, signal, time
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset
from samestep.train import Components, supervised, train

RANK, FIRST = int(os.environ["RANK"]), os.environ["SAMESTEP_GENERATION"] == "0"
KIND, STRUCK, STEP = "{kind}", {rank}, {step}
calls = items = 0

def strike(kind):
    Path("{mark}").write_text(str(time.time()))
    if kind in ("sleep", "data"):
        time.sleep(3600)
    if kind == "lock":
        ctypes.PyDLL(None).sleep(3600)
    if kind == "regex":
        re.match(r"(a?){{60}}a{{60}}", "a" * 60)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)

def loss(model, batch):
    global calls
    calls += 1
    time.sleep(0.02 if KIND != "clean" else 0.4 if calls == STEP and RANK == STRUCK else 0.02)
    if FIRST and calls == STEP:
        if KIND == "skip" and RANK != STRUCK:
            dist.all_reduce(torch.ones(3))
        if RANK == STRUCK and KIND not in ("data", "clean"):
            strike(KIND)
    return supervised(nn.MSELoss())(model, batch)

class Data(Dataset):
    def __len__(self):
        return 48 * 40
    def __getitem__(self, index):
        global items
        items += 1
        if KIND == "data" and FIRST and RANK == STRUCK and items == 16 * STEP:
            strike("data")
        return torch.full((10,), index / 2000), torch.ones(1)

def build(config):
    model = nn.Linear(10, 1)
    return Components(
        model=model, loss=loss, optimizer=torch.optim.SGD(model.parameters(), 0.01), train_data=Data(),
    )

if __name__ == "__main__":
    train(build)
"""


def run(folder: Path, kind: str, rank: int, step: int, ranks: int) -> tuple[list[dict[str, Any]], float]:
    """Events of one run, and the time of the strike."""
    recipe, mark = folder / "recipe.py", folder / "mark"
    recipe.write_text(RECIPE.format(kind=kind, rank=rank, step=step, mark=mark))
    launcher = [sys.executable, "-m", "samestep.launcher", "run", "--quiet", "--nproc-per-node", str(ranks)]
    flags = ["--shards", str(ranks), "--global-batch-size", "48", "--max-steps", "40", "--checkpoint-every", "5"]
    done = subprocess.run(
        [*launcher, str(recipe), *flags, "--run-dir", str(folder / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    return events, float(mark.read_text()) if mark.exists() else 0.0


def cost_of_a_beat(count: int = 200_000) -> float:
    """Microseconds of processor time that publishing takes in one step, with its call a phase."""
    board = Board(1)
    heart = pulse({"SAMESTEP_HEARTBEAT_FD": str(board.fd)}, 0)

    def seconds(beat: Callable[[], None]) -> float:
        begin = time.process_time()
        for _ in range(count // 10):
            beat()
        return (time.process_time() - begin) / (count // 10)

    one = min(seconds(lambda: heart.enter("forward")) for _ in range(10))
    begin = min(seconds(lambda: heart.at(1, "step")) for _ in range(10))
    return 1e6 * (begin + 7 * one)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--clean", type=int, default=50)
    args = parser.parse_args()
    choose, ranks = random.Random(1), 3
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors; a step's beats: {cost_of_a_beat():.2f} us")
    print("\n| Hang | Found | Rank named | Seconds until named, median (range) |\n|---|---|---|---|")
    for kind in KINDS:
        seconds, found, named = [], 0, 0
        for _ in range(args.trials):
            rank, step = choose.randrange(ranks), choose.randrange(3, 35)
            with tempfile.TemporaryDirectory() as folder:
                events, struck = run(Path(folder), kind, rank, step, ranks)
            failed = [event for event in events if event["event"] == "worker_failed"]
            found += len(failed) == 1 and failed[0]["cause"].startswith("hang")
            named += len(failed) == 1 and failed[0]["rank"] == rank
            seconds += [event["time"] - struck for event in failed if struck]
        spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})" if seconds else ""
        print(f"| {kind} | {found} of {args.trials} | {named} of {args.trials} | {spread} |", flush=True)
    alarms = 0
    for _ in range(args.clean):
        with tempfile.TemporaryDirectory() as folder:
            events, _ = run(Path(folder), "clean", choose.randrange(ranks), choose.randrange(3, 35), ranks)
        alarms += any(event["event"] == "worker_failed" for event in events)
    print(f"\n{alarms} of {args.clean} clean runs were taken for a hang.")


if __name__ == "__main__":
    main()
