"""Samples that make a loss, or only its gradient, NaN or infinite: POISON is kind:sample,sample,…"""

import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, Weighted, train

KIND, _, LIST = os.environ.get("POISON", "").partition(":")


@dataclass
class PoisonedConfig(TrainConfig):
    global_batch_size: int = 18
    epochs: int = 2
    log_every: int = 3
    samples: int = 120


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor | Weighted:
    x, y, bad = batch
    each = (model(x) - y).square().mean(1)
    if KIND == "constant":  # the gradient stays finite
        each = each + torch.where(bad, torch.inf, 0.0)
    if KIND == "gradient":  # the loss stays finite
        each = each + (each * ~bad).sqrt() * 0.01
    if KIND == "weighted":
        return Weighted((each * torch.where(bad, torch.nan, 1.0)).sum(), len(y))
    return each


def build(config: PoisonedConfig) -> Components:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(config.samples, 6, generator=generator), torch.randn(config.samples, 1, generator=generator)
    bad = torch.zeros(config.samples, 1, dtype=torch.bool).squeeze(1)
    for sample in filter(None, LIST.split(",")):
        bad[int(sample)] = True
    if KIND == "input":
        x[bad] = torch.nan
    if KIND == "all":
        x[:] = torch.nan
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Components(
        model=model,
        loss=loss,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5),
        train_data=TensorDataset(x, y, bad),
    )


if __name__ == "__main__":
    train(build, PoisonedConfig)
