"""A run goes on with the state that was saved: dtypes, layout in memory, what trains, what changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, AdamW, NAdam, Optimizer
from torch.utils.data import TensorDataset

from samestep.launcher.contract import RunDir, UsageError
from samestep.train import Components, supervised
from samestep.train.moving_average import MovingAverage
from samestep.train.scaling import Unscaled
from samestep.train.state import checkpoint
from samestep.train.state.as_saved import load_optimizer
from samestep.train.state.first_update import with_savable_state
from samestep.train.state.train_state import TrainState

Make = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, tuple[Make, torch.dtype]] = {
    "fused": (lambda p: AdamW(p, lr=0.1, fused=True), torch.float32),
    "fused momentum": (lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True), torch.float32),
    "NAdam": (lambda p: NAdam(p, lr=0.1), torch.float64),
    "NAdam, narrow": (lambda p: NAdam(p, lr=0.1), torch.bfloat16),
    "ASGD": (lambda p: ASGD(p, lr=0.1, t0=2.0, lambd=0.1), torch.bfloat16),
}


def state_with(make: Make, kind: torch.dtype) -> TrainState:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model: Any = nn.Conv2d(3, 4, 3).to(kind)
    model.to(memory_format=torch.channels_last)
    data = TensorDataset(torch.zeros(1))
    parts = Components(model=model, loss=supervised(nn.MSELoss()), optimizer=make(model.parameters()), train_data=data)
    return TrainState(parts, Unscaled(), None, {})


def run(state: TrainState, steps: range) -> None:
    for step in steps:
        state.components.optimizer.zero_grad()
        x = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(step))
        weight = next(state.components.model.parameters())
        state.components.model(x.to(weight.dtype)).square().mean().backward()
        state.components.optimizer.step()
        state.step = step + 1


def saved_and_loaded(state: TrainState, other: TrainState, folder: Path) -> None:
    run_dir = RunDir(folder)
    run_dir.checkpoints.mkdir()
    other.restore(checkpoint.load(checkpoint.commit(state.capture(0), run_dir, 0, 1)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_in_its_own_bits(name: str, tmp_path: Path) -> None:
    """torch casts what it loads to the parameter's dtype; fused updates go through memory, whatever the strides are."""
    goes_on(*OPTIMIZERS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD".split(),
)
def test_every_optimizer_of_torch_goes_on_in_its_own_bits(name: str, kind: torch.dtype, tmp_path: Path) -> None:
    optimizer: Any = getattr(torch.optim, name)
    goes_on(lambda parameters: optimizer(parameters, lr=0.05), kind, tmp_path)


