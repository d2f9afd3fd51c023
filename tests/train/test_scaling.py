"""float16's loss scaling around an update; other precisions have none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from samestep.launcher.contract import RefusedStepError
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


def test_with_float16_steps_that_are_never_finite_end_the_run_in_place_of_being_left_out_for_ever() -> None:
    loss_scaling = LossScaling("cpu")
    for _ in range(30):  # from 2**16 to 2**-14
        assert not loss_scaling.update(gradients_of(loss_scaling, math.nan)[1])
    with pytest.raises(RefusedStepError, match="step after step"):
        loss_scaling.update(gradients_of(loss_scaling, math.nan)[1])
    used_up = LossScaling("cpu")
    used_up.load_state_dict(loss_scaling.state_dict() | {"scale": 0.0})  # as older code saved it
    with pytest.raises(RefusedStepError):
        used_up.update(gradients_of(used_up, math.nan)[1])


def test_the_scale_is_part_of_the_state_and_there_is_none_without_float16() -> None:
    first, second = LossScaling("cpu"), LossScaling("cpu")
    first.update(gradients_of(first, float("inf"))[1])
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() != LossScaling("cpu").state_dict()
    assert Unscaled().state_dict() == {}


def test_a_rank_that_scaled_no_loss_yet_updates_as_the_others_also_from_a_loaded_state() -> None:
    busy = LossScaling("cpu")
    busy.update(gradients_of(busy, float("inf"))[1])
    for state in (None, busy.state_dict()):
        idle = LossScaling("cpu")
        if state is not None:
            idle.load_state_dict(state)
        scale = idle.state_dict()["scale"]
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=0.5)
        weight.grad = torch.full((2,), 0.25 * scale)  # from the other ranks
        idle.unscale(optimizer)
        assert idle.update(optimizer)
        assert weight.tolist() == [0.875, 0.875]


def test_a_state_that_is_loaded_after_steps_replaces_theirs() -> None:
    first, second = LossScaling("cpu"), LossScaling("cpu")
    fresh = first.state_dict()
    first.update(gradients_of(first, float("inf"))[1])
    assert first.state_dict() != fresh
    second.update(gradients_of(second, 0.25)[1])
    second.load_state_dict(first.state_dict())
    first.load_state_dict(fresh)
    assert first.state_dict() == fresh
    assert second.state_dict()["scale"] == fresh["scale"] / 2


@pytest.mark.compiler
def test_float16_trains_on_ranks_without_a_sample_in_the_bits_of_one_rank(trained: Any) -> None:
    """Batches of one sample leave rank one idle in every step; a tail of one, in the first step after a resume."""
    one = ("--precision", "fp16", "--shards", 2, "--samples", 5, "--epochs", 1, "--global-batch-size", 1)
    alone = trained("small", *one, cwd="alone").bits
    assert trained("small", *one, ranks=2, cwd="idle").bits == alone
    tail = ("--precision", "fp16", "--shards", 2, "--samples", 9, "--epochs", 2, "--global-batch-size", 4)
    alone = trained("small", *tail, cwd="tail").bits
    trained("small", *tail, "--max-steps", 2, ranks=2, cwd="resumed")
    assert trained("small", *tail, ranks=2, cwd="resumed").bits == alone


@pytest.mark.compiler
def test_a_run_that_had_no_scale_goes_on_in_float16(trained: Any) -> None:
    trained("small", "--max-steps", 4)
    resumed = trained("small", "--precision", "fp16")
    assert "--precision changed from no to fp16" in resumed.stderr


def test_with_float16_a_step_without_any_gradient_is_one_all_the_same() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    loss_scaling = LossScaling("cpu")
    optimizer = torch.optim.SGD([unused], lr=0.5)
    for _ in range(2):
        loss_scaling.scale(used.sum()).backward()
        loss_scaling.unscale(optimizer)
        assert loss_scaling.update(optimizer)
    assert unused.tolist() == [1.0, 1.0]


@pytest.mark.compiler
@pytest.mark.parametrize("ranks", [1, 2])
def test_with_float16_a_step_that_is_left_out_leaves_no_trace_in_buffers(trained: Any, ranks: int) -> None:
    # one shard a rank, and steps enough to know which buffers change: only what may be left out is kept from then on
    flags = ("--precision", "fp16", "--shards", ranks, "--epochs", 4, "--log-every", 1)
    ended = trained("overflowing", *flags, ranks=ranks)
    state = load_file(ended.checkpoint / "optimizer.safetensors")
    updates = {int(value) for name, value in state.items() if name.endswith(".step")}
    assert updates == {ended.weights["1.num_batches_tracked"].item()}
    assert all(torch.isfinite(tensor).all() for tensor in ended.weights.values())
