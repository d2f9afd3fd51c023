"""A map-style datasets.Dataset with a transform of its own, which draws random numbers."""

import torch
from datasets import Dataset
from torch import nn

from samestep.train import Components, TrainConfig, supervised, train


def noisy(rows: dict[str, list[float]]) -> dict[str, list[torch.Tensor]]:
    return {
        "x": [torch.tensor([value, -value]) + 0.1 * torch.randn(2) for value in rows["x"]],
        "y": [torch.tensor([value]) for value in rows["y"]],
    }


def pairs(rows: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([row["x"] for row in rows]), torch.stack([row["y"] for row in rows])


def build(config: TrainConfig) -> Components:
    data = Dataset.from_dict({"x": [i / 50 for i in range(90)], "y": [i / 25 for i in range(90)]}).with_transform(noisy)
    model = nn.Linear(2, 1)
    return Components(
        model=model,
        loss=supervised(nn.MSELoss()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        train_data=data,
        collate_fn=pairs,
    )


if __name__ == "__main__":
    train(build)
