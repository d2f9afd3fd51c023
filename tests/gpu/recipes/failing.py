"""Rank 1 fails in its 30th call of the loss, in the first generation of a launcher; FAULT says how."""

import os
import time

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, train

FAULT = os.environ.get("FAULT", "")
STRUCK = os.environ.get("RANK") == "1" and os.environ.get("SAMESTEP_GENERATION") == "0"
calls = 0


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    global calls
    calls += 1
    time.sleep(0.02)
    if STRUCK and calls == 30:
        match FAULT:
            case "kill":
                os.kill(os.getpid(), 9)
            case "raise":
                raise ValueError("of rank 1")
            case "host":
                time.sleep(3600)
            case "device":
                torch.cuda._sleep(10**15)
    return (model(batch[0]) - batch[1]).square().mean()


def build(config: TrainConfig) -> Components:
    x = torch.randn(64 * 60, 10, generator=torch.Generator().manual_seed(1))
    model = nn.Linear(10, 1)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    return Components(model=model, loss=loss, optimizer=optimizer, train_data=TensorDataset(x, x.sum(1, keepdim=True)))


if __name__ == "__main__":
    train(build)
