"""A loss that reads a setting and calls a function of its model."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, train


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.temperature = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def scaled(self, output: Tensor) -> Tensor:
        return output / self.temperature


def loss(model: Model, batch: tuple[Tensor, Tensor]) -> Tensor:
    assert model.temperature == 0.5
    return nn.functional.mse_loss(model.scaled(model(batch[0])), batch[1])


def build(config: TrainConfig) -> Components:
    model, x = Model(), torch.randn(64, 8)
    data = TensorDataset(x, x[:, :3].sin())
    return Components(model=model, loss=loss, optimizer=torch.optim.Adam(model.parameters()), train_data=data)


if __name__ == "__main__":
    train(build)
