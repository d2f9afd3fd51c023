"""A metric that takes 100 s, by a clock that jumps."""

import time

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train

real, ahead = time.perf_counter, 0.0
time.perf_counter = lambda: real() + ahead


def slow(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    global ahead
    ahead += 100.0
    return (model(batch[0]) - batch[1]).abs().mean(1)


def build(config: TrainConfig) -> Components:
    model = nn.Linear(3, 1)
    data = TensorDataset(torch.randn(64, 3), torch.randn(64, 1))
    return Components(
        model=model,
        loss=supervised(nn.MSELoss()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_data=data,
        eval_data=TensorDataset(*data[:8]),
        metrics={"slow": slow},
    )


if __name__ == "__main__":
    train(build)
