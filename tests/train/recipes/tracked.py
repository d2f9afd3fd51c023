"""Metrics one of whose names is the folder of another one's, and a tracker that takes long to start."""

import time
from typing import Any

import torch
from accelerate import tracking
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train

SECONDS = 2.0


class Slow(tracking.MLflowTracker):  # type: ignore[misc]  # its base has no types
    def start(self) -> None:
        time.sleep(SECONDS)
        super().start()


def build(config: TrainConfig) -> Components:
    x, model = torch.randn(64, 6), nn.Linear(6, 1)
    data = TensorDataset(x, x[:, :1])

    def error(net: nn.Module, batch: Any) -> Tensor:
        result: Tensor = (net(batch[0]) - batch[1]).abs().mean(1)
        return result

    return Components(
        model=model,
        loss=supervised(nn.MSELoss()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_data=data,
        eval_data=data,
        metrics={"acc": error, "acc/top1": error},
    )


if __name__ == "__main__":
    tracking.LOGGER_TYPE_TO_CLASS["mlflow"] = Slow
    train(build, TrainConfig)
