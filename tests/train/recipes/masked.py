"""A model with a causal mask of -inf in its state; FAULT spoils a finite place of the mask, or the weights."""

import os

import torch
from torch import nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train

FAULT = os.environ.get("FAULT", "")


class Masked(nn.Module):
    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if FAULT == "spoil":
            with torch.no_grad():
                self.mask[0, 0] = float("nan")
        scores: torch.Tensor = self.linear(x)
        return scores if FAULT else (scores[:, None] + self.mask).softmax(-1).sum(1)


def build(_: TrainConfig) -> Components:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    model = Masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=3e38 if FAULT == "overflow" else 0.01)
    data = TensorDataset(x, 1000 * x)
    return Components(model=model, loss=supervised(nn.MSELoss()), optimizer=optimizer, train_data=data)


if __name__ == "__main__":
    train(build)
