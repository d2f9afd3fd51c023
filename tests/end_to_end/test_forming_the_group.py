"""P5: ranks that never all join are told apart and started again; a rank whose device is gone is gone on without."""

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]
RECIPE = """
import os, time
import torch
from torch import nn
from torch.utils.data import TensorDataset
from samestep.train import Components, supervised, train

FIRST = os.environ.get("SAMESTEP_GENERATION", "0") == "0"
MINE = os.environ.get("RANK") == os.environ.get("LATE") and FIRST
calls = 0


def loss(model, batch):
    global calls
    calls += 1
    if FIRST and calls == 4 and os.environ.get("RANK") == os.environ.get("GONE"):
        raise RuntimeError("CUDA error: unspecified launch failure")
    return supervised(nn.MSELoss())(model, batch)


def build(config):
    x = torch.arange(640.0).reshape(64, 10) / 640
    model = nn.Sequential(nn.Linear(10, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    return Components(
        model=model, loss=loss, optimizer=torch.optim.Adam(model.parameters()), train_data=TensorDataset(x, x[:, :1])
    )


if __name__ == "__main__":
    if FIRST and os.environ.get("RANK") == os.environ.get("LEAVES"):
        raise SystemExit(0)
    if MINE:
        time.sleep(3600)
    train(build)
"""
FLAGS = ("--epochs", "3", "--checkpoint-every", "2", "--shards", "3")


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    return str(tmp_path / "recipe.py")


@pytest.mark.parametrize("late", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_a_rank_that_never_joins_is_named_and_all_start_again(late, recipe, start, monkeypatch):
    monkeypatch.setenv("LATE", late)
    monkeypatch.setenv("PET_JOIN_TIMEOUT", "4")
    outcome = start("samestep", 2, recipe, *FLAGS)
    assert f"rank {late} failed: rank {late} did not join within 4 s; restart 1 of 3" in outcome.stderr
    assert len(outcome.losses) == 6
    assert [event["rank"] for event in outcome.of("worker_failed")] == []  # there was no events.jsonl yet


@pytest.mark.slow
@pytest.mark.parametrize("leaves", ["1", "0"])
def test_a_rank_that_leaves_with_0_before_it_joins_is_named_before_the_join_timeout(leaves, recipe, start, monkeypatch):
    monkeypatch.setenv("LEAVES", leaves)
    monkeypatch.setenv("PET_JOIN_TIMEOUT", "600")
    outcome = start("samestep", 2, recipe, *FLAGS)
    assert f"rank {leaves} failed: it left with 0 before the run was done" in outcome.stderr
    assert len(outcome.losses) == 6


@pytest.mark.slow
def test_a_rank_whose_device_is_gone_is_gone_on_without_in_the_same_bits(recipe, start, monkeypatch):
    reference = start("samestep", 3, recipe, *FLAGS, run_dir="reference")
    monkeypatch.setenv("GONE", "1")
    monkeypatch.setenv("PET_MIN_RANKS", "2")
    outcome = start("samestep", 3, recipe, *FLAGS, run_dir="fewer")
    assert "the device of rank 1 is gone: going on with 2 of 3 ranks" in outcome.stderr
    assert [event["world_size"] for event in outcome.of("restarted")] == [2]
    assert (outcome.digest, outcome.losses) == (reference.digest, reference.losses)
