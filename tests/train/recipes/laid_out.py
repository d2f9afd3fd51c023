"""Parameters that lie in memory in other ways than row by row, complex ones, and layers that thaw or freeze."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train


@dataclass
class LaidOutConfig(TrainConfig):
    global_batch_size: int = 16
    epochs: int = 2
    case: str = "channels last"
    unused: bool | None = None


class Turned(nn.Module):
    """A weight with the strides of its transpose, one with gaps, one complex, and one of these turned."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(4, 8).t())
        self.gaps = nn.Parameter(torch.randn(4, 8)[:, ::2])
        self.complex = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        self.complex_turned = nn.Parameter(torch.randn(1, 3, dtype=torch.complex64).t())

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x.flatten(1)[:, :8] @ self.turned @ self.gaps)
        return (hidden.to(torch.complex64) @ self.complex @ self.complex_turned).abs()


class Thawing(nn.Module):
    """Its first layer begins or ends to train on the way, as of the fourth forward."""

    def __init__(self, thaws: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(108, 8), nn.Linear(8, 1)
        self.thaws = thaws
        self.forwards: Tensor
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        self.first.requires_grad_(not thaws)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.forwards += 1
            if self.forwards == 4:
                self.first.requires_grad_(self.thaws)
        hidden: Tensor = self.last(torch.tanh(self.first(x.flatten(1))))
        return hidden


def model_of(case: str) -> Any:
    if case == "turned":
        return Turned()
    if case in ("thaws", "freezes"):
        return Thawing(case == "thaws")
    layers: list[Any] = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)]
    model: Any = nn.Sequential(*layers)
    return model.to(memory_format=torch.channels_last)


def build(config: LaidOutConfig) -> Components:
    x = torch.randn(60, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    model = model_of(config.case)
    return Components(
        model=model,
        loss=supervised(nn.MSELoss()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        train_data=TensorDataset(x, x.mean((1, 2, 3))[:, None]),
        find_unused_parameters=config.unused,
    )


if __name__ == "__main__":
    train(build, LaidOutConfig)
