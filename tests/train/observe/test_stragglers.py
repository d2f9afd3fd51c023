"""Who is slow is arithmetic on a table of times; chance, more shards and waiting are not slowness."""

from __future__ import annotations

import re

import numpy as np
import pytest

from samestep.train.observe.phases import PHASES
from samestep.train.observe.stragglers import AGAIN_SECONDS, LEAST_STEPS, Straggler, StragglerWatch, slowest

BASE = {"data": 0.01, "forward": 0.04, "backward": 0.04, "sync": 0.005, "optimizer": 0.005}


def times(*ranks, steps=100, noise=0.1, seed=0):
    """Seconds of BASE for each rank, with what its dict says in place, and noise; sync waits for the slowest rank."""
    draw = np.random.default_rng(seed)
    table = np.array([[[{**BASE, **rank}[phase] for phase in PHASES]] * steps for rank in ranks])
    table = table * draw.uniform(1 - noise, 1 + noise, table.shape)
    work = table[:, :, :3].sum(2)  # the optimizer's step comes after the waiting
    table[:, :, PHASES.index("sync")] += work.max(0) - work
    return table


@pytest.mark.parametrize("phase", ["data", "forward", "backward", "optimizer"])
@pytest.mark.parametrize(("world_size", "rank"), [(2, 0), (2, 1), (3, 2), (8, 5)])
def test_a_rank_that_takes_longer_in_every_step_is_named_with_its_phase(world_size, rank, phase):
    others: list[dict[str, float]] = [{} for _ in range(world_size)]
    others[rank] = {phase: BASE[phase] + 0.05}
    slow = slowest(times(*others), [1] * world_size)
    assert (slow.rank, slow.phase) == (rank, phase)
    assert slow.seconds == pytest.approx(BASE[phase] + 0.05, rel=0.05)
    assert slow.others == pytest.approx(BASE[phase], rel=0.1)


@pytest.mark.parametrize(
    ("ranks", "shards"),
    [
        ([{}, {}], [1, 1]),
        ([{}], [1]),
        # twice the shards, twice the time
        ([{"forward": 0.08, "backward": 0.08, "data": 0.02}, {}, {}], [2, 1, 1]),
        # nothing to do
        ([{}, {"data": 0.0, "forward": 0.0, "backward": 0.0}], [1, 0]),
        # waiting
        ([{"sync": 0.5}, {}], [1, 1]),
        # with twice the shards the optimizer's step takes as long as ever
        ([{"forward": 0.08, "backward": 0.08, "data": 0.02, "optimizer": 0.05}, {"optimizer": 0.05}], [2, 1]),
        # longer, but not noticeably
        ([{"data": 0.015}, {}], [1, 1]),
    ],
)
def test_nobody_is_named_where_nobody_is_slow(ranks, shards):
    assert slowest(times(*ranks), shards) is None


def test_chance_is_no_slowness():
    for seed in range(50):
        assert slowest(times({}, {}, noise=0.6, seed=seed), [1, 1]) is None


def test_a_few_slow_steps_are_no_slowness():
    table = times({}, {})
    table[1, ::3, PHASES.index("forward")] *= 20
    assert slowest(table, [1, 1]) is None


def test_of_two_slow_ranks_the_one_that_costs_most_is_named():
    assert slowest(times({}, {"data": 0.06}, {"forward": 0.2}, {}), [1] * 4).rank == 2


def test_it_waits_for_enough_steps_and_names_the_same_rank_seldom():
    watch, named, trained = StragglerWatch([1, 1]), [], 0.0
    while trained < 2.5 * AGAIN_SECONDS:
        table = times({}, {"forward": 0.2}, steps=10)
        trained += float(table.sum(2).max(0).sum())
        if watch.add(table):
            named.append(trained)
    assert len(named) == 3
    assert named[0] > LEAST_STEPS * 0.2
    assert min(np.diff(named)) >= AGAIN_SECONDS


def test_short_steps_are_looked_at_in_greater_number():
    watch = StragglerWatch([1, 1])
    table = times({}, {"forward": 0.2}, steps=50) / 1000
    assert [watch.add(table) for _ in range(20)] == [None] * 20


def test_the_sentence_says_rank_phase_and_times():
    assert str(Straggler(2, "forward", 0.11, 0.038)) == (
        "rank 2 is slow in forward: 110 ms a step where others take 38 ms; they wait for it"
    )


RECIPE = """
import os, time
import torch
from torch import nn
from torch.utils.data import TensorDataset
from samestep.train import Components, supervised, train

def loss(model, batch):
    time.sleep(0.15 if os.environ["RANK"] == "1" else 0.02)
    return supervised(nn.MSELoss())(model, batch)

def build(config):
    model = nn.Linear(10, 1)
    return Components(
        model=model, loss=loss, optimizer=torch.optim.Adam(model.parameters()),
        train_data=TensorDataset(torch.ones(800, 10), torch.ones(800, 1)),
    )

if __name__ == "__main__":
    train(build)
"""


@pytest.mark.processes
@pytest.mark.slow
def test_a_slow_rank_of_a_real_run_is_a_warning(trained, tmp_path):
    recipe = tmp_path / "slow.py"
    recipe.write_text(RECIPE)
    ended = trained(recipe, "--max-steps", "25", ranks=2)
    (warning,) = ended.events("warning")
    assert (warning["rank"], warning["phase"]) == (1, "forward")
    assert re.match(r"rank 1 is slow in forward: 1\d\d(\.\d+)? ms a step where others take \d\d", warning["text"])
    assert warning["text"] in ended.stderr