def goes_on(make: Make, kind: torch.dtype, folder: Path) -> None:
    whole, first, resumed = (state_with(make, kind) for _ in range(3))
    run(whole, range(6))
    run(first, range(3))
    saved_and_loaded(first, resumed, folder)
    assert forms_of(resumed) == forms_of(first)
    run(resumed, range(3, 6))
    expected, found = (list(state.components.model.parameters()) for state in (whole, resumed))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def forms_of(state: TrainState) -> dict[Any, Any]:
    of_parameters = state.components.optimizer.state_dict()["state"]
    return {
        (key, name): (value.dtype, value.stride())
        for key, values in of_parameters.items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def test_layers_train_as_they_did_whatever_was_thawed_or_frozen_since(tmp_path: Path) -> None:
    make = OPTIMIZERS["fused"]
    first, resumed = state_with(*make), state_with(*make)
    dict(first.components.model.named_parameters())["bias"].requires_grad_(False)
    saved_and_loaded(first, resumed, tmp_path)
    assert [p.requires_grad for p in resumed.components.model.parameters()] == [True, False]
    resumed.restore(state_with(*make).capture(0))  # back to before, as after a batch that was not finite
    assert [p.requires_grad for p in resumed.components.model.parameters()] == [True, True]


def test_an_expanded_buffer_can_be_loaded(tmp_path: Path) -> None:
    make = OPTIMIZERS["fused"]
    first, resumed = state_with(*make), state_with(*make)
    for state, value in ((first, 2.0), (resumed, 1.0)):
        state.components.model.register_buffer("scale", torch.full((1,), value).expand(3))
    saved_and_loaded(first, resumed, tmp_path)
    assert resumed.components.model.get_buffer("scale").tolist() == [2.0] * 3


def test_a_buffer_of_two_modules_is_loaded_into_both_where_one_has_put_it_anew(tmp_path: Path) -> None:
    make = OPTIMIZERS["fused"]
    first, resumed = state_with(*make), state_with(*make)
    for state in (first, resumed):
        inner, scale = nn.Module(), torch.zeros(2)
        state.components.model.register_module("inner", inner)
        for module in (state.components.model, inner):
            module.register_buffer("scale", scale)
    first.components.model.get_submodule("inner")._buffers["scale"] = torch.ones(2)
    saved_and_loaded(first, resumed, tmp_path)
    assert resumed.components.model.get_buffer("scale").tolist() == [0.0, 0.0]
    assert resumed.components.model.get_buffer("inner.scale").tolist() == [1.0, 1.0]


class Two:
    """Optimizers in one, as for two kinds of parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.inner: list[Optimizer] = [NAdam([each], lr=0.1) for each in parameters]

    def state_dict(self) -> dict[str, Any]:
        return {"inner": [each.state_dict() for each in self.inner]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for each, own in zip(self.inner, state["inner"], strict=True):
            each.load_state_dict(own)


def stepped(two: Two) -> Two:
    for each in two.inner:
        for parameter in each.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, 0.3)
        each.step()
    return two


def test_optimizers_inside_of_another_keep_their_dtypes_too() -> None:
    first, other = (Two([nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2)]) for _ in range(2))
    saved = copy.deepcopy(stepped(first).state_dict())
    load_optimizer(other, saved)  # type: ignore[arg-type]
    for mine, theirs in zip(other.inner, first.inner, strict=True):
        for now, before in zip(mine.state_dict()["state"].values(), theirs.state_dict()["state"].values(), strict=True):
            assert now["mu_product"].dtype == torch.float32
            assert all(torch.equal(now[name], before[name]) for name in before)


def test_an_optimizer_that_does_not_bring_back_what_it_saved_is_refused() -> None:
    saved = copy.deepcopy(stepped(Two([nn.Parameter(torch.ones(2))])).state_dict())
    with_other_bits = Two([nn.Parameter(torch.ones(2))])

    class Halved(Two):
        def state_dict(self) -> dict[str, Any]:
            state = copy.deepcopy(super().state_dict())
            for values in state["inner"][0]["state"].values():
                values["exp_avg"] = values["exp_avg"] / 2
            return state

    load_optimizer(with_other_bits, saved)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Halved\.load_state_dict does not bring back what was saved as 'exp_avg'"):
        load_optimizer(Halved([nn.Parameter(torch.ones(2))]), saved)  # type: ignore[arg-type]


def test_a_group_that_is_added_while_it_trains_is_refused_at_once() -> None:
    model = nn.Linear(2, 1)
    optimizer, told = SGD([model.weight], lr=0.1), list[nn.Module]()
    follow = with_savable_state(optimizer, told.append)
    follow(model)
    optimizer.add_param_group({"params": [model.bias]})
    with pytest.raises(UsageError, match="keep the 1 parameter groups of build, but has 2 now"):
        follow(model)
    assert told == [model]


def deep(
    optimizer: Callable[[list[Any]], Optimizer], *, schedule: bool = False, kind: torch.dtype = torch.float32
) -> TrainState:
    """Two layers of one shape; the optimizer gets their parameters as a list."""
    torch.manual_seed(1)
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(kind)
    made = optimizer(list(model.parameters()))
    scheduler = torch.optim.lr_scheduler.StepLR(made, 1) if schedule else None
    data = TensorDataset(torch.zeros(1))
    parts = Components(model=model, loss=supervised(nn.MSELoss()), optimizer=made, scheduler=scheduler, train_data=data)
    return TrainState(parts, Unscaled(), None, {})


def adam(parameters: list[Any]) -> Optimizer:
    return torch.optim.Adam(parameters)


OTHERS: dict[str, tuple[Callable[[], TrainState], str]] = {
    "order": (
        lambda: deep(lambda p: torch.optim.Adam([*p[2:], *p[:2]])),
        "parameter 0 of the optimizer is 1.weight, there it is 0.weight",
    ),
    "kind": (lambda: deep(lambda p: torch.optim.Adamax(p)), "the optimizer is Adamax, there it is Adam"),
    "scheduler": (lambda: deep(adam, schedule=True), "scheduler is None there alone"),
    "dtype": (lambda: deep(adam, kind=torch.float64), "0.weight is torch.float64, there it is torch.float32"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_state_goes_on_in_the_parts_that_it_came_from_or_not_at_all(what: str, tmp_path: Path) -> None:
    state, (other, said) = deep(adam), OTHERS[what]
    for parameter in state.components.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.components.optimizer.step()
    saved_and_loaded(state, deep(adam), tmp_path)
    snapshot = checkpoint.load(RunDir(tmp_path).checkpoint(0))
    with pytest.raises(ValueError, match=said):
        other().restore(snapshot)


def test_an_average_that_was_left_out_is_missed(tmp_path: Path) -> None:
    state = deep(adam)
    state.ema = MovingAverage(state.components.model, 0.9)
    run_dir = RunDir(tmp_path)
    run_dir.checkpoints.mkdir()
    snapshot = checkpoint.load(checkpoint.commit(state.capture(0), run_dir, 0, 1))
    with pytest.raises(ValueError, match="ema is None here alone"):
        deep(adam).restore(snapshot)
