"""Weights of a loss on their way to the sum over all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from samestep.launcher.contract import UsageError
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


LOGS: dict[str, tuple[list[list[str]], str]] = {
    "a key is missing later": ([["mae", "top1"], ["mae"]], "in step 2 it logs mae and else mae, top1"),
    "a key is new later": ([["mae"], ["mae", "top1"]], "in step 2 it logs mae, top1 and else mae"),
    "another key in another shard": ([["mae", "top1"]], "in step 1 it logs top1 and else mae"),
}


@pytest.mark.parametrize("case", LOGS)
def test_a_loss_that_logs_other_values_than_before_is_named(case: str) -> None:
    steps, said = LOGS[case]
    with pytest.raises(UsageError, match=said):
        log_in_turn(steps)


def log_in_turn(steps: list[list[str]]) -> None:
    """One step has a shard for each name, several have one shard with all of them."""
    tally = StepTally(SoloGroup(), HOST)
    for step, names in enumerate(steps):
        shards = [[name] for name in names] if len(steps) == 1 else [names]
        plan = StepPlan(step, 0, 0, 8, len(shards))
        tally.begin(plan, list(range(len(shards))))
        for shard, logged in enumerate(shards):
            (part,) = plan.parts(shard)
            tally.add(Weighted(torch.tensor(6.0), 4, dict.fromkeys(logged, 1.0)), part)


def test_the_order_of_logged_values_may_be_any() -> None:
    tally = StepTally(SoloGroup(), HOST)
    for step, names in enumerate((["mae", "top1"], ["top1", "mae"])):
        plan = StepPlan(step, 0, 0, 8, 1)
        tally.begin(plan, [0])
        tally.add(Weighted(torch.tensor(6.0), 4, {name: float(name == "mae") for name in names}), plan.parts(0)[0])
        assert tally.mine == [[6.0, 4, 4.0, 0.0]]
