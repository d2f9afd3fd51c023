"""What a loss may return, and that `supervised` weighs as the criterion itself does."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from samestep.launcher.contract import UsageError
from samestep.train import Weighted, supervised
from samestep.train.recipe import SampleWeighted, objective, require_gradient, weigh


def test_per_sample_losses_are_summed_and_weighed_by_their_number() -> None:
    result = weigh(torch.tensor([1.0, 2.0, 4.0]), 3)
    assert isinstance(result, SampleWeighted)
    assert (result.total.item(), result.weight) == (7.0, 3)


def test_a_scalar_is_a_mean_over_the_batch() -> None:
    result = weigh(torch.tensor(2.5), 4)
    assert isinstance(result, SampleWeighted)
    assert (result.total.item(), result.weight) == (10.0, 4)


def test_one_sample_may_be_a_scalar_or_a_vector_of_one() -> None:
    assert weigh(torch.tensor(2.5), 1).total.item() == weigh(torch.tensor([2.5]), 1).total.item() == 2.5


@pytest.mark.parametrize(
    "weight", [3, 2.5, True, torch.tensor(3), torch.tensor(True), torch.tensor(2.5), torch.tensor([4])]
)
def test_weighted_is_taken_as_it_is(weight: Any) -> None:
    given = Weighted(torch.tensor(1.0), weight)
    assert weigh(given, 7) is given


@pytest.mark.parametrize("weight", [np.int64(3), np.float32(2.5), np.float64(2.5)])
def test_weights_of_numpy_are_numbers_too(weight: Any) -> None:
    result = weigh(Weighted(torch.tensor(1.0), weight), 7)
    assert isinstance(result.weight, float)
    assert result.weight == weight


@pytest.mark.parametrize(
    ("output", "way_back"), [(None, "at its end"), ((1, 2), "log="), ({"loss": 1}, "log="), (0.5, ".item()")]
)
def test_what_a_loss_returned_decides_the_hint(output: Any, way_back: str) -> None:
    with pytest.raises(UsageError) as raised:
        weigh(output, 3)
    assert way_back in raised.value.hint


def test_integer_and_bool_results_of_metrics_are_counted_exactly() -> None:
    assert weigh(torch.tensor([True, False, True]), 3, "accuracy").total.item() == 2
    assert weigh(torch.tensor([2**53, 1, 0, 0]), 4, "count").total.dtype == torch.float64


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (0.5, "float"),
        (None, "NoneType"),
        ((torch.tensor(1.0),), "tuple"),
        (torch.zeros(2), r"\(3,\).*\(2,\)"),
        (torch.zeros(3, 1), r"\(3, 1\)"),
        (torch.zeros(1, 3), r"\(1, 3\)"),
        (torch.zeros(0), r"\(0,\)"),
        (Weighted(torch.zeros(2), 1), "total"),
        (Weighted(torch.zeros(()), torch.zeros(2)), "weight"),
        (Weighted(0.5, 1), "total.*float"),  # type: ignore[arg-type]
        (Weighted(torch.zeros(()), "3"), "weight.*str"),  # type: ignore[arg-type]
        (Weighted(torch.zeros(()), None), "weight.*NoneType"),  # type: ignore[arg-type]
        *((Weighted(torch.zeros(()), bad), f"weight.*0 or more.*is {bad}") for bad in (-3, -0.5, math.nan, math.inf)),
        (Weighted(torch.zeros(()), np.float32(-2)), "weight.*0 or more.*is -2.0"),  # type: ignore[arg-type]
        (Weighted(torch.zeros(()), 1, [2.0]), "log.*dict.*list"),  # type: ignore[arg-type]
    ],
)
def test_anything_else_is_refused_with_what_it_is(output: Any, words: str) -> None:
    with pytest.raises(UsageError, match=f"myloss.*{words}"):
        weigh(output, 3, "myloss")


def test_a_loss_without_gradient_is_refused_with_the_usual_reasons() -> None:
    with pytest.raises(UsageError, match="no gradient") as raised:
        require_gradient(torch.tensor(1.0))
    assert ".detach()" in raised.value.hint


# supervised: the shards' totals and weights, put together, give torch's own mean over the whole batch.

torch.manual_seed(0)
LOGITS = torch.randn(12, 5, dtype=torch.float64)
LABELS = torch.randint(0, 5, (12,))
CLASS_WEIGHT = torch.rand(5, dtype=torch.float64) + 0.1
CUTS = [(0, 12), (0, 5, 12), (0, 1, 2, 12), tuple(range(13))]


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def combined(criterion: Any, x: Tensor, y: Tensor, cut: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Objective and gradient when a batch is cut at `cut`, as the step puts them together."""
    x = x.detach().requires_grad_()
    parts = []
    for lo, hi in itertools.pairwise(cut):
        parts.append(weigh(supervised(criterion)(Identity(), (x[lo:hi], y[lo:hi])), hi - lo))
    total = torch.stack([part.total for part in parts]).sum()
    weight = sum(float(part.weight) for part in parts)
    (gradient,) = torch.autograd.grad(torch.stack([objective(part, cut[-1]) for part in parts]).sum(), x)
    return total / weight, gradient / (1 if isinstance(parts[0], SampleWeighted) else weight)


