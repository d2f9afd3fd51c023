"""A model that a forward makes into another one, or whose state_dict can't be loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from samestep.train import Components, TrainConfig, supervised, train


@dataclass
class Config(TrainConfig):
    way: str = ""
    epochs: int = 2
    global_batch_size: int = 8
    log_every: int = 4


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)
        self.way = way
        self.late: Any = nn.Identity()
        self.mean: Tensor | None
        self.calls: Tensor
        self.register_buffer("mean", None)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        if self.way == "buffer":
            self.mean = x.mean(0) if self.mean is None else (self.mean + x.mean(0)) / 2
        if self.way == "cache" and not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(3), persistent=False)
        if self.way == "parameter":
            self.head.bias = nn.Parameter(self.head.bias.detach() * 0.9)
        if self.way == "layer, later" and int(self.calls) > 6:
            self.late = nn.Linear(3, 3)
        if self.way == "gone":
            self.head.register_parameter("bias", None)
        return self.head(self.late(self.body(x)))


class Adapters(Net):
    """Saves the part that trains."""

    def state_dict(self, *words: Any, **named: Any) -> Any:
        return {name: value for name, value in super().state_dict(*words, **named).items() if "body" not in name}


class Tolerant(Adapters):
    """Finds nothing missing."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, False, assign)


class Forgetful(Net):
    """Saves all, and loads a part."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({n: v for n, v in state_dict.items() if "head" not in n}, False, assign)


class Head(nn.Linear):
    """A part that loads nothing of its own, or not how often it was called."""

    def __init__(self, way: str) -> None:
        super().__init__(3, 1)
        self.way = way
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
        if self.training:
            self.seen += 1
        return super().forward(input)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        mine = ("weight", "bias", "seen") if self.way == "forgetful part" else ("seen",)
        super()._load_from_state_dict(
            {n: v for n, v in state_dict.items() if n not in [prefix + m for m in mine]}, prefix, *more
        )
        more[2].clear()


class OfParts(Net):
    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.head = Head(way)


class Renamed(Net):
    """A pair that fits."""

    def state_dict(self, *words: Any, **named: Any) -> Any:
        return {name.replace("body", "stem"): value for name, value in super().state_dict(*words, **named).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(
            {name.replace("stem", "body"): v for name, v in state_dict.items()}, strict, assign
        )


def build(config: Config) -> Components:
    kinds = {"adapters": Adapters, "tolerant": Tolerant, "frozen": Tolerant, "forgetful": Forgetful, "renamed": Renamed}
    kinds |= {"forgetful part": OfParts, "uncounted part": OfParts}
    model = kinds.get(config.way, Net)(config.way)
    model.body.requires_grad_(config.way != "frozen")
    return Components(
        model=model,
        loss=supervised(nn.MSELoss()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_data=TensorDataset(torch.randn(32, 3), torch.randn(32, 1)),
    )


if __name__ == "__main__":
    train(build, Config)
