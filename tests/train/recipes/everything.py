"""All that makes sameness hard, in one tiny model.

The third part of a sample says which shard it falls into in epoch 0, so parameters can be used in some shards only.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from samestep.train import Components, SameOrderSampler, TrainConfig, train


@dataclass
class EverythingConfig(TrainConfig):
    epochs: int = 2
    global_batch_size: int = 12
    samples: int = 104  # the last batch has 8
    log_every: int = 3
    normalise: bool = True
    unused: bool = True


class RandomSamples(Dataset[tuple[Tensor, Tensor, int]]):
    def __init__(self, config: EverythingConfig, shards: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(config.samples, 6, generator=generator)
        self.y = torch.randint(0, 6, (config.samples,), generator=generator)
        sampler = SameOrderSampler(
            self.x, 1, 0, seed=config.seed, global_batch_size=config.global_batch_size, shards=shards
        )
        self.shard = [0] * config.samples
        lists = iter(sampler)
        for plan in sampler.plans():
            for shard in plan.present((0, shards)):
                for sample in next(lists):
                    self.shard[sample] = shard

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        noise = random.gauss(0, 0.1) + np.random.normal(0, 0.1) + 0.1 * torch.randn(6)
        return self.x[index] + noise, self.y[index], self.shard[index]


class Model(nn.Module):
    seen: Tensor

    def __init__(self, normalise: bool, unused: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 6)
        self.last.weight = self.first.weight  # tied
        self.norm = nn.BatchNorm1d(6) if normalise else nn.LayerNorm(6)
        self.dropout = nn.Dropout(0.3)
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("constant", torch.rand(3))
        self.early = nn.Linear(6, 6)  # only in shards that are the first of a rank
        self.some = nn.Linear(6, 6)  # only in some shards, of some steps
        self.never = nn.Linear(6, 6)
        self.unused = unused

    def forward(self, x: Tensor, shard: int) -> Tensor:
        if self.training:
            self.seen += 1
        hidden = self.dropout(torch.relu(self.norm(self.first(x)))) + self.frozen
        if shard in (0, 2) or not self.unused:
            hidden = hidden + self.early(x)
        if (shard in (1, 2) and int(self.seen) % 3 == 1) or not self.unused:
            hidden = hidden + self.some(x)
        return self.last(hidden if self.unused else hidden + self.never(x))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, y, shard = batch
    return nn.functional.cross_entropy(model(x, int(shard[0])), y, reduction="none")


def build(config: EverythingConfig) -> Components:
    model = Model(config.normalise, config.unused)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    data = RandomSamples(config, config.shards or 1)
    return Components(
        model=model,
        loss=loss,
        optimizer=optimizer,
        train_data=data,
        eval_data=data,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.9),
    )


if __name__ == "__main__":
    train(build, EverythingConfig)
