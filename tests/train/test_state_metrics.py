"""Metrics that keep states, whatever form their states have."""

from __future__ import annotations

import pytest
import torch
from torchmetrics import CatMetric
from torchmetrics.classification import MulticlassAUROC

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
    from samestep.launcher.contract import UsageError

    states = StateMetrics({"all": StateMetric(CatMetric(), lambda _, b: (b,))}, SoloGroup(), CPU)
    states.begin()
    states.add(None, torch.randn(8, 3).T, 0)
    with pytest.raises(UsageError, match="metric all is expected to compute one number"):
        states.values()
