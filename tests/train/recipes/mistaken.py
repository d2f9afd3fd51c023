"""Recipes with one mistake each."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from samestep.train import Components, TrainConfig, Weighted, supervised, train


@dataclass
class MistakenConfig(TrainConfig):
    mistake: str = ""
    global_batch_size: int = 4


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(4))


class Stubborn:
    """A state that only pickle could save."""


def image(height: int) -> list[nn.Module]:
    """Three features as an image, of which a convolution leaves two channels and 4 - height pixels."""
    return [nn.Unflatten(1, (1, 3, 1)), nn.Conv2d(1, 2, (height, 1)), nn.BatchNorm2d(2), nn.Flatten()]


NORMS = {
    "norm": lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
    "norm behind another": lambda: nn.Sequential(*image(2), nn.BatchNorm1d(4), nn.Linear(4, 2)),
    "norm of one pixel": lambda: nn.Sequential(*image(3), nn.Linear(2, 2)),
}


def build(config: MistakenConfig) -> Any:  # noqa: C901 (one case a mistake)
    mistake = config.mistake
    x, y = torch.randn(10, 3), torch.randn(10, 2)
    model: Any = nn.Linear(3, 2)
    loss: Any = supervised(nn.MSELoss(reduction="sum" if mistake == "sum" else "mean"))
    data: Any = TensorDataset(x, y)
    if mistake in NORMS:
        model = NORMS[mistake]()
    if mistake == "frozen":
        model.requires_grad_(False)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    losses: dict[str, Any] = {
        "number": lambda m, b: m(b[0]).mean().item(),
        "none": lambda *_: None,
        "detached": lambda m, b: m(b[0]).detach().mean(),
        "no parameter": lambda _, b: b[0].clone().requires_grad_().square().mean(),
        "shape": lambda m, b: m(b[0]),
        "total": lambda m, b: Weighted(m(b[0]), len(b[0])),
        "negative weight": lambda m, b: Weighted(m(b[0]).square().sum(), -len(b[0])),
        "negative tensor": lambda m, b: Weighted(m(b[0]).square().sum(), torch.tensor(-1.0)),
        "infinite tensor": lambda m, b: Weighted(m(b[0]).square().sum(), torch.tensor(float("inf"))),
        "not callable": 3,
    }
    loss = losses.get(mistake, loss)
    if mistake.endswith(" weights"):
        calls = []

        def changing(m: Any, b: Any) -> Any:
            """Without weights first, or (lost weights) with them."""
            calls.append(1)
            mean = m(b[0]).square().mean()
            return Weighted(mean * 3, 3) if (len(calls) > 1) == (mistake == "late weights") else mean

        loss = changing
    if mistake == "empty":
        data = TensorDataset(x[:0], y[:0])
    if mistake == "iterable":
        data = Stream()
    if mistake == "foreign":
        optimizer = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)
    if mistake == "half foreign":
        optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(7))], lr=0.1)
    if mistake == "dict":
        return {"model": model}
    if mistake == "class":
        model = nn.Linear
    if mistake == "nothing":
        return None
    if mistake == "pickle":
        optimizer.param_groups[0]["extra"] = Stubborn()
    if mistake == "eval":
        return Components(model=model, loss=loss, optimizer=optimizer, train_data=data, eval_data=Stream())
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer) if mistake.startswith("plateau") else None
    return Components(
        model=model,
        loss=loss,
        optimizer=optimizer,
        train_data=data,
        eval_data=data if mistake == "plateau metric" else None,
        scheduler=plateau,
        plateau_metric="precision" if mistake == "plateau metric" else "loss",
    )


if __name__ == "__main__":
    train(build, MistakenConfig)
