"""Running means in every form: changed in place or put anew, saved or not, and a view that nobody writes to."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train


@dataclass
class CenteredConfig(TrainConfig):
    global_batch_size: int = 16
    assigned: bool = False
    persistent: bool = True


class Centered(nn.Module):
    mean: Tensor
    never: Tensor

    def __init__(self, config: CenteredConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.Linear(8, 1)
        self.register_buffer("mean", torch.zeros(8), persistent=config.persistent)
        self.register_buffer("never", torch.zeros(1).expand(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.config.assigned:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        elif self.training:
            self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
        hidden: Tensor = self.layer(x - self.mean + self.never)
        return hidden


def build(config: CenteredConfig) -> Components:
    x = torch.randn(72, 8) + 1
    model = Centered(config)
    return Components(
        model=model,
        loss=supervised(nn.MSELoss()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_data=TensorDataset(x, x.sum(1, keepdim=True)),
    )


if __name__ == "__main__":
    train(build, CenteredConfig)
