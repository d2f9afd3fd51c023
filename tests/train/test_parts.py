"""Each part of `Components` that is of another kind than was meant: named with its fix before the first step."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed import FileStore, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset, random_split

from samestep.launcher.contract import UsageError
from samestep.train import Components, Weighted, supervised
from samestep.train.checks import check_among_ranks, check_components, without_use

X, Y = torch.zeros(6, 3), torch.zeros(6, 1)


def loss(model: Any, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def parts(**changed: Callable[[Components], Any]) -> Components:
    """A recipe that is fine, with some parts replaced by what is made of it."""
    model = nn.Linear(3, 1)
    fine = Components(model=model, loss=loss, optimizer=SGD(model.parameters(), lr=0.1), train_data=TensorDataset(X, Y))
    for name, make in changed.items():
        setattr(fine, name, make(fine))
    return fine


def step_of(parameters: Any) -> Any:
    return lr_scheduler.StepLR(SGD(parameters, lr=0.1), 1)


class Endless:
    def step(self) -> None:
        """Nothing."""


MISTAKES: dict[str, tuple[str, Callable[[Components], Any], str, str]] = {
    "no optimizer": ("optimizer", lambda _: None, "optimizer.*is None", r"model\.parameters\(\)"),
    "class of optimizers": ("optimizer", lambda _: SGD, "optimizer.*class SGD", r"model\.parameters\(\)"),
    "optimizers": ("optimizer", lambda c: [c.optimizer], "optimizer.*object of list", "parameter groups"),
    "another's scheduler": ("scheduler", lambda c: step_of(c.model.parameters()), "StepLR.*another SGD", "Components"),
    "class of schedulers": ("scheduler", lambda _: lr_scheduler.StepLR, "scheduler.*class StepLR", r"StepLR\(opt"),
    "schedulers": ("scheduler", lambda c: [lr_scheduler.StepLR(c.optimizer, 1)], "scheduler.*list", "SequentialLR"),
    "scheduler without state": ("scheduler", lambda _: Endless(), "state_dict, but Endless has none", "LRScheduler"),
    "criterion": ("loss", lambda _: nn.MSELoss(), r"criterion MSELoss\(\)", r"supervised\(MSELoss\(\)\)"),
    "functional criterion": ("loss", lambda _: F.mse_loss, "criterion mse_loss", r"supervised\(mse_loss\)"),
    "class of criteria": ("loss", lambda _: nn.MSELoss, "class MSELoss", r"supervised\(nn\.MSELoss\(\)\)"),
    "loss of three": ("loss", lambda _: lambda model, x, y: x, r"loss.*\(model, batch\).*\(model, x, y\)", "batch"),
    "collate function": ("collate_fn", lambda _: 3, "collate_fn.*int", "default_collate"),
    "collate without samples": ("collate_fn", lambda _: lambda: 3, r"collate_fn.*\(samples\)", "samples"),
    "list of metrics": ("metrics", lambda _: [loss], "metrics.*dict.*list", "accuracy"),
    "metric in place of the loss": ("metrics", lambda _: {"loss": loss}, "another one than loss", "leave it out"),
    "metric without name": ("metrics", lambda _: {3: loss}, "name in Components.metrics.*3", ""),
    "name of a metric": ("metrics", lambda _: {"accuracy": "accuracy"}, "metric accuracy.*str", "supervised"),
    "criterion as metric": ("metrics", lambda _: {"mae": nn.L1Loss()}, "metric mae.*L1Loss", "supervised"),
    "loader": ("train_data", lambda c: DataLoader(c.train_data), "train_data.*DataLoader", r"loader\.dataset"),
    "class of datasets": ("eval_data", lambda _: TensorDataset, "eval_data.*class TensorDataset", r"TensorDataset\("),
    "dict of datasets": ("train_data", lambda c: {"train": c.train_data}, "train_data.*dict", r"\['train'\]"),
    "columns": ("train_data", lambda _: (X, Y), "train_data.*tuple", r"TensorDataset\(x, y\)"),
    "arrays": ("eval_data", lambda _: [np.zeros((4, 2)), np.zeros(4)], "eval_data.*list", r"TensorDataset\(x, y\)"),
    "both parts": ("train_data", lambda c: random_split(c.train_data, [4, 2]), "train_data.*list", "one of them"),
    "path": ("train_data", lambda _: "data/train", "train_data.*str", "read it"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_part_of_another_kind_is_named_with_its_fix(mistake: str) -> None:
    name, make, words, hint = MISTAKES[mistake]
    with pytest.raises(UsageError, match=words) as raised:
        check_components(parts(**{name: make}))
    assert re.search(hint, raised.value.hint), raised.value.hint


def test_a_model_that_was_wrapped_already_is_named(tmp_path: Path) -> None:
    init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(nn.Linear(3, 1))
    finally:
        destroy_process_group()
    for model in (wrapped, nn.Sequential(wrapped)):
        components = parts()
        components.model = model
        with pytest.raises(UsageError, match=r"model itself.*DistributedDataParallel") as raised:
            check_components(components)
        assert "DDP(…)" in raised.value.hint


class Wrapper(torch.optim.Optimizer):
    """Shares the groups of the optimizer inside, as Lookahead does."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self.param_groups, self.state, self.defaults = inside.param_groups, inside.state, inside.defaults

    def step(self) -> None:  # type: ignore[override]
        """Not called here."""


