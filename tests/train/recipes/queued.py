"""A queue of MoCo's kind beside buffers that end alike in all shards, or are meant to be averaged."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train


@dataclass
class QueuedConfig(TrainConfig):
    global_batch_size: int = 8
    shards: int = 1


class Queued(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.last = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.register_buffer("queue", torch.zeros(4, 16))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        keys = self.last(self.keys(x))
        place, queue = int(self.get_buffer("place")), self.get_buffer("queue")
        queue[:, place : place + 2] = keys[:2].detach().T
        self.get_buffer("place").fill_((place + 2) % 16)
        self.get_buffer("calls").add_(1.0)
        return keys @ queue.clone()


def build(config: QueuedConfig) -> Components:
    model, generator = Queued(), torch.Generator().manual_seed(1)
    return Components(
        model=model,
        loss=supervised(nn.MSELoss()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_data=TensorDataset(torch.randn(40, 3, generator=generator), torch.randn(40, 16, generator=generator)),
    )


if __name__ == "__main__":
    train(build, QueuedConfig)
