"""Layers that not every batch uses, beside what looks unused to whoever sees one forward and its outputs alone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, train


@dataclass
class PartlyUsedConfig(TrainConfig):
    global_batch_size: int = 8
    case: str = "loss"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.odd, self.head, self.other = (nn.Linear(3, 3) for _ in range(4))
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.stem(x))
        if float(x[0, 0]) > 0:
            hidden = hidden + self.odd(x)
        return self.head(hidden), self.other(hidden)


class Losses:
    """By case: a parameter that the loss uses, two forwards, an output that some batches use."""

    def __init__(self, case: str) -> None:
        self.case = case

    def __call__(self, model: Any, batch: tuple[Tensor]) -> Tensor:
        (x,) = batch
        out, other = model(x)
        error = (out - x).square().mean(1)
        if self.case == "loss":
            return error * torch.exp(-model.scale) + model.scale
        if self.case == "forwards":
            return error + model(-x)[1].square().mean(1)
        return error + other.square().mean(1) if float(x[0, 1]) > 0 else error


def build(config: PartlyUsedConfig) -> Components:
    model = Net()
    return Components(
        model=model,
        loss=Losses(config.case),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
        train_data=TensorDataset(torch.randn(60, 3)),
    )


if __name__ == "__main__":
    train(build, PartlyUsedConfig)
