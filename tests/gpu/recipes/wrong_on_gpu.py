"""Mistakes that a GPU makes different from a CPU; WRONG says which."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, train

WRONG = os.environ.get("WRONG", "")


@dataclass
class WrongConfig(TrainConfig):
    global_batch_size: int = 16
    max_steps: int | None = 20
    log_every: int = 5


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    output = model(x)
    if WRONG == "nondeterministic":
        output = output[:, y % 4].cumsum(0) + torch.bincount(y, weights=output[:, 0], minlength=4)[0]
    if WRONG == "device":
        output = output + torch.ones(4)
    if WRONG == "infinite":
        output = output / (y != 3).float()[:, None]
    return nn.functional.cross_entropy(output, y, reduction="none")


def build(config: WrongConfig) -> Components:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(512, 8, generator=generator), torch.randint(0, 4, (512,), generator=generator)
    if WRONG == "label":
        y[::10] = 7
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Components(model=model, loss=loss, optimizer=optimizer, train_data=TensorDataset(x, y))


if __name__ == "__main__":
    train(build, WrongConfig)
