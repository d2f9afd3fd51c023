"""Buffers that are counted in, and a norm; `--weightless` leaves whole batches without weight."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, Weighted, supervised, train


@dataclass
class CountingConfig(TrainConfig):
    global_batch_size: int = 8
    samples: int = 37
    counts: str = "steps"
    weightless: bool = False


class Counting(nn.Module):
    seen: Tensor

    def __init__(self, counts: str) -> None:
        super().__init__()
        self.counts = counts
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(12, 1)
        self.register_buffer("large", torch.tensor([2**62 + 1, 7]))  # no float64
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen[1] += len(x) if self.counts == "samples" else 1
        return self.head(self.norm(x).flatten(1))


def build(config: CountingConfig) -> Components:
    x = torch.randn(config.samples, 3, 4)
    model = Counting(config.counts)

    def masked(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Weighted:
        error = (net(batch[0]) - batch[1]).square().squeeze(1)
        mask = batch[1].squeeze(1) > 0
        return Weighted((error * mask).sum(), mask.sum())

    return Components(
        model=model,
        loss=masked if config.weightless else supervised(nn.MSELoss()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_data=TensorDataset(x, x.sum((1, 2)).unsqueeze(1)),
    )


if __name__ == "__main__":
    train(build, CountingConfig)
