"""The seed's job: a linear model on 10 000 synthetic samples, ten features to one number."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train


@dataclass
class SeedConfig(TrainConfig):
    epochs: int = 3


def build(config: SeedConfig) -> Components:
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.randn(10_000, 10, generator=generator)
    y = torch.randn(10_000, 1, generator=generator)
    model = nn.Linear(10, 1)
    return Components(
        model=model,
        loss=supervised(nn.MSELoss()),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.001),
        train_data=TensorDataset(x, y),
    )


if __name__ == "__main__":
    train(build, SeedConfig)
