"""The loss looks at the model that it gets, or at the one from outside, in ways that tell a wrapper from it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, train


@dataclass
class Config(TrainConfig):
    way: str = ""
    epochs: int = 2
    global_batch_size: int = 12


class Net(nn.Sequential):
    dim = 3.0  # DistributedDataParallel has one of its own, as it has a device and a logger
    device = "mine"
    scale: Tensor | float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out * self.scale


def of_names(model: nn.Module) -> Tensor:
    return torch.stack([p.square().sum() for n, p in model.named_parameters() if n.startswith("2.")]).sum()


def of_modules(model: nn.Module) -> Tensor:
    named = dict(model.named_modules()).get("0")
    return sum((p.square().sum() for c in (*model.children(), named) if c for p in c.parameters()), torch.zeros(()))


def of_attribute(model: Any) -> Tensor:
    size: Tensor = model[0].weight.abs().sum()
    return size * model.dim * (model.device == "mine") * (type(model) is Net)


def build(config: Config) -> Components:
    model = Net(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(given: Net, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        if config.way == "sets":
            given.scale = y.mean()
        used: Any = {"outside": model, "layers": lambda x: given[2](given[1](given[0](x)))}.get(config.way, given)
        further: Any = {"names": of_names, "modules": of_modules, "attribute": of_attribute}.get(config.way)
        loss: Tensor = (used(x) - y).square().mean(1) + (further(given) if further else 0.0)
        return loss

    return Components(
        model=model,
        loss=loss,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        train_data=TensorDataset(torch.randn(36, 3), torch.randn(36, 1)),
    )


if __name__ == "__main__":
    train(build, Config)
