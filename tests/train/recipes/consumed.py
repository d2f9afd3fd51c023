"""Writes down which sample ids each shard got, in the order in which this rank saw them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from samestep.train import Components, TrainConfig, train


class Numbered(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 70

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3), index


@dataclass
class ConsumedConfig(TrainConfig):
    global_batch_size: int = 16
    epochs: int = 2


def build(config: ConsumedConfig) -> Components:
    model = nn.Linear(3, 1)
    record = Path(f"ids-{os.environ.get('RANK', '0')}.jsonl")

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with record.open("a") as file:
            file.write(json.dumps(batch[1].tolist()) + "\n")
        result: Tensor = net(batch[0]).pow(2).mean(1)
        return result

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Components(model=model, loss=loss, optimizer=optimizer, train_data=Numbered())


if __name__ == "__main__":
    train(build, ConsumedConfig)
