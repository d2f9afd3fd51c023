"""Blocks whose activations are computed again in backward (`--recompute`), as docs/memory.md shows it.

`--reentrant` does it as it must not be done with several shards.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train


@dataclass
class CheckpointedConfig(TrainConfig):
    global_batch_size: int = 12
    recompute: bool = False
    reentrant: bool = False


class Blocks(nn.Module):
    def __init__(self, recompute: bool, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 16), nn.LayerNorm(16))
            for _ in range(3)
        )
        self.head = nn.Linear(16, 1)
        self.recompute = recompute
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant and self.training:
            x = x.requires_grad_()  # what this form needs
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=True)
            return self.head(x)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x))
        return self.head(x)


def build(config: CheckpointedConfig) -> Components:
    model = Blocks(config.recompute, config.reentrant)
    x = torch.randn(64, 16)
    return Components(
        model=model,
        loss=supervised(nn.MSELoss()),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        train_data=TensorDataset(x, x.sin().sum(1, keepdim=True)),
    )


if __name__ == "__main__":
    train(build, CheckpointedConfig)
