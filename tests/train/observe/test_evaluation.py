"""Who keeps the others waiting in evaluations; more shards, short waits and a busy moment are not slowness."""

from __future__ import annotations

from typing import Any

import pytest

from samestep.train.observe.evaluation import EvaluationWatch, slowest


@pytest.mark.parametrize(
    ("seconds", "shards", "rank"),
    [
        ([2.0, 9.0], [4, 4], 1),
        ([30.0, 10.0, 11.0], [4, 4, 4], 0),
        ([10.0, 30.0], [4, 12], None),  # as much longer as it has more to do
        ([10.0, 30.0], [12, 12], 1),
        ([10.0, 11.0], [4, 4], None),
        ([0.2, 0.9], [4, 4], None),  # nobody waits long
        ([100.0, 101.5], [4, 4], None),  # nor noticeably
        ([9.0, 0.0], [4, 0], None),  # alone at work
        ([9.0], [4], None),
        ([30.0, 20.0, 5.0, 5.0, 5.0], [1] * 5, 0),  # of two, the one that costs most
    ],
)
def test_a_rank_is_slow_where_others_wait_for_it(seconds: list[float], shards: list[int], rank: int | None) -> None:
    slow = slowest(seconds, shards)
    assert (None if slow is None else slow.rank) == rank


def test_the_sentence_says_what_it_took_and_what_others_would_have() -> None:
    assert str(slowest([3.0, 0.5], [6, 3])) == (
        "rank 0 is slow in evaluation: 3 s an evaluation where others take 1 s; they wait for it"
    )


def test_it_is_named_the_second_time_in_a_row_and_once() -> None:
    watch, fine, slow = EvaluationWatch(), [2.0, 2.0], [2.0, 9.0]
    assert [watch.add(seconds, [1, 1]) is not None for seconds in (slow, fine, slow, slow, slow, fine)] == [
        False, False, False, True, False, False,
    ]  # fmt: skip


RECIPE = """
import os
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

from samestep.train import Components, supervised, train

real, ahead = time.perf_counter, 0.0
time.perf_counter = lambda: real() + ahead

def slow(model, batch):
    global ahead
    ahead += 100.0 if os.environ["RANK"] == "1" else 10.0
    return (model(batch[0]) - batch[1]).abs().mean(1)

def build(config):
    model, data = nn.Linear(3, 1), TensorDataset(torch.randn(64, 3), torch.randn(64, 1))
    return Components(
        model=model, loss=supervised(nn.MSELoss()), optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_data=data, eval_data=TensorDataset(*data[:8]), metrics={"slow": slow},
    )

if __name__ == "__main__":
    train(build)
"""


@pytest.mark.processes
def test_each_rank_s_evaluation_is_in_the_events_and_the_slow_one_is_a_warning(trained: Any, tmp_path: Any) -> None:
    recipe = tmp_path / "slow.py"
    recipe.write_text(RECIPE)
    ended = trained(recipe, "--epochs", 3, "--num-workers", 0, ranks=2)
    for event in ended.events("eval"):
        fast, slow = event["rank_seconds"]
        assert 10 <= fast < 20
        assert 100 <= slow < 110
    (warning,) = [event for event in ended.events("warning") if event.get("phase") == "evaluation"]
    assert warning["rank"] == 1
    assert warning["text"].startswith("rank 1 is slow in evaluation: 100 s an evaluation where others take 10 s")