def with_wrapped_optimizer() -> Components:
    fine = parts(scheduler=lambda c: lr_scheduler.StepLR(c.optimizer, 1))
    fine.optimizer = Wrapper(fine.optimizer)
    return fine


@pytest.mark.parametrize(
    "make",
    [
        lambda: parts(scheduler=lambda c: lr_scheduler.ReduceLROnPlateau(c.optimizer)),
        lambda: parts(scheduler=lambda c: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(c.optimizer, 1)])),
        with_wrapped_optimizer,
        lambda: parts(loss=lambda _: supervised(nn.MSELoss())),
        lambda: parts(loss=lambda _: nn.Bilinear(2, 2, 1)),  # any module may be a loss of two things
        lambda: parts(metrics=lambda _: {"mae": supervised(F.l1_loss), "mse": loss}),
        lambda: parts(train_data=lambda _: (torch.zeros(3), torch.zeros(3), torch.zeros(3))),
        lambda: parts(train_data=lambda _: {0: X, 1: X}),
        lambda: parts(train_data=lambda c: [c.train_data[0]]),
        lambda: parts(collate_fn=lambda _: torch.stack),
    ],
)
def test_whatever_works_passes(make: Callable[[], Components]) -> None:
    check_components(make())


def test_metrics_that_nothing_asks_for_are_told() -> None:
    metrics = parts(metrics=lambda _: {"mae": supervised(F.l1_loss)})
    assert without_use(metrics) == ["metrics are not computed, as there is no eval_data: mae"]
    metrics.eval_data = metrics.train_data
    assert without_use(metrics) == without_use(parts()) == []


@pytest.mark.parametrize("criterion", [nn.MSELoss, None, "mse"])
def test_supervised_wants_a_criterion_that_can_be_called(criterion: Any) -> None:
    with pytest.raises(UsageError, match="criterion") as raised:
        supervised(criterion)
    assert "supervised(nn.MSELoss())" in raised.value.hint


@pytest.mark.parametrize(
    ("batch", "words"),
    [((X, Y, Y), "tuple of 3"), ([X], "list of 1"), ({"x": X, "y": Y}, "dict"), (X[:2], "Tensor")],
    ids=["three", "one", "dict", "two rows"],
)
def test_supervised_wants_pairs(batch: Any, words: str) -> None:
    with pytest.raises(UsageError, match=f"batch .x, y., .*{words}") as raised:
        supervised(nn.MSELoss())(nn.Linear(3, 1), batch)
    assert "def loss(model, batch)" in raised.value.hint


def test_supervised_takes_pairs_of_any_kind() -> None:
    results = [supervised(F.mse_loss)(nn.Identity(), pair) for pair in ((X, X), [X, X])]
    assert not any(isinstance(result, Weighted) for result in results)


def test_layers_that_wait_for_other_ranks_are_refused_where_there_are_shards() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    check_among_ranks(model, 1, 1)
    for shards, world_size in ((2, 1), (2, 2), (1, 2)):
        with pytest.raises(UsageError, match="has one at '1'"):
            check_among_ranks(model, shards, world_size)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_bound_their_norm_in_forward_are_refused_where_there_are_shards(kind: Any) -> None:
    model = nn.Sequential(nn.Sequential(kind(4, 2, max_norm=1.0)), kind(4, 2), kind(4, 2, max_norm=2.0))
    check_among_ranks(model, 1, 1)
    for shards, world_size in ((2, 1), (2, 2), (1, 2)):
        with pytest.raises(UsageError, match=r"no max_norm with . shards, but 0.0 has one, as have 1 more") as raised:
            check_among_ranks(model, shards, world_size)
        assert "on one rank with --shards 1" in raised.value.hint
    check_among_ranks(nn.Sequential(kind(4, 2)), 2, 2)
