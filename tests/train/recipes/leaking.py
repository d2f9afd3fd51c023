"""Recipes with one leak each: state that goes from one step, shard or rank to another behind the loop's back."""

import itertools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from samestep.train import Components, TrainConfig, train


@dataclass
class LeakingConfig(TrainConfig):
    leak: str = ""
    global_batch_size: int = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4, momentum=0.5)
        self.drop = nn.Dropout(0.25)
        self.last = nn.Linear(4, 2)
        self.other = nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(1))
        self.detour: Any = nn.Identity()
        self.asks = False  # for its rank
        self.uses_other = True
        self.history: list[Tensor] = []
        self.counts, self.count, self.started = "", 0, False
        self.length, self.ratio = 0, float("nan")

    def forward(self, x: Tensor) -> Tensor:
        self.length = len(x)  # seen anew in each batch
        if self.counts == "numbers":
            self.detour.calls = getattr(self.detour, "calls", 0) + 1
            self.count += 1
        if self.counts == "flag":
            self.started = True
        if self.asks and os.environ.get("RANK") == "1":
            x = self.detour(x)
        hidden = self.drop(self.norm(self.first(x)).relu())
        return self.last(hidden) + 0.5 * self.other(hidden) if self.uses_other else self.last(hidden)


class Noisy(torch.optim.SGD):
    """Draws from the global stream in its update."""

    def step(self, closure: Any = None) -> Any:
        super().step()
        torch.rand(1)


