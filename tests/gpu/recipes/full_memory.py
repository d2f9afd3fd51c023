"""A GPU with so little memory that a whole batch does not fit."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, train


@dataclass
class FullConfig(TrainConfig):
    global_batch_size: int = 64
    max_steps: int | None = 6
    log_every: int = 2
    megabytes: int = 0  # that this process may take of the device; 0: all


class Wide(nn.Module):
    """Keeps 4 MiB of activations for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, 1 << 18))
        self.last = nn.Linear(1 << 18, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for _ in range(4):
            hidden = torch.tanh(hidden * self.scale)
        return self.last(hidden)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().flatten()


def build(config: FullConfig) -> Components:
    if config.megabytes:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(config.megabytes * 2**20 / whole)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(256, 1, generator=generator), torch.randn(256, 1, generator=generator))
    model = Wide()
    return Components(model=model, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=1e-4), train_data=data)


if __name__ == "__main__":
    train(build, FullConfig)
