"""What a loss keeps outside of parameters and buffers is named where it changes, and only there."""

from __future__ import annotations

import functools
import itertools
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from samestep.train import supervised
from samestep.train.observe.guards.attributes import PlainAttributes
from samestep.train.observe.guards.check import Subject
from samestep.train.parallel.shards import StepPlan

STATE, LOSS, DRAWN = "plain attributes of the model: ", "keeps outside of the model: ", "random numbers of its own: "
number_of_losses = 0
X = torch.arange(6.0).reshape(3, 2)


def told(model: nn.Module, loss: Any, losses: int = 3) -> list[str]:
    check = PlainAttributes(Subject(model, torch.optim.SGD(model.parameters(), lr=0.1), loss))
    for step in range(losses):
        plan = StepPlan(step, 0, 0, 3, 1)
        check.before_step(plan)
        check.before_loss(None, 3)
        loss(model, (X, X))
        check.after_loss()
        check.after_step(plan)
    return [finding.text for finding in check.conclude()]


class Keeps(nn.Module):
    def __init__(self, **kept: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name, value in kept.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


class Centered(nn.Module):
    """A criterion with a buffer, as that of DINO."""

    def __init__(self) -> None:
        super().__init__()
        self.center: Tensor
        self.register_buffer("center", torch.zeros(2))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        self.center = 0.9 * self.center + 0.1 * output.detach().mean(0)
        return (output - self.center - y).square().mean()


class Counting:
    def __init__(self) -> None:
        self.calls, self.quiet = 0, itertools.count()

    def __call__(self, model: Any, batch: Any) -> Any:
        self.calls += 1
        return model(batch[0]).mean() * next(self.quiet)

    def method(self, model: Any, batch: Any) -> Any:
        return self(model, batch)


CHANGES = {
    "tensor": (torch.zeros(2), lambda model: model.kept.add_(1), STATE),
    "list": ([], lambda model: model.kept.append(1.0), STATE),
    "full queue": (deque([1, 2], maxlen=2), lambda model: model.kept.append(model.kept[0] + 2), STATE),
    "nested": ({"seen": {"n": 0}}, lambda model: model.kept["seen"].update(n=model.kept["seen"]["n"] + 1), STATE),
    "array": (np.zeros(2), lambda model: model.kept.__iadd__(1), STATE),
    "generator of torch": (torch.Generator().manual_seed(1), lambda model: torch.rand(1, generator=model.kept), DRAWN),
    "generator of numpy": (np.random.default_rng(1), lambda model: model.kept.random(), DRAWN),
    "generator of old": (np.random.RandomState(1), lambda model: model.kept.rand(), DRAWN),
    "generator of Python": (random.Random(1), lambda model: model.kept.random(), DRAWN),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changes_in_each_loss_is_named(kind: str) -> None:
    kept, change, text = CHANGES[kind]
    model = Keeps(kept=kept)

    def loss(model: Any, batch: Any) -> Any:
        change(model)
        return model(batch[0]).mean()

    (found,) = told(model, loss)
    assert text in found
    assert "Keeps.kept" in found


def test_a_loss_is_looked_into() -> None:
    calls, centers = 0, {"center": torch.zeros(2)}

    def closes_over(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        centers["center"] += 1
        return model(batch[0]).mean()

    def names_a_global(model: Any, batch: Any) -> Any:
        global number_of_losses
        number_of_losses += 1
        return model(batch[0]).mean()

    def has_a_default(model: Any, batch: Any, seen: list[int] = []) -> Any:  # noqa: B006 (what is looked for)
        seen.append(1)
        return model(batch[0]).mean()

    def adds(seen: list[int], model: Any, batch: Any) -> Any:
        seen.append(1)
        return model(batch[0]).mean()

    teacher = nn.BatchNorm1d(2)
    for loss, name in (
        (closes_over, "calls, centers"),
        (names_a_global, "number_of_losses"),
        (has_a_default, "a default"),
        (functools.partial(adds, []), "argument 0"),
        (Counting(), "Counting.calls"),
        (Counting().method, "Counting.calls"),
        (supervised(Centered()), "supervised.criterion.center"),
        (lambda model, batch: teacher(model(batch[0])).mean(), "teacher.running_mean, teacher.running_var"),
    ):
        (found,) = told(Keeps(), loss)
        assert found.partition(LOSS)[2].startswith(name), found


def test_a_buffer_that_forward_makes_is_named_where_it_goes_on_changing() -> None:
    model = Keeps()
    for name in ("mean", "mask"):
        model.register_buffer(name, None, persistent=False)

    def loss(model: Any, batch: Any) -> Any:
        model.mean = batch[0].mean(0) if model.mean is None else 0.5 * model.mean + 1
        model.mask = torch.ones(2)
        return model(batch[0]).mean()

    (found,) = told(model, loss)
    assert found.endswith(f"{STATE}mean")


def test_what_stays_or_was_set_up_once_or_belongs_to_the_step_is_no_state() -> None:
    model = Keeps(mask=None, output=None, sizes={}, shape=None, table=torch.ones(3))
    constants = [1, 2, torch.ones(2)]

    def loss(model: Any, batch: Any) -> Any:
        if model.mask is None:
            model.mask, model.sizes[len(batch[0])] = torch.ones(2), 1.0
        model.shape = batch[0].shape
        model.table = torch.ones(3)
        model.output = model(batch[0])  # with its graph
        return model.output.mean() * constants[0]

    assert told(model, loss) == []


def test_one_loss_tells_nothing() -> None:
    model = Keeps(kept=[], count=0)

    def loss(model: Any, batch: Any) -> Any:
        model.kept.append(1)
        model.count += 1
        return model(batch[0]).mean()

    assert told(model, loss, losses=1) == []


class Ramp:
    """A collate_fn that masks more from batch to batch."""

    def __init__(self, start: int) -> None:
        self.batches, self.start = 0, start

    def __call__(self, samples: list[Any]) -> Tensor:
        self.batches += 1
        return torch.stack(samples) * (self.batches > self.start)


def test_a_collate_fn_is_looked_into() -> None:
    model, ramp = Keeps(), Ramp(10)
    check = PlainAttributes(Subject(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), collate_fn=ramp))
    plan = StepPlan(0, 0, 0, 3, 1)
    for _ in range(3):
        check.before_step(plan)
        ramp([X, X])
        check.after_step(plan)
    (found,) = check.conclude()
    assert found.text == "collate_fn changes what it keeps: Ramp.batches"
    for _ in range(3):
        check.before_step(plan)
        check.after_step(plan)
    assert list(check.conclude()) == []


GENERATOR = torch.Generator().manual_seed(3)
CALLS = {"n": 0}


def dropped(hidden: Tensor) -> Tensor:
    return hidden * (torch.rand(hidden.shape, generator=GENERATOR) > 0.5)


def count_calls() -> None:
    CALLS["n"] += 1


class DrawsInForward(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        return self._rest(self.layer(x))

    def _rest(self, hidden: Tensor) -> Tensor:
        return dropped(hidden)


class CountsInForward(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        count_calls()
        return self.layer(x)


class CountsOnItsClass(Keeps):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        CountsOnItsClass.calls += 1
        return self.layer(x)


def hooked() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda module, args, output: count_calls())
    return model


def calling(model: Any, batch: Any) -> Tensor:
    count_calls()
    return model(batch[0]).sum()


def plain(model: Any, batch: Any) -> Tensor:
    return model(batch[0]).sum()


@pytest.mark.parametrize(
    ("make", "loss", "expected"),
    [
        (DrawsInForward, plain, DRAWN + "GENERATOR"),
        (CountsInForward, plain, LOSS + "CALLS"),
        (CountsOnItsClass, plain, STATE + "CountsOnItsClass.calls"),
        (hooked, plain, LOSS + "CALLS"),
        (lambda: nn.Linear(2, 2), calling, LOSS + "CALLS"),
        (lambda: nn.Linear(2, 2), supervised(nn.MSELoss()), ""),
    ],
)
def test_what_the_functions_of_loss_and_modules_reach_is_named(make: Any, loss: Any, expected: str) -> None:
    found = told(make(), loss)
    assert len(found) == bool(expected), found  # a collate_fn, of which there is none, is not blamed
    assert all(expected in text for text in found)


def test_a_learning_rate_that_the_loss_changes_is_named() -> None:
    model = nn.Linear(2, 2)
    groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)

    def decaying(model: Any, batch: Any) -> Tensor:
        optimizer.param_groups[1]["lr"] *= 0.9
        return model(batch[0]).sum()

    check = PlainAttributes(Subject(model, optimizer, decaying))
    for _ in range(3):
        check.before_loss(None, 3)
        decaying(model, (X, X))
        check.after_loss()
    assert [finding.text for finding in check.conclude()] == [
        "the loss changes settings of the optimizer: lr of group 1"
    ]