class Lazy(torch.optim.SGD):
    """Clears nothing."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


class Decaying(torch.optim.lr_scheduler.LinearLR):
    """Changes a tensor of the model besides."""

    weight: Any

    def step(self, epoch: Any = None) -> None:
        super().step()
        self.weight.data.mul_(0.5).add_(1.0)


class Stream(Dataset[Any]):
    """Reads on, whatever it is asked for."""

    def __init__(self) -> None:
        self.position = 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.position += 1
        return torch.full((3,), float(self.position)), torch.zeros(2)


def mean(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean(1)


class Leaks:
    """A loss a leak; what is not listed is in `build`."""

    def __init__(self, net: Net, scheduler: Any) -> None:
        self.net, self.scheduler = net, scheduler
        self.calls = itertools.count()

    def __call__(self, model: Any, batch: Any) -> Tensor:
        return mean(model, batch)


class Backward(Leaks):
    def __call__(self, model: Any, batch: Any) -> Tensor:
        mean(self.net, batch).mean().backward()
        return super().__call__(model, batch)


class OwnBackward(Leaks):
    def __call__(self, model: Any, batch: Any) -> Tensor:
        loss = super().__call__(model, batch).mean()
        loss.backward()
        return loss


class OwnLoop(OwnBackward):
    def __call__(self, model: Any, batch: Any) -> Tensor:
        loss = super().__call__(model, batch)
        self.scheduler.optimizer.step()
        self.scheduler.optimizer.zero_grad()
        return loss


class Toggle(Leaks):
    def __call__(self, model: Any, batch: Any) -> Tensor:
        loss = super().__call__(model, batch)
        model.eval()
        return loss


class ToggleOnOneRank(Toggle):
    def __call__(self, model: Any, batch: Any) -> Tensor:
        return super().__call__(model, batch) if os.environ.get("RANK") == "1" else mean(model, batch)


class Evaluated(Leaks):
    def __call__(self, model: Any, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return super().__call__(model, batch)
        model.eval()
        loss = super().__call__(model, batch)
        model.train()
        return loss


class Graph(Leaks):
    def __call__(self, model: Any, batch: Any) -> Tensor:
        loss = super().__call__(model, batch)
        self.net.history.append(loss.sum())
        return loss


class Constant(Leaks):
    def __call__(self, model: Any, batch: Any) -> Tensor:
        return super().__call__(model, batch) * 0.0 + 1.0


class Clamp(Leaks):
    def __call__(self, model: Any, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            self.net.first.weight.data.mul_(0.5)  # .data: no version counter tells of it
        return super().__call__(model, batch)


class Bound(Leaks):
    """Changes nothing where it has been before."""

    def __call__(self, model: Any, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            self.net.first.weight.data.clamp_(-0.1, 0.1)
        return super().__call__(model, batch)


class LateClamp(Leaks):
    """Begins when nobody looks any more."""

    def __call__(self, model: Any, batch: Any) -> Tensor:
        if torch.is_grad_enabled() and next(self.calls) >= 8:
            self.net.first.weight.data.mul_(0.5)
        return super().__call__(model, batch)


class Scalar(Leaks):
    """A mean tells nothing of how many samples there were."""

    def __call__(self, model: Any, batch: Any) -> Tensor:
        return super().__call__(model, batch).mean()


class Elsewhere(Leaks):
    def __call__(self, model: Any, batch: Any) -> Tensor:
        loss = super().__call__(model, batch)
        if not hasattr(self.net, "mask"):
            self.net.register_buffer("mask", torch.zeros(2, device="meta"), persistent=False)
        return loss


class Twice(Leaks):
    def __call__(self, model: Any, batch: Any) -> Tensor:
        loss = super().__call__(model, batch)
        self.scheduler.step()
        return loss


class Collective(Leaks):
    def __call__(self, model: Any, batch: Any) -> Tensor:
        loss = super().__call__(model, batch)
        torch.distributed.all_reduce(loss.detach().mean())
        return loss


class Late(Leaks):
    """Stops using a layer."""

    def __call__(self, model: Any, batch: Any) -> Tensor:
        self.net.uses_other = next(self.calls) < 5
        return super().__call__(model, batch)


class Unused(Leaks):
    def __init__(self, net: Net, scheduler: Any) -> None:
        super().__init__(net, scheduler)
        net.uses_other = False


class Assigned(Leaks):
    """Sets a gradient by hand after each step, which the loop clears, and before the next loss."""

    def __call__(self, model: Any, batch: Any) -> Tensor:
        loss = super().__call__(model, batch)
        self.net.first.weight.grad = torch.ones_like(self.net.first.weight)
        return loss


LOSSES: dict[str, type[Leaks]] = {
    "backward": Backward,
    "own backward": OwnBackward,
    "own loop": OwnLoop,
    "toggle": Toggle,
    "toggle on rank 1": ToggleOnOneRank,
    "evaluated": Evaluated,
    "graph": Graph,
    "constant": Constant,
    "clamp": Clamp,
    "bound": Bound,
    "late clamp": LateClamp,
    "half": Scalar,
    "double": Scalar,
    "elsewhere": Elsewhere,
    "twice": Twice,
    "collective": Collective,
    "late": Late,
    "unused": Unused,
    "assigned": Assigned,
}


def disturbing(net: Net, leak: str) -> Any:
    def metric(model: Any, batch: Any) -> Tensor:
        if leak == "evaluation trains":
            model.train()
        if leak == "evaluation changes":
            net.first.weight.data.add_(1.0)
        return mean(model, batch).mean()

    return metric


def half(items: list[Any]) -> Any:
    return torch.utils.data.default_collate(items[: max(1, len(items) // 2)])


def double(items: list[Any]) -> Any:
    return torch.utils.data.default_collate(items * 2)


def counting() -> Any:
    batches = 0

    def collate(items: list[Any]) -> Any:
        nonlocal batches
        batches += 1
        x, y = torch.utils.data.default_collate(items)
        return x * (batches < 100), y

    return collate


def drawing() -> Any:
    own = torch.Generator().manual_seed(1)

    def collate(items: list[Any]) -> Any:
        x, y = torch.utils.data.default_collate(items)
        return x + torch.randn(x.shape, generator=own), y

    return collate


def setting_gradients(net: Net) -> Any:
    def collate(items: list[Any]) -> Any:
        net.first.weight.grad = torch.ones_like(net.first.weight)
        return torch.utils.data.default_collate(items)

    return collate


def build(config: LeakingConfig) -> Components:
    leak = config.leak
    x, y = torch.randn(24, 3), torch.randn(24, 2)
    net = Net()
    rate = 0.0 if leak == "zero rate" else 0.05
    held = net.last.parameters() if leak == "unheld" else net.parameters()
    kind = {"noisy": Noisy, "lazy": Lazy}.get(leak, torch.optim.SGD)
    optimizer = kind(held, lr=rate)
    if leak.startswith("between"):
        Decaying.weight = net.seen if leak == "between, a buffer" else net.first.weight
    rates: Any = Decaying if leak.startswith("between") else torch.optim.lr_scheduler.LinearLR
    scheduler = rates(optimizer, start_factor=0.5, total_iters=4)
    if leak == "attribute":
        net.last.scale = torch.ones(2, device="meta")
    if leak == "frozen mode":
        net.norm.train = lambda mode=True: nn.Module.train(net.norm, False)  # type: ignore[method-assign]
    net.asks = leak == "rank"
    net.counts = leak.removeprefix("plain ")
    loss: Any = LOSSES.get(leak, Leaks)(net, scheduler)
    collates = {"half": half, "double": double, "counts": counting(), "draws": drawing()}
    return Components(
        model=net,
        loss=loss,
        optimizer=optimizer,
        scheduler=scheduler,
        train_data=Stream() if leak == "stream" else TensorDataset(x, y),
        eval_data=TensorDataset(x, y),
        metrics={"error": disturbing(net, leak)},
        collate_fn=(collates | {"uncleared": setting_gradients(net)}).get(leak),
    )


if __name__ == "__main__":
    train(build, LeakingConfig)
