"""Recipes whose final weights test_weighting.py computes a second time in plain torch."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, Weighted, supervised, train
from samestep.train.recipe import Loss

CLASSES = 4


@dataclass
class OracleConfig(TrainConfig):
    epochs: int = 100
    max_steps: int | None = 50
    case: Literal["mean", "none", "tokens", "classes"] = "mean"
    samples: int = 23
    kind: Literal["float32", "float64"] = "float64"


def token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Weighted:
    x, y = batch
    each = nn.functional.cross_entropy(model(x), y.abs() % CLASSES, reduction="none")
    tokens = (y % 7).clamp(min=0)  # how many tokens a sample has; sometimes none
    return Weighted((each * tokens).sum(), tokens.sum())


def build(config: OracleConfig) -> Components:
    kind = getattr(torch, config.kind)
    index = torch.arange(config.samples)
    x = torch.stack([torch.sin(1.0 + index * k) for k in range(1, 6)], 1).to(kind)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)).to(kind)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.cos(torch.arange(parameter.numel()) + number).view(parameter.shape) / 2)
    loss: Loss
    if config.case == "mean":
        loss, y = supervised(nn.MSELoss()), torch.cos(index[:, None] * torch.arange(1, CLASSES + 1)).to(kind)
    elif config.case == "none":
        loss, y = (
            supervised(nn.SmoothL1Loss(reduction="none")),
            torch.cos(index[:, None] + torch.arange(CLASSES)).to(kind),
        )
    elif config.case == "classes":
        weight = torch.tensor([0.1, 1.0, 2.5, 0.7]).to(kind)
        loss, y = supervised(nn.CrossEntropyLoss(weight=weight, ignore_index=2)), index * index % CLASSES
    else:
        loss, y = token_loss, index * 5 % 11 - 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Components(model=model, loss=loss, optimizer=optimizer, train_data=TensorDataset(x, y))


if __name__ == "__main__":
    train(build, OracleConfig)
