"""Metrics that keep states, whatever form their states have."""

from __future__ import annotations

import pytest
import torch
from torchmetrics import CatMetric, MeanMetric, MetricCollection, MinMaxMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from samestep.launcher.contract import UsageError
from samestep.train.parallel.group import SoloGroup
from samestep.train.state_metrics import StateMetric, StateMetrics

CPU = torch.device("cpu")


@pytest.mark.parametrize("shards", [1, 2])
def test_states_that_are_views_are_gathered_too(shards: int) -> None:
    scores, classes = torch.randn(8, 3, 4).softmax(1), torch.randint(0, 3, (8, 4))
    whole = MulticlassAUROC(num_classes=3)
    whole.update(scores, classes)
    states = StateMetrics({"auroc": StateMetric(MulticlassAUROC(num_classes=3), lambda _, b: b)}, SoloGroup(), CPU)
    states.begin()
    for place, batch in enumerate(zip(scores.chunk(shards), classes.chunk(shards), strict=True)):
        states.add(None, batch, place)
    assert states.values() == {"auroc": float(whole.compute())}


def test_a_state_that_is_no_single_number_is_named() -> None:
    states = StateMetrics({"all": StateMetric(CatMetric(), lambda _, b: (b,))}, SoloGroup(), CPU)
    states.begin()
    states.add(None, torch.randn(8, 3).T, 0)
    with pytest.raises(UsageError, match="metric all is expected to compute one number"):
        states.values()


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (MulticlassAccuracy(3) * 100, "CompositionalMetric holds MulticlassAccuracy and has its states elsewhere"),
        (MinMaxMetric(MulticlassAccuracy(3)), "MinMaxMetric holds MulticlassAccuracy"),
        (MetricCollection([MulticlassAccuracy(3), MulticlassAUROC(3)]), "is a MetricCollection of several"),
    ],
)
def test_a_metric_whose_states_are_not_its_own_is_refused(metric: object, said: str) -> None:
    kept = StateMetric.of(metric)
    assert kept is not None
    with pytest.raises(UsageError, match=said):
        kept.refuse_states_elsewhere("accuracy")


def test_a_metric_with_states_of_its_own_is_not() -> None:
    for metric in (MulticlassAccuracy(3), MulticlassAUROC(3), CatMetric(), MeanMetric()):
        StateMetric(metric).refuse_states_elsewhere("fine")
