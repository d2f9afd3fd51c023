"""Recipes with one part that torch takes and a run can't use, each named before it does harm."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, Weighted, train


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


class Lookahead(torch.optim.Optimizer):
    """As many write it: around another one, and without Optimizer.__init__."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)


def around(parts: Components) -> None:
    parts.optimizer = Lookahead(parts.optimizer)


def closing(parts: Components) -> None:
    parts.optimizer = torch.optim.LBFGS(parts.model.parameters())
    parts.scheduler = torch.optim.lr_scheduler.StepLR(parts.optimizer, 1)


def lazy(parts: Components) -> None:
    parts.model = nn.LazyLinear(2)
    parts.optimizer = torch.optim.SGD(parts.model.parameters(), lr=0.1)


def old_weight_norm(parts: Components) -> None:
    layer = nn.utils.weight_norm(nn.Linear(3, 2))
    parts.model = nn.Sequential(nn.Identity(), nn.Sequential(layer))
    parts.optimizer = torch.optim.SGD(parts.model.parameters(), lr=0.1)
    parts.ema = 0.9
    layer(torch.ones(1, 3))  # its weight is a result from here on


def logged(value: Callable[[Tensor], Any]) -> Callable[[Components], None]:
    def change(parts: Components) -> None:
        def loss(model: Any, batch: Any) -> Weighted:
            each = error(model, batch)
            return Weighted(each.sum(), len(each), log={"seen": value(each)})

        parts.loss = loss

    return change


def unasked(parts: Components) -> None:
    parts.metrics, parts.eval_data = {"error": error}, None


def rotated(parts: Components) -> None:
    parts.loss = lambda model, batch: error(model, batch).mean() + 0j


def rotated_sum(parts: Components) -> None:
    parts.loss = lambda model, batch: Weighted(error(model, batch).sum() + 0j, 4)


def penalised(parts: Components) -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return error(model, batch) + slope.square().mean(1)

    parts.loss, parts.eval_data = loss, parts.train_data


PARTS: dict[str, Callable[[Components], None]] = {
    "": lambda parts: None,
    "hook": no_weight_gradient,
    "interval": every_batch,
    "deque": remembering,
    "around": around,
    "closure": closing,
    "lazy": lazy,
    "weight norm": old_weight_norm,
    "vector": logged(lambda each: each),
    "word": logged(lambda each: "large"),
    "unasked": unasked,
    "number": logged(lambda each: np.float32(each.mean().item())),
    "complex": rotated,
    "complex sum": rotated_sum,
    "penalty": penalised,
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
