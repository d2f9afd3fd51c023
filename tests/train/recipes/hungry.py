"""Needs memory for a batch: of more than `room` samples it raises what torch raises when a GPU is full."""

import os
import random
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from samestep.train import Components, TrainConfig, Weighted, train


@dataclass
class HungryConfig(TrainConfig):
    epochs: int = 2
    global_batch_size: int = 12
    samples: int = 64  # the last batch has 4
    log_every: int = 2
    room: int = 100  # samples that fit
    on_rank: int | None = None  # whose device is small; None: all are
    full_after: int = 0  # steps of a start in which every batch fits
    weigh: Literal["samples", "tokens"] = "samples"
    norm: Literal["none", "1d", "2d"] = "none"
    dropout: float = 0.0
    packed: bool = False  # a batch is one long tensor and cannot be cut


class Named(Dataset[dict[str, Any]]):
    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(samples, 3, 4, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "tokens": index % 5, "name": f"sample {index}"}


class Model(nn.Module):
    def __init__(self, config: HungryConfig) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8) if config.norm == "1d" else nn.Linear(4, 8)
        self.norm = {"none": nn.Identity(), "1d": nn.BatchNorm1d(8), "2d": nn.BatchNorm2d(3)}[config.norm]
        self.dropout = nn.Dropout(config.dropout)
        self.last = nn.Linear(8, 1)
        self.rarely = nn.Linear(8, 1)  # used only by some parts of some shards
        self.flat = config.norm == "1d"

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1) if self.flat else x)
        hidden = self.norm(hidden if self.flat else hidden[..., None])
        hidden = self.dropout(torch.tanh(hidden.view(len(x), -1, 8).mean(1)))
        output = self.last(hidden)
        if bool(x.sum() > 0):
            output = output + self.rarely(hidden)
        return output.squeeze(1)


def build(config: HungryConfig) -> Components:
    model = Model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    optimizer.register_step_post_hook(count)

    def loss(net: nn.Module, batch: dict[str, Any]) -> Tensor | Weighted:
        x, tokens = batch["x"], batch["tokens"]
        if config.packed:
            x = x.view(-1, 3, 4)
        small = config.on_rank in (None, int(os.environ.get("RANK", "0")))
        if len(x) > config.room and steps >= config.full_after and small:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a capacity of ...")
        assert config.packed or len(batch["name"]) == len(x)
        draw = random.random()  # keyed by shard
        each = (net(x) - x.flatten(1).sin().sum(1) * draw).square()
        if config.weigh == "samples":
            return each
        return Weighted((each * tokens).sum(), tokens.sum(), {"draw": torch.tensor(draw)})

    def packed(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {"x": torch.cat([sample["x"] for sample in samples]), "tokens": torch.ones(len(samples))}

    return Components(
        model=model,
        loss=loss,
        optimizer=optimizer,
        train_data=Named(config.samples),
        find_unused_parameters=True,
        collate_fn=packed if config.packed else None,
    )


if __name__ == "__main__":
    train(build, HungryConfig)
