"""Two parameters in one memory, the second seen from the side; moving to `cpu:0` would copy each for itself."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, train


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out, self.last = nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 1)
        self.out.weight = nn.Parameter(self.into.weight.t())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.out(self.into(x).relu()))


def loss(model: Model, batch: tuple[Tensor, Tensor]) -> Tensor:
    assert model.out.weight.data_ptr() == model.into.weight.data_ptr()
    assert batch[0].device == Accelerator().device == torch.device("cpu")
    return (model(batch[0]) - batch[1]).square().mean()


def build(config: TrainConfig) -> Components:
    model, x = Model(), torch.randn(96, 8)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return Components(model=model, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), train_data=data)


if __name__ == "__main__":
    train(build)
