"""A scheduler that is made for five steps, by itself or inside another one."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, OneCycleLR, SequentialLR
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train


@dataclass
class ScheduledConfig(TrainConfig):
    kind: str = "alone"
    interval: str = "step"
    global_batch_size: int = 4


def build(config: ScheduledConfig) -> Components:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cycle = OneCycleLR(optimizer, 0.1, total_steps=5)
    kinds = {
        "alone": lambda: cycle,
        "chained": lambda: ChainedScheduler([ConstantLR(optimizer), cycle], optimizer=optimizer),
        "behind another": lambda: SequentialLR(optimizer, [ConstantLR(optimizer), cycle], [2]),
    }
    return Components(
        model=model,
        loss=supervised(nn.MSELoss()),
        optimizer=optimizer,
        scheduler=kinds[config.kind](),
        scheduler_interval=config.interval,  # type: ignore[arg-type]
        train_data=TensorDataset(torch.randn(8, 3), torch.randn(8, 2)),
    )


if __name__ == "__main__":
    train(build, ScheduledConfig)
