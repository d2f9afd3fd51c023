"""Backward and update without torch's entries: the same bits, and whoever listens is still told."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from samestep.train import direct

OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    torch.optim.Adam,
    functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    functools.partial(torch.optim.AdamW, amsgrad=True),
    torch.optim.RMSprop,
]


def trained(make: Callable[[Any], torch.optim.Optimizer], *, directly: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer, x = make(model.parameters()), torch.randn(16, 4)
    scheduler = StepLR(optimizer, 2, gamma=0.5)
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if directly:
            direct.backward(loss, torch.ones(()))
            direct.step(optimizer)
        else:
            loss.backward()
            optimizer.step()
        scheduler.step()
    return [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_weights_and_gradients_have_the_bits_of_torchs_own_calls(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    pairs = zip(trained(make, directly=True), trained(make, directly=False), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_gradients_are_those_of_autograd_grad_and_none_where_a_parameter_is_unused() -> None:
    used, unused, start = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True), torch.tensor(0.5)
    mine, none = direct.gradients(used.square().sum(), [used, unused], start)
    (theirs,) = torch.autograd.grad(used.square().sum(), [used], start)
    assert mine is not None
    assert torch.equal(mine, theirs)
    assert none is None
    assert used.grad is None


def adam() -> tuple[nn.Parameter, torch.optim.Adam]:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    return weight, torch.optim.Adam([weight])


def test_where_nobody_listens_torchs_entries_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    (weight, optimizer), (_, scheduled) = adam(), adam()
    StepLR(scheduled, 1)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an entry of torch was called")

    monkeypatch.setattr(torch.autograd, "_make_grads", refuse)
    monkeypatch.setattr(torch.autograd.profiler, "record_function", refuse)
    direct.backward(weight.sum(), torch.ones(()))
    direct.gradients(weight.sum(), [weight], torch.ones(()))
    direct.step(optimizer)
    direct.step(scheduled)
    with pytest.raises(AssertionError, match="entry"):
        weight.sum().backward()
    with pytest.raises(AssertionError, match="entry"):
        optimizer.step()


def test_hooks_of_an_optimizer_and_of_all_optimizers_are_called() -> None:
    (_, optimizer), called = adam(), []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    for register, name in (
        (optimizer.register_step_pre_hook, "before"),
        (optimizer.register_step_post_hook, "after"),
        (register_optimizer_step_pre_hook, "before any"),
        (register_optimizer_step_post_hook, "after any"),
    ):
        handle = register(note(name))
        direct.step(optimizer)
        handle.remove()
        direct.step(optimizer)
    assert called == ["before", "after", "before any", "after any"]


def test_a_profiler_sees_the_update_as_it_does_without_us() -> None:
    _, optimizer = adam()
    with torch.profiler.profile() as profiler:
        direct.step(optimizer)
    assert "Optimizer.step#Adam.step" in [event.key for event in profiler.key_averages()]


@pytest.mark.parametrize("says_it_is_a_schedulers", [False, True])
def test_a_step_that_somebody_put_into_the_optimizer_is_what_is_called(says_it_is_a_schedulers: bool) -> None:
    (weight, optimizer), called = adam(), []

    def own() -> None:
        called.append("own")

    if says_it_is_a_schedulers:
        own._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.__dict__["step"] = own
    direct.step(optimizer)
    assert called == ["own"]
    assert weight.tolist() == [1.0, 1.0]


def test_a_step_that_somebody_put_around_torchs_is_what_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    (weight, optimizer), called, inner = adam(), [], torch.optim.Adam.step

    @functools.wraps(inner)
    def around(self: torch.optim.Adam) -> None:
        called.append("around")
        inner(self)

    monkeypatch.setattr(torch.optim.Adam, "step", around)
    direct.step(optimizer)
    assert called == ["around"]
    assert weight.tolist() != [1.0, 1.0]


def test_a_scheduler_knows_that_the_optimizer_stepped_before_it() -> None:
    _, optimizer = adam()
    scheduler = StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        direct.step(optimizer)
        scheduler.step()
    _, idle = adam()
    scheduler = StepLR(idle, 1)
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()


@pytest.mark.parametrize("place", [(Tensor, "backward"), (torch.autograd, "backward")])
def test_a_backward_that_somebody_put_around_torchs_is_what_is_called(
    place: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called, inner = [], getattr(*place)

    @functools.wraps(inner)
    def around(*positional: Any, **named: Any) -> None:
        called.append("around")
        inner(*positional, **named)

    monkeypatch.setattr(*place, around)
    weight = torch.ones(2, requires_grad=True)
    direct.backward(weight.sum(), torch.ones(()))
    assert called == ["around"]
    assert weight.grad is not None


class Loud(Tensor):
    """A tensor with a backward of its own."""

    called: list[str] = []  # noqa: RUF012 (of the class, on purpose)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.called.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("run", [direct.backward, lambda total, start: direct.gradients(total, [total], start)])
def test_a_tensor_of_another_class_goes_its_own_way(run: Callable[[Tensor, Tensor], Any]) -> None:
    loss = torch.ones((), requires_grad=True).as_subclass(Loud)
    Loud.called.clear()
    run(loss, torch.ones(()))
    assert {"backward", "grad"} & set(Loud.called)
