"""State that no checkpoint has is named wherever the loss, the model, the optimizer or the scheduler reaches it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samestep.train.observe.guards.attributes import PlainAttributes
from samestep.train.observe.guards.check import Subject
from samestep.train.parallel.shards import StepPlan

COUNT = 0


class Anneal:
    """No module, no scheduler: whoever calls it counts."""

    def __init__(self) -> None:
        self.calls = 0

    def step(self) -> float:
        self.calls += 1
        return 1 / self.calls


class Net(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 1)
        self.anneal = Anneal()


class Counting(torch.optim.SGD):
    """Warms up by a number of its own; `saves` it or does not."""

    def __init__(self, parameters: Any, *, saves: bool) -> None:
        super().__init__(parameters, lr=0.1)
        self.calls, self.saves = 0, saves
        self.slow: list[Tensor] = []

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        if not self.saves:
            self.slow = [torch.full((2,), float(self.calls))]
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({"how often": self.calls} if self.saves else {})


class Decay:
    def __init__(self) -> None:
        self.calls = 0

    def step(self) -> None:
        self.calls += 1

    def state_dict(self) -> dict[str, Any]:
        return {}


def counted(model: nn.Module) -> float:
    global COUNT
    COUNT += 1
    return 1 / COUNT


def told(way: str) -> list[str]:
    model, anneal, held = Net(), Anneal(), {"anneal": Anneal()}
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters())
    if way.startswith("optimizer"):
        optimizer = Counting(model.parameters(), saves=way.endswith("saves"))
    scheduler: Any = Decay() if way == "scheduler" else torch.optim.lr_scheduler.StepLR(optimizer, 2)
    losses = {
        "closure": lambda net, x: net(x).mean() * anneal.step(),
        "dict": lambda net, x: net(x).mean() * held["anneal"].step(),
        "module": lambda net, x: net(x).mean() * net.anneal.step(),
        "function": lambda net, x: net(x).mean() * counted(net),
    }
    loss = losses.get(way, lambda net, x: net(x).mean())
    check = PlainAttributes(Subject(model, optimizer, loss, scheduler))
    for step in range(3):
        plan = StepPlan(step, 0, 0, 2, 1)
        check.before_step(plan)
        check.before_loss(None, 2)
        loss(model, torch.ones(2, 2)).backward()
        check.after_loss()
        optimizer.step()
        scheduler.step()
        check.after_step(plan)
    return [finding.text for finding in check.conclude()]


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("closure", "the loss changes what it keeps outside of the model: anneal.calls"),
        ("dict", "the loss changes what it keeps outside of the model: held['anneal'].calls"),
        ("module", "the loss changes plain attributes of the model: Net.anneal.calls"),
        ("function", "the loss changes what it keeps outside of the model: COUNT"),
        ("optimizer", "the optimizer changes what its state_dict leaves out: Counting.calls, Counting.slow"),
        ("scheduler", "the scheduler changes what its state_dict leaves out: Decay.calls"),
    ],
)
def test_what_changes_beside_all_that_is_saved_is_named(way: str, expected: str) -> None:
    assert told(way) == [expected]


@pytest.mark.parametrize("way", ["nothing", "optimizer that saves"])
def test_torchs_own_parts_and_what_is_saved_by_another_name_raise_no_alarm(way: str) -> None:
    assert told(way) == []
