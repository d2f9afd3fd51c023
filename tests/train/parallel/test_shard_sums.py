"""Small numbers of the shards: one exchange a step, early where somebody starts it, none where there is nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from samestep.train.parallel.exchange import Exchange, Flight, TreeExchange
from samestep.train.parallel.group import SoloGroup
from samestep.train.parallel.shard_sums import ShardSums
from samestep.train.parallel.shards import StepPlan

HOST = torch.device("cpu")


@dataclass
class Noting:
    """TreeExchange, and how often it was started."""

    exchange: Exchange
    starts: list[int] = field(default_factory=list)
    through: str = "a test"

    def start(self, mine: list[Tensor], like: Tensor, present: int) -> Flight:
        self.starts.append(present)
        return self.exchange.start(mine, like, present)


def sums(shards: int) -> tuple[ShardSums, Noting]:
    noting = Noting(TreeExchange(0, 1, shards))
    return ShardSums(SoloGroup(), noting, shards, HOST), noting


@pytest.mark.parametrize("early", [False, True])
def test_a_step_has_one_exchange_along_the_tree(early: bool) -> None:
    small, noting = sums(4)
    numbers = torch.tensor([[1e16, 1.0], [1.0, 2.0], [-1e16, 3.0], [1.0, 4.0]], dtype=torch.float64)
    for step in range(2):
        small.begin(StepPlan(step, 0, 0, 8, 4), 2)
        for shard in range(4):
            small.push(shard, numbers[shard].clone())
        if early:
            small.start()
        assert torch.equal(small.finish(), (numbers[0] + numbers[1]) + (numbers[2] + numbers[3]))
        assert noting.starts == [4] * (step + 1)


def test_where_nothing_is_summed_nothing_is_sent() -> None:
    small, noting = sums(2)
    small.begin(StepPlan(0, 0, 0, 8, 2), 0)
    assert small.finish().numel() == 0
    assert noting.starts == []


def test_empty_shards_of_a_last_batch_add_nothing() -> None:
    small, noting = sums(4)
    small.begin(StepPlan(0, 0, 0, 1, 4), 1)
    small.push(0, torch.tensor([-0.0], dtype=torch.float64))
    assert torch.signbit(small.finish()).item()
    assert noting.starts == [1]
