"""A regression under the scheduler that SCHEDULER names, stepped as INTERVAL says."""

import os
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train

MAKE: dict[str, Any] = {
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=24),
    "cosine_restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        [4],
    ),
    "milestones": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=7), lr_scheduler.MultiStepLR(optimizer, [1, 3, 3])],
        [7],  # after the stop
    ),
    "cyclic_momentum": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
}


def build(config: TrainConfig) -> Components:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(90, 4, generator=generator), torch.randn(90, 1, generator=generator)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Components(
        model=model,
        loss=supervised(nn.MSELoss()),
        optimizer=optimizer,
        scheduler=MAKE[os.environ["SCHEDULER"]](optimizer),
        scheduler_interval="epoch" if os.environ.get("INTERVAL") == "epoch" else "step",
        train_data=TensorDataset(x, y),
        eval_data=TensorDataset(x[:20], y[:20]),
    )


if __name__ == "__main__":
    train(build)
