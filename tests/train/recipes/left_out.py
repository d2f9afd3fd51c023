"""A collate_fn that leaves out every sample of a batch of 2, which is the last one of 6 or 10 samples."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset, default_collate

from samestep.train import Components, TrainConfig, Weighted, supervised, train


@dataclass
class LeftOutConfig(TrainConfig):
    samples: int = 10
    weighed: bool = False
    global_batch_size: int = 4


def collate(samples: list[Any]) -> Any:
    return default_collate(samples) if len(samples) > 2 else (torch.zeros(0, 3), torch.zeros(0, 2))


def weighed(model: Any, batch: Any) -> Weighted:
    return Weighted(model(batch[0]).square().sum(), len(batch[0]))


def build(config: LeftOutConfig) -> Components:
    model, data = nn.Linear(3, 2), TensorDataset(torch.randn(10, 3), torch.randn(10, 2))
    return Components(
        model=model,
        loss=weighed if config.weighed else supervised(nn.MSELoss()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_data=Subset(data, range(config.samples)),
        eval_data=Subset(data, range(6)) if config.samples == 4 else None,
        collate_fn=collate,
    )


if __name__ == "__main__":
    train(build, LeftOutConfig)