class Focal(nn.CrossEntropyLoss):
    """A mean of its own, whatever `reduction` says."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        each = F.cross_entropy(input, target, reduction="none")
        return ((1 - torch.exp(-each)).square() * each).mean()


class FocalOfLogarithms(nn.NLLLoss):
    forward = Focal.forward


def patched() -> nn.CrossEntropyLoss:
    """Its class has torch's forward, it itself has not."""
    criterion = nn.CrossEntropyLoss()
    criterion.forward = Focal().forward  # type: ignore[method-assign]
    return criterion


class Renamed(nn.CrossEntropyLoss):
    """Sums as its base class does."""


def with_some_ignored(labels: Tensor, value: int = -100) -> Tensor:
    labels = labels.clone()
    labels[[1, 4, 5, 11]] = value
    return labels


CRITERIA: dict[str, tuple[Any, Tensor, Tensor]] = {
    "cross entropy": (nn.CrossEntropyLoss(), LOGITS, LABELS),
    "ignored labels": (nn.CrossEntropyLoss(), LOGITS, with_some_ignored(LABELS)),
    "ignored class": (nn.CrossEntropyLoss(ignore_index=0), LOGITS, LABELS),
    "class weights": (nn.CrossEntropyLoss(weight=CLASS_WEIGHT), LOGITS, LABELS),
    "focal": (Focal(), LOGITS, LABELS),
    "focal, of another class": (FocalOfLogarithms(), LOGITS, LABELS),
    "focal, patched": (patched(), LOGITS, LABELS),
    "renamed": (Renamed(weight=CLASS_WEIGHT), LOGITS, with_some_ignored(LABELS)),
    "both": (nn.CrossEntropyLoss(weight=CLASS_WEIGHT, ignore_index=2), LOGITS, LABELS),
    "both, ignored -100": (nn.CrossEntropyLoss(weight=CLASS_WEIGHT), LOGITS, with_some_ignored(LABELS)),
    "both, ignored 255": (
        nn.CrossEntropyLoss(weight=CLASS_WEIGHT, ignore_index=255),
        LOGITS,
        with_some_ignored(LABELS, 255),
    ),
    "smoothed": (nn.CrossEntropyLoss(weight=CLASS_WEIGHT, label_smoothing=0.1, ignore_index=1), LOGITS, LABELS),
    "nll": (nn.NLLLoss(weight=CLASS_WEIGHT, ignore_index=3), LOGITS.log_softmax(1), LABELS),
    "probabilities": (nn.CrossEntropyLoss(), LOGITS, LOGITS.flip(0).softmax(1)),
    "weighted probabilities": (nn.CrossEntropyLoss(weight=CLASS_WEIGHT), LOGITS, LOGITS.flip(0).softmax(1)),
    "positions": (
        nn.CrossEntropyLoss(weight=CLASS_WEIGHT, ignore_index=0),
        torch.randn(12, 5, 3, dtype=torch.float64),
        torch.randint(0, 5, (12, 3)),
    ),
    "probabilities of positions": (
        nn.CrossEntropyLoss(),
        torch.randn(12, 5, 3, dtype=torch.float64),
        torch.randn(12, 5, 3, dtype=torch.float64).softmax(1),
    ),
    "functional cross entropy": (F.cross_entropy, LOGITS, with_some_ignored(LABELS)),
    "functional nll": (F.nll_loss, LOGITS.log_softmax(1), with_some_ignored(LABELS)),
    "partial": (functools.partial(F.cross_entropy, weight=CLASS_WEIGHT, ignore_index=1), LOGITS, LABELS),
    "functional mse": (F.mse_loss, LOGITS, LOGITS.flip(0)),
    "mse": (nn.MSELoss(), LOGITS, LOGITS.flip(0)),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHT), LOGITS, (LOGITS.flip(0) > 0).double()),
    "batchmean": (nn.KLDivLoss(reduction="batchmean"), LOGITS.log_softmax(1), LOGITS.flip(0).softmax(1)),
}


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("name", CRITERIA)
def test_any_cut_of_a_batch_gives_torchs_mean_over_the_whole(name: str, cut: tuple[int, ...]) -> None:
    criterion, x, y = CRITERIA[name]
    whole = x.detach().requires_grad_()
    expected = criterion(whole, y)
    (gradient,) = torch.autograd.grad(expected, whole)
    value, found = combined(criterion, x, y, cut)
    assert abs(value.item() / expected.item() - 1) < 1e-13
    assert (found - gradient).norm() <= 1e-13 * gradient.norm()


