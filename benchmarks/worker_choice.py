"""Loader workers chosen by measurement against fixed numbers.

    python benchmarks/worker_choice.py {computing,waiting,digits} ROUNDS STEPS [DEVICE]

Samples take 5 ms: `computing` decodes (a core is busy), `waiting` reads from somewhere slow. `digits` is the recipe
whose samples are so small that workers can cost more than they save. Each contender is a whole run in this process,
workers started and ended in it; the choice's own measuring counts. Prints one JSON line: median seconds, and ratio to
the best fixed number of the same round.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from contenders import WORKLOADS
from torch import Tensor, nn
from torch.utils.data import Dataset

from samestep.launcher import who_started
from samestep.launcher.contract import RunDir
from samestep.train import Components, TrainConfig, environment, supervised
from samestep.train.assemble import Setting, assemble
from samestep.train.loop import run_to_the_end
from samestep.train.parallel.join import Membership, join, pick_device
from samestep.train.state.saver import Saver

SECONDS, BATCH = 0.005, 8


class Images(Dataset[Any]):
    def __init__(self, samples: int, *, computes: bool) -> None:
        self.samples = samples
        self.computes = computes

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.computes:
            end = time.thread_time() + SECONDS
            while time.thread_time() < end:
                pass
        else:
            time.sleep(SECONDS)
        return torch.full((3, 64, 64), index / self.samples), index % 10


def images(steps: int, *, computes: bool) -> Components:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    model(torch.zeros(1, 3, 64, 64))
    return Components(
        model=model,
        loss=supervised(nn.CrossEntropyLoss()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_data=Images(BATCH * steps, computes=computes),
    )


def seconds_of(workers: Any, member: Membership, steps: int, kind: str) -> float:
    torch.manual_seed(0)
    digits = WORKLOADS["digits CNN"]
    components = digits.make() if kind == "digits" else images(steps, computes=kind == "computing")
    components.model.to(member.device)
    components.eval_data = None
    batch = digits.batch if kind == "digits" else BATCH
    config = TrainConfig(global_batch_size=batch, num_workers=workers, epochs=10**6, max_steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(config, member, RunDir(Path(folder)), 1, 0, {"seed": 0})
        run = assemble(components, setting, lambda step, phase: None)
        run.saver = Saver(run.saver.schedule)
        run.reporter.stream = io.StringIO()  # type: ignore[attr-defined]
        run.reporter.started(0, 1, [], steps)
        begin = time.perf_counter()
        run_to_the_end(run)
        return time.perf_counter() - begin


def main(kind: str, rounds: int, steps: int, device: str = "cpu") -> None:
    env = who_started.worker(os.environ)
    environment.pin(1, False)
    member = join(env, pick_device(device, env))
    environment.pin(1, False)
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for workers in (0, "auto", 1, 2, 4):
            took = seconds_of(workers, member, steps, kind)
            seconds.setdefault(str(workers), []).append(took)
    best = [min(values) for values in zip(*(v for name, v in seconds.items() if name != "auto"), strict=True)]
    row: dict[str, Any] = {"kind": kind}
    for name, values in seconds.items():
        ratios = sorted(value / least for value, least in zip(values, best, strict=True))
        row[name] = {
            "s": round(statistics.median(values), 2),
            "ratio": round(statistics.median(ratios), 3),
            "spread": [round(ratios[0], 3), round(ratios[-1], 3)],
        }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
