"""What `--check` costs: milliseconds of a step without it, after the first steps, and while all checks look.

    python benchmarks/cost_of_checks.py {small,large}

The three take turns in one process, one thread, one rank; one JSON line with medians, and what a start pays in all.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.utils.data import TensorDataset

from samestep.launcher.contract import RunDir, WorkerEnv
from samestep.train import Components, TrainConfig, environment, supervised
from samestep.train.assemble import Setting, assemble
from samestep.train.data.sampler import epoch_plans
from samestep.train.observe.guards.watch import FIRST_STEPS
from samestep.train.parallel.join import Membership, join

SIZES = {"small": (64, 256, 64), "large": (512, 2048, 256)}  # features, width, global batch
ROUNDS = 25
Check = Literal["first", "always", "never"]


def contender(size: str, member: Membership, check: Check, folder: Path) -> Callable[[], float]:
    """Each call is an epoch of FIRST_STEPS steps, after which `always` concludes; gives its seconds."""
    features, width, batch = SIZES[size]
    samples = batch * FIRST_STEPS
    model = nn.Sequential(
        nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = TensorDataset(torch.randn(samples, features), torch.randn(samples, 10))
    components = Components(model=model, loss=supervised(nn.MSELoss()), optimizer=optimizer, train_data=data)
    run_dir = RunDir(folder / check)
    run_dir.path.mkdir()
    config = TrainConfig(global_batch_size=batch, check=check)
    run = assemble(components, Setting(config, member, run_dir, 1, 0, {"seed": 0}), lambda step, phase: None)

    epochs = itertools.count()

    def train() -> float:
        epoch, batches = next(epochs), iter(run.loader)
        begin = time.perf_counter()
        for plan in epoch_plans(samples, batch, 1, epoch, 0, epoch * FIRST_STEPS):
            run.guards.before_step(plan)
            run.step(plan, batches)
            run.guards.after_step(plan)
        return time.perf_counter() - begin

    return train


def main(size: str) -> None:
    environment.pin(1, False)
    member = join(WorkerEnv(), torch.device("cpu"))
    checks: tuple[Check, ...] = ("never", "first", "always")
    seconds: dict[str, list[float]] = {check: [] for check in checks}
    with tempfile.TemporaryDirectory() as folder:
        runs = {check: contender(size, member, check, Path(folder)) for check in checks}
        for run in runs.values():
            run()
        for _ in range(ROUNDS):
            for check, run in runs.items():
                seconds[check].append(run() / FIRST_STEPS)
    medians = {check: round(1000 * statistics.median(values), 3) for check, values in seconds.items()}
    start = round(FIRST_STEPS * (medians["always"] - medians["never"]), 3)
    print(json.dumps({"size": size, "ms_a_step": medians, "ms_a_start": start}))


if __name__ == "__main__":
    main(sys.argv[1])