@pytest.mark.parametrize(
    "criterion", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=CLASS_WEIGHT), F.cross_entropy]
)
def test_an_all_ignored_batch_weighs_nothing_and_has_no_nan(criterion: Any) -> None:
    x = LOGITS.detach().requires_grad_()
    result = supervised(criterion)(Identity(), (x, torch.full((12,), -100)))
    assert isinstance(result, Weighted)
    assert float(result.weight) == 0
    assert result.total.item() == 0
    (gradient,) = torch.autograd.grad(result.total, x)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("criterion", [nn.MSELoss(reduction="none"), nn.L1Loss(reduction="none")])
def test_reduction_none_averages_the_other_dimensions(criterion: Any) -> None:
    x, y = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    result = supervised(criterion)(Identity(), (x, y))
    assert isinstance(result, Tensor)
    assert torch.equal(result, criterion(x, y).flatten(1).mean(1))


def test_reduction_none_of_a_vector_is_taken_as_it_is() -> None:
    result = supervised(nn.CrossEntropyLoss(reduction="none"))(Identity(), (LOGITS, LABELS))
    assert isinstance(result, Tensor)
    assert torch.equal(result, nn.CrossEntropyLoss(reduction="none")(LOGITS, LABELS))


@pytest.mark.parametrize(
    "criterion",
    [
        nn.MSELoss(reduction="sum"),
        nn.CrossEntropyLoss(reduction="sum"),
        functools.partial(F.mse_loss, reduction="sum"),
        functools.partial(F.cross_entropy, reduction="sum"),
    ],
    ids=["mse", "cross entropy", "partial mse", "partial cross entropy"],
)
def test_reduction_sum_is_refused_with_the_fix(criterion: Any) -> None:
    with pytest.raises(UsageError, match="sum") as raised:
        supervised(criterion)
    assert "mean" in raised.value.hint


def test_mean_squared_error_keeps_the_bits_of_torch() -> None:
    x, y = torch.randn(32, 3), torch.randn(32, 3)
    result = weigh(supervised(nn.MSELoss())(Identity(), (x, y)), 32)
    assert result.total.item() / 32 == nn.MSELoss()(x, y).item()


def test_the_criterion_itself_is_not_changed() -> None:
    criterion = nn.CrossEntropyLoss()
    supervised(criterion)
    assert criterion.reduction == "mean"
