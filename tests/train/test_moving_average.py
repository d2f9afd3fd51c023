"""The average of the weights: torch's bits, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from samestep.launcher.contract import UsageError
from samestep.train.moving_average import MovingAverage


class Mixed(nn.Module):
    """Tied, frozen, of several types, with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 5)
        self.last.weight = self.first.weight
        self.narrow = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
        self.broad = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.count = nn.Parameter(torch.tensor([3]), requires_grad=False)
        self.norm = nn.BatchNorm1d(5)


def test_it_has_the_bits_of_torchs_average() -> None:
    model = Mixed()
    ours = MovingAverage(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter))
            model.norm(torch.randn(4, 5))
        theirs.update_parameters(model)
        ours.update_parameters(model)
        mine, others = ours.state_dict(), theirs.state_dict()
        assert list(mine) == list(others)
        assert all(torch.equal(mine[name], others[name]) for name in others)


def test_torchs_own_updates_are_not_asked_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """They make the host wait for a GPU."""
    average = MovingAverage(nn.Linear(3, 3), 0.5)
    average.update_parameters(nn.Linear(3, 3))
    monkeypatch.delattr(AveragedModel, "update_parameters")
    average.update_parameters(nn.Linear(3, 3))
    assert int(average.n_averaged) == 2


def test_a_state_goes_from_one_to_the_other() -> None:
    model = nn.Linear(3, 3)
    saved, restored = MovingAverage(model, 0.5), MovingAverage(nn.Linear(3, 3), 0.5)
    for average in (saved, saved, restored):
        average.update_parameters(model)
        nn.init.ones_(model.weight)
    restored.load_state_dict(saved.state_dict())
    for average in (saved, restored):
        average.update_parameters(model)
    mine, others = saved.state_dict(), restored.state_dict()
    assert all(torch.equal(mine[name], others[name]) for name in others)


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        MovingAverage(nn.Linear(1, 1), decay)


def test_buffers_follow_in_whatever_form_a_forward_puts_them() -> None:
    """Expanded ones can't be copied into, nor can those of another shape."""
    model = nn.Linear(3, 3)
    model.register_buffer("scale", torch.ones(1).expand(3))
    model.register_buffer("mask", torch.zeros(0), persistent=False)
    average = MovingAverage(model, 0.5)
    for size in (4, 3):
        model.mask = torch.arange(size)
        average.update_parameters(model)
        for name, buffer in model.named_buffers():
            assert torch.equal(average.module.get_buffer(name), buffer)


@pytest.mark.parametrize("updates", [0, 1])
@pytest.mark.parametrize(
    ("late", "said"),
    [(nn.Linear(3, 2), "last.weight is new"), (None, "first.weight is gone"), (nn.Linear(2, 2), "first.weight is ano")],
)
def test_a_model_that_a_forward_makes_into_another_one_is_named(
    late: nn.Module | None, said: str, updates: int
) -> None:
    model = nn.ModuleDict({"first": nn.Linear(3, 3)})
    average = MovingAverage(model, 0.5)
    for _ in range(updates):
        average.update_parameters(model)
    if late is None:
        del model["first"]
    else:
        model["last" if "new" in said else "first"] = late
    with pytest.raises(UsageError, match=said):
        average.update_parameters(model)


def test_a_layer_without_weights_may_come_later() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = MovingAverage(model, 0.5)
    model.append(nn.ReLU())
    average.update_parameters(model)
    model[1](torch.randn(4, 3))
    average.update_parameters(model)
    name = "1.running_mean"
    assert torch.equal(average.module.get_buffer(name), model.get_buffer(name))
