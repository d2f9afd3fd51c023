"""Recipes with one part that torch takes and a run can't use, each named before it does harm."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, train


@dataclass
class UnusualConfig(TrainConfig):
    part: str = ""
    global_batch_size: int = 4


def error(model: Any, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean(1)


def no_weight_gradient(parts: Components) -> None:
    def clear(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.zero_()

    weight: Any = parts.model.weight
    weight.register_post_accumulate_grad_hook(clear)


def every_batch(parts: Components) -> None:
    parts.scheduler = torch.optim.lr_scheduler.StepLR(parts.optimizer, 1)
    parts.scheduler_interval = "batch"  # type: ignore[assignment]


class Remembering(torch.optim.SGD):
    """Puts what only pickle can save into its state, in its first update."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("last", deque(maxlen=3)).append(1.0)
        return super().step(closure)


def remembering(parts: Components) -> None:
    parts.optimizer = Remembering(parts.model.parameters(), lr=0.1)


PARTS: dict[str, Callable[[Components], None]] = {
    "": lambda parts: None,
    "hook": no_weight_gradient,
    "interval": every_batch,
    "deque": remembering,
}


def build(config: UnusualConfig) -> Components:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(10, 3), torch.randn(10, 2))
    parts = Components(model=model, loss=error, optimizer=optimizer, train_data=data)
    PARTS[config.part](parts)
    return parts


if __name__ == "__main__":
    train(build, UnusualConfig)
