"""Weights of a loss on their way to the sum over all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from samestep.train.observe.tally import StepTally
from samestep.train.parallel.group import SoloGroup
from samestep.train.parallel.shards import StepPlan
from samestep.train.recipe import Weighted

HOST = torch.device("cpu")


def test_summing_weights_over_ranks_overwrites_neither_the_users_tensor_nor_the_reported_weight(start: Any) -> None:
    ended = start("weights_sent", ranks=2)
    assert ended.codes == [0, 0], ended.stderrs
    for rank in range(2):
        said = (ended.cwd / f"rank-{rank}.out").read_text().splitlines()
        assert said == [f"7.0 {3.0 + rank} {3.0 + rank}"] * 2


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("weight", [torch.tensor(2.0), torch.tensor([2.0], dtype=torch.float64), torch.tensor(2), 2])
def test_a_shards_weight_is_a_tensor_that_nobody_else_holds(weight: torch.Tensor | int, parts: int) -> None:
    tally = StepTally(SoloGroup(), HOST)
    tally._reads, tally.extras, tally.own_weights = False, [], True  # as on a GPU, after the first step
    plan = StepPlan(5, 0, 0, 8, 1, parts)
    tally.begin(plan, [0])
    for part in plan.parts(0):
        tally.add(Weighted(torch.tensor(6.0), weight), part)
    sent = tally.of_shard()
    assert (sent.dtype, sent.tolist()) == (torch.float64, [2.0 * parts])
    sent.fill_(99.0)
    assert float(tally.mine[0][1]) == 2.0 * parts
    assert float(weight) == 2.0
