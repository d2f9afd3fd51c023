"""What exact sameness costs: samestep exact (in shared memory, and through gloo), fast, and hand-written DDP in turns.

    torchrun --nproc-per-node W benchmarks/cost_of_sameness.py {small,large} [V]

Every contender trains the same model on the same data with the same optimizer arguments, one thread a rank. A round is
some steps of each; the ratio is taken round by round, so a machine that slows down slows all of them. Rank zero prints
one JSON line: median milliseconds a step, and median and spread of the ratios to the hand-written loop.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from samestep.launcher import who_started
from samestep.launcher.contract import RunDir
from samestep.train import Components, TrainConfig, environment, leave, supervised
from samestep.train.assemble import Setting, assemble
from samestep.train.data.sampler import epoch_plans
from samestep.train.parallel.group import RankGroup
from samestep.train.parallel.join import Membership, join, pick_device

# features, width, global batch, steps a round; "heavy" is the one where computing is most of a step on 2 cores
SIZES = {"small": (64, 256, 64, 100), "large": (512, 2048, 256, 20), "heavy": (512, 2048, 2048, 3)}
ROUNDS = 7


def make(size: str) -> tuple[nn.Module, torch.optim.Optimizer, TensorDataset, int, int]:
    features, width, batch, steps = SIZES[size]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = TensorDataset(torch.randn(batch * (steps + 2), features), torch.randn(batch * (steps + 2), 10))
    return model, optimizer, data, batch, steps


def hand_written(size: str, member: Membership) -> Callable[[int], None]:
    """What a careful person writes: DDP, whole-batch indexing, mean loss."""
    model, optimizer, data, batch, _ = make(size)
    rank, world_size = member.group.rank, member.group.world_size
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size > 1 else model
    leave.end_hard(wrapped)
    criterion = nn.MSELoss()

    def run(steps: int) -> None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
        for step in range(steps):
            x, y = data[order[step * batch : (step + 1) * batch][rank::world_size]]
            optimizer.zero_grad()
            criterion(wrapped(x), y).backward()
            optimizer.step()

    return run


def ours(
    size: str, member: Membership, shards: int, reduction: Literal["exact", "fast"], folder: Path
) -> Callable[[int], None]:
    """The step, loader and ledger that `train` uses, without its start and end."""
    model, optimizer, data, batch, _ = make(size)
    config = TrainConfig(global_batch_size=batch, reduction=reduction)
    components = Components(model=model, loss=supervised(nn.MSELoss()), optimizer=optimizer, train_data=data)
    run_dir = RunDir(folder)
    run_dir.path.mkdir()
    run = assemble(components, Setting(config, member, run_dir, shards, 0, {"seed": 0}), lambda step, phase: None)
    leave.end_hard(run)

    def train(steps: int) -> None:
        batches = iter(run.loader)
        for plan in epoch_plans(len(data), batch, shards, 0, 0, 0):
            run.guards.before_step(plan)
            rows = run.step(plan, batches)
            run.guards.after_step(plan)
            run.ledger.add(plan, rows, run.step.clock.take())
            if plan.step + 1 == steps:
                break
        run.ledger.flush([])

    return train


def main(size: str, shards: int | None) -> None:
    env = who_started.worker(os.environ)
    environment.pin(1, False)
    member = join(env, pick_device("cpu", env))
    environment.pin(1, False)
    leave.end_hard(member)
    shards = shards or env.world_size
    steps = SIZES[size][3]
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            "hand-written": hand_written(size, member),
            "exact": ours(size, member, shards, "exact", Path(folder) / "exact"),
            "fast": ours(size, member, shards, "fast", Path(folder) / "fast"),
        }
        if isinstance(member.group, RankGroup):  # what ranks on several hosts do, without their network
            apart = replace(member, group=replace(member.group, arena=None))
            contenders["apart"] = ours(size, apart, shards, "exact", Path(folder) / "apart")
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for run in contenders.values():
            run(3)  # first steps wrap the model and import what optimizers need
        for _ in range(ROUNDS):
            for name, run in contenders.items():
                member.group.barrier()
                begin = time.perf_counter()
                run(steps)
                member.group.barrier()
                seconds[name].append((time.perf_counter() - begin) / steps)
    if env.rank == 0:
        row: dict[str, object] = {"size": size, "W": env.world_size, "V": shards}
        for name, values in seconds.items():
            ratios = sorted(v / h for v, h in zip(values, seconds["hand-written"], strict=True))
            row[name] = {
                "ms": round(1000 * statistics.median(values), 3),
                "ratio": round(statistics.median(ratios), 3),
                "spread": [round(ratios[0], 3), round(ratios[-1], 3)],
            }
        print(json.dumps(row), flush=True)
    member.group.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
