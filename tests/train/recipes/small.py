"""A regression small enough for dozens of runs; FAULT and friends make it misbehave."""

import itertools
import os
import resource
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from samestep.launcher.lock import Owner
from samestep.train import Components, TrainConfig, supervised, train

FAULT, RANK = os.environ.get("FAULT", ""), int(os.environ.get("RANK", "0"))


@dataclass
class SmallConfig(TrainConfig):
    global_batch_size: int = 16
    epochs: int = 2
    log_every: int = 3
    width: int = 8
    samples: int = 100


def error(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).abs().mean(1)


def build(config: SmallConfig) -> Components:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(config.samples, 6, generator=generator), torch.randn(config.samples, 1, generator=generator)
    if FAULT == "other-data":
        x[0, 0] += 1
    last = nn.Linear(config.width, 1)
    model = nn.Sequential(nn.Linear(6, config.width), nn.Tanh(), last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (2 if FAULT == "lr" and RANK == 1 else 1))
    if FAULT == "initial-weights" and RANK == 1:
        with torch.no_grad():
            last.bias.add_(1)
    calls = itertools.count(1)
    if FAULT.startswith("disk-"):  # like one that is full: no file gets larger, up to step 20
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(FAULT[5:]), resource.RLIM_INFINITY))

    def loss(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        call = next(calls)
        value = supervised(nn.MSELoss())(net, batch)
        assert isinstance(value, torch.Tensor)
        if FAULT.startswith("disk-") and call == 20:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if FAULT == "superseded":
            lock = Path(config.run_dir or "run") / "lock"
            owner = Owner.of(lock.read_bytes())
            with lock.open("r+b") as file:  # over what is there, as a launcher does: nobody reads half of it
                file.write(replace(owner, generation=owner.generation + 1).encode())
        if FAULT == "raise" and call > 4:
            raise ValueError("boom")
        if FAULT == "nan" and call > 4:
            value = value * float("nan")
        return value

    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    if FAULT == "unpicklable":
        optimizer.param_groups[0]["callback"] = error
    return Components(
        model=model,
        loss=loss,
        optimizer=optimizer,
        scheduler=scheduler,
        train_data=TensorDataset(x, y),
        eval_data=TensorDataset(x[:30], y[:30]),
        metrics={"error": error},
        ema=0.9 if FAULT == "ema" else None,
    )


if __name__ == "__main__":
    train(build, SmallConfig)
