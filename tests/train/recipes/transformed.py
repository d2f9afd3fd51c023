"""The loss looks at the model through torch.func: every forward is inside of a transform."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, train


def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    slopes = torch.func.vmap(torch.func.jacrev(lambda x: model(x).sum()))(batch[0])
    values = torch.func.vmap(model)(batch[0])
    return (slopes - 1).square().sum(1) + values.squeeze(1).square()


def build(_: TrainConfig) -> Components:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    return Components(
        model=model,
        loss=loss,
        optimizer=torch.optim.Adam(model.parameters()),
        train_data=TensorDataset(torch.randn(24, 3)),
    )


if __name__ == "__main__":
    train(build)
