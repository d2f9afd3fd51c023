"""The objective is sum(w * l) / sum(w) over the whole global batch: against a plain torch loop that shares no code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.timeout(120)

STEPS = 50
Order = Callable[[int, int, int], list[int]]


def per_sample(case: str, output: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and weights of samples `rows`, written out."""
    if case in ("mean", "none"):
        shift = rows[:, None] * torch.arange(1, 5) if case == "mean" else rows[:, None] + torch.arange(4)
        error = output - torch.cos(shift).to(output)
        if case == "none":
            error = torch.where(error.abs() < 1, error.square() / 2, error.abs() - 0.5).mean(1)
            return error, torch.ones(len(rows), dtype=torch.float64)
        return error.square().mean(1), torch.ones(len(rows), dtype=torch.float64)
    labels = rows * rows % 4 if case == "classes" else (rows * 5 % 11 - 2).abs() % 4
    losses = torch.logsumexp(output, 1) - output.gather(1, labels[:, None])[:, 0]
    if case == "classes":
        return losses, torch.tensor([0.1, 1.0, 0.0, 0.7])[labels].double()
    return losses, ((rows * 5 % 11 - 2) % 7).double()


def oracle(case: str, samples: int, batch: int, kind: torch.dtype, order: Order) -> list[Tensor]:
    """Fifty steps of SGD with momentum on the full global batch."""
    shapes = [(6, 5), (6,), (4, 6), (4,)]
    weights = []
    for number, shape in enumerate(shapes):
        numel = torch.Size(shape).numel()
        start = torch.cos(torch.arange(numel) + number).view(shape) / 2  # float32 at first, as the recipe has it
        weights.append(start.to(kind).double().requires_grad_())
    momentum = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    x = torch.stack([torch.sin(1.0 + torch.arange(samples) * k) for k in range(1, 6)], 1).to(kind).double()
    step, epoch = 0, 0
    while step < STEPS:
        ids = order(samples, 0, epoch)
        for begin in range(0, samples, batch):
            if step == STEPS:
                break
            rows = torch.tensor(ids[begin : begin + batch])
            hidden = torch.tanh(x[rows] @ weights[0].T + weights[1])
            losses, weigh = per_sample(case, hidden @ weights[2].T + weights[3], rows)
            step += 1
            if weigh.sum() == 0:
                continue
            gradients = torch.autograd.grad((weigh * losses).sum() / weigh.sum(), weights)
            with torch.no_grad():
                for index, gradient in enumerate(gradients):
                    momentum[index] = 0.9 * momentum[index] + gradient
                    weights[index] -= 0.05 * momentum[index]
        epoch += 1
    return [weight.detach() for weight in weights]


def relative_error(ended: Any, expected: list[Tensor]) -> float:
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    found = torch.cat([ended.weights[name].double().flatten() for name in names])
    wanted = torch.cat([tensor.flatten() for tensor in expected])
    return float((found - wanted).norm() / wanted.norm())


# samples and global batch: tail of 3; tail of 1; batch of 2 (fewer than most V and W); whole dataset at once
SOME_CASES: list[Any] = [
    "tokens",
    *(pytest.param(case, marks=pytest.mark.slow) for case in ("mean", "none", "classes")),
]
CUTS = [(23, 5), (22, 7), (9, 2), (13, 64)]


@pytest.mark.parametrize("case", SOME_CASES)
def test_one_rank_weighs_as_the_whole_batch_does_for_every_number_of_shards(
    trained: Any, slow_order: Order, case: str
) -> None:
    for samples, batch in CUTS:
        expected = oracle(case, samples, batch, torch.float64, slow_order)
        for shards in (1, 3):
            flags = ("--case", case, "--samples", samples, "--global-batch-size", batch, "--shards", shards)
            ended = trained("oracle", *flags, cwd=f"{samples}-{shards}")
            assert relative_error(ended, expected) <= 1e-12, (samples, batch, shards)


