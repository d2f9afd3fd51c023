"""The same bits on any number of ranks, however parameters lie in memory and whenever they train."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from samestep.train.data.order import permute
from samestep.train.data.rng import seed_everything

RECIPES = Path(__file__).resolve().parent / "recipes"
pytestmark = pytest.mark.timeout(120)
FLAGS = ("--shards", 4, "--threads", 1)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--clip-grad-norm", 0.01), marks=pytest.mark.slow),
        ("--micro-batches", 2, "--unused"),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("--unused",), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", ["channels last", "turned"])
def test_gradients_reach_the_elements_that_they_belong_to(trained: Any, case: str, flags: tuple[Any, ...]) -> None:
    """DDP lays its buckets out as a parameter lies in memory, and shows them to hooks as if all lay row by row."""
    runs = [trained("laid_out", *FLAGS, "--case", case, *flags, ranks=n, cwd=f"on-{n}") for n in (1, 2, 3)]
    assert runs[1].bits == runs[0].bits
    assert runs[2].bits == runs[0].bits


@pytest.mark.parametrize("case", ["thaws", "freezes"])
@pytest.mark.parametrize(
    ("shards", "unused"),
    [
        (4, "--unused"),
        pytest.param(2, "--no-unused", marks=pytest.mark.slow),
        pytest.param(4, "--no-unused", marks=pytest.mark.slow),
        pytest.param(2, "--unused", marks=pytest.mark.slow),
    ],
)
def test_a_layer_may_begin_and_end_to_train_on_the_way(trained: Any, shards: int, case: str, unused: str) -> None:
    """On 4 ranks with 2 shards two never run a forward, so they have to be told."""
    flags = ("--shards", shards, "--threads", 1, "--case", case, unused)
    runs = [trained("laid_out", *flags, ranks=n, cwd=f"on-{n}") for n in (1, 2, 4)]
    assert runs[1].bits == runs[0].bits
    assert runs[2].bits == runs[0].bits


@pytest.mark.parametrize("case", ["thaws", "freezes"])
def test_a_layer_that_thaws_or_freezes_trains_as_in_a_hand_written_loop(
    trained: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one shard the gradient is plain backward's, so it is the same bits."""
    epochs = 8
    flags = ("--case", case, "--shards", 1, "--threads", 1, "--global-batch-size", 60, "--epochs", epochs)
    ended = trained("laid_out", *flags)
    monkeypatch.syspath_prepend(RECIPES)
    recipe = importlib.import_module("laid_out")
    seed_everything(0)
    parts = recipe.build(recipe.LaidOutConfig(case=case))
    for epoch in range(epochs):
        x, y = parts.train_data[torch.from_numpy(permute(np.arange(60), 60, 0, epoch))]
        parts.optimizer.zero_grad()
        torch.nn.functional.mse_loss(parts.model(x), y).backward()
        parts.optimizer.step()
    for name, value in parts.model.state_dict().items():
        assert torch.equal(ended.weights[name], value), name


@pytest.mark.parametrize("case", ["thaws", pytest.param("freezes", marks=pytest.mark.slow)])
def test_a_layer_that_thawed_or_froze_before_a_stop_does_so_no_more_after_it(trained: Any, case: str) -> None:
    """The forward says so once, in a step that a resumed run does not come to."""
    flags = ("--shards", 2, "--threads", 1, "--case", case)
    whole = trained("laid_out", *flags, cwd="whole").bits
    trained("laid_out", *flags, "--max-steps", 4, ranks=2)
    assert trained("laid_out", *flags).bits == whole
