"""Goes to another folder, sets threads, a default device, or makes float64 the default, in build or in the loss."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train


@dataclass
class MovingConfig(TrainConfig):
    global_batch_size: int = 16
    folder: str = ""
    build_threads: int = 0
    loss_threads: int = 0
    double: bool = False
    default_device: str = ""
    meta: bool = False


def build(config: MovingConfig) -> Components:
    if config.default_device:
        torch.set_default_device(config.default_device)
    if config.folder:
        os.chdir(config.folder)
    if config.build_threads:
        torch.set_num_threads(config.build_threads)
    if config.double:
        torch.set_default_dtype(torch.float64)
    criterion = supervised(nn.MSELoss())

    def loss(model: nn.Module, batch: Any) -> Any:
        if config.loss_threads:
            torch.set_num_threads(config.loss_threads)
        return criterion(model, batch)

    width = 8 if config.double else 256  # small gradients are looked at together
    model = nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 1))
    if config.meta:
        model = model.to("meta")
    x = torch.randn(64, 64)
    return Components(
        model=model,
        loss=loss,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_data=TensorDataset(x, x.sum(1, keepdim=True)),
        eval_data=TensorDataset(x[:8], x[:8].sum(1, keepdim=True)),
    )


if __name__ == "__main__":
    if os.environ.get("DEFAULT_DEVICE"):
        torch.set_default_device(os.environ["DEFAULT_DEVICE"])
    train(build, MovingConfig)