@pytest.mark.parametrize("case", SOME_CASES)
def test_shards_in_parts_weigh_as_the_whole_batch_does(trained: Any, slow_order: Order, case: str) -> None:
    for samples, batch, ranks, shards, parts in ((23, 5, 1, 1, 2), (22, 7, 2, 2, 3), (13, 64, 2, 3, 4)):
        expected = oracle(case, samples, batch, torch.float64, slow_order)
        flags = ("--case", case, "--samples", samples, "--global-batch-size", batch, "--shards", shards)
        ended = trained("oracle", *flags, "--micro-batches", parts, ranks=ranks, cwd=f"{samples}")
        assert relative_error(ended, expected) <= 1e-12, (samples, batch, ranks, shards, parts)


@pytest.mark.parametrize("case", [pytest.param("mean", marks=pytest.mark.slow), "tokens", "classes"])
def test_several_ranks_weigh_as_the_whole_batch_does(trained: Any, slow_order: Order, case: str) -> None:
    for samples, batch, ranks, shards in ((23, 5, 2, 2), (22, 7, 3, 5), (9, 2, 3, 3)):
        expected = oracle(case, samples, batch, torch.float64, slow_order)
        flags = ("--case", case, "--samples", samples, "--global-batch-size", batch, "--shards", shards)
        ended = trained("oracle", *flags, ranks=ranks, cwd=f"{samples}")
        assert relative_error(ended, expected) <= 1e-12, (samples, batch, ranks, shards)


@pytest.mark.parametrize("case", ["mean", "none", "tokens", "classes"])
def test_float32_stays_near_the_float64_oracle(trained: Any, slow_order: Order, case: str) -> None:
    expected = oracle(case, 23, 5, torch.float32, slow_order)
    flags = ("--case", case, "--kind", "float32", "--global-batch-size", 5, "--shards", 3)
    assert relative_error(trained("oracle", *flags, ranks=2), expected) <= 1e-6


def test_fast_reduction_weighs_exactly_too(trained: Any, slow_order: Order) -> None:
    expected = oracle("tokens", 9, 2, torch.float64, slow_order)
    flags = ("--case", "tokens", "--samples", 9, "--global-batch-size", 2, "--reduction", "fast")
    assert relative_error(trained("oracle", *flags, ranks=3), expected) <= 1e-12


def test_a_batch_without_any_weight_is_no_update_and_a_warning(trained: Any, slow_order: Order) -> None:
    """With batches of one or two samples some have no token at all."""
    expected = oracle("tokens", 9, 1, torch.float64, slow_order)
    ended = trained("oracle", "--case", "tokens", "--samples", 9, "--global-batch-size", 1, "--shards", 2, ranks=2)
    assert relative_error(ended, expected) <= 1e-12
    warnings = [event["text"] for event in ended.events("warning")]
    assert warnings
    assert all("no weight" in text for text in warnings)
    empty = [event["step"] for event in ended.events("step") if event["loss"] is None]
    assert [f"step {step} " in text for step, text in zip(empty, warnings, strict=True)] == [True] * len(empty)
    assert len(ended.events("step")) == STEPS


def test_the_reported_loss_is_the_objective_of_the_whole_batch(trained: Any, slow_order: Order) -> None:
    """First step: the weights are known, and so is the loss."""
    for case in ("mean", "tokens", "classes"):
        ids = torch.tensor(slow_order(23, 0, 0)[:5])
        weights = [
            (torch.cos(torch.arange(torch.Size(shape).numel()) + number).view(shape) / 2).double()
            for number, shape in enumerate([(6, 5), (6,), (4, 6), (4,)])
        ]
        x = torch.stack([torch.sin(1.0 + torch.arange(23) * k) for k in range(1, 6)], 1).double()[ids]
        output = torch.tanh(x @ weights[0].T + weights[1]) @ weights[2].T + weights[3]
        losses, weigh = per_sample(case, output, ids)
        flags = ("--case", case, "--global-batch-size", 5, "--shards", 3, "--max-steps", 1)
        ended = trained("oracle", *flags, cwd=case)
        (event,) = ended.events("step")
        assert abs(float.fromhex(event["loss_hex"]) - float((weigh * losses).sum() / weigh.sum())) < 1e-14
