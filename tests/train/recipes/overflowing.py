"""One of its batches is infinite, which BatchNorm sees before any loss does."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train


@dataclass
class OverflowingConfig(TrainConfig):
    global_batch_size: int = 4


def build(_: OverflowingConfig) -> Components:
    x = torch.randn(12, 3)
    x[5] = float("inf")
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return Components(
        model=model,
        loss=supervised(nn.MSELoss()),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        train_data=TensorDataset(x, torch.randn(12, 1)),
    )


if __name__ == "__main__":
    train(build, OverflowingConfig)
