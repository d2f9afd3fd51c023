"""float16's loss scaling around an update; other precisions have none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from samestep.train.scaling import LossScaling, Unscaled, scaling


def gradients_of(loss_scaling: LossScaling | Unscaled, factor: float) -> tuple[nn.Parameter, torch.optim.SGD]:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    loss_scaling.scale((weight * factor).sum()).backward()
    loss_scaling.unscale(optimizer)
    return weight, optimizer


@pytest.mark.parametrize("kind", ["fp16", "no", "bf16"])
def test_a_finite_gradient_is_the_true_one_and_moves_the_weights(kind: str) -> None:
    loss_scaling = scaling(kind, "cpu")
    weight, optimizer = gradients_of(loss_scaling, 0.25)  # type: ignore[arg-type]
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.25, 0.25]
    assert loss_scaling.update(optimizer)
    assert weight.tolist() == [0.875, 0.875]


def test_with_float16_a_step_that_is_not_finite_is_left_out_and_the_scale_falls() -> None:
    loss_scaling = LossScaling("cpu")
    loss_scaling.update(gradients_of(loss_scaling, 0.25)[1])
    before = loss_scaling.state_dict()["scale"]
    weight, optimizer = gradients_of(loss_scaling, float("inf"))
    assert not loss_scaling.update(optimizer)
    assert weight.tolist() == [1.0, 1.0]
    assert loss_scaling.state_dict()["scale"] < before


def test_the_scale_is_part_of_the_state_and_there_is_none_without_float16() -> None:
    first, second = LossScaling("cpu"), LossScaling("cpu")
    first.update(gradients_of(first, float("inf"))[1])
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() != LossScaling("cpu").state_dict()
    assert Unscaled().state_dict() == {}
