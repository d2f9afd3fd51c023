"""A run goes on with the optimizer's numbers of its checkpoint; who has edited them in `build` is told so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR
from torch.utils.data import TensorDataset

from samestep.train import Components, supervised, train

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
SCHEDULERS: dict[str, Callable[[Any], LRScheduler | None]] = {
    "none": lambda _: None,
    "steps": lambda optimizer: StepLR(optimizer, 1, 0.5),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=8),  # moves betas too
}


@pytest.fixture
def warned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run to so many steps; the warnings of this start."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def call(steps: int, scheduler: str, groups: int = 1, kind: Any = torch.optim.Adam, **options: Any) -> list[str]:
        def build(config: Any) -> Components:
            model = nn.Linear(4, 1)
            parts = [list(model.parameters())] if groups == 1 else [[model.weight], [model.bias]]
            optimizer = kind([{"params": part} for part in parts], **options)
            return Components(
                model=model,
                loss=supervised(nn.MSELoss()),
                optimizer=optimizer,
                scheduler=SCHEDULERS[scheduler](optimizer),
                train_data=TensorDataset(X, X[:, :1]),
            )

        argv = ["--run-dir", str(tmp_path / "run"), "--global-batch-size", "8", "--max-steps", str(steps)]
        events = train(build, argv=argv).run_dir / "events.jsonl"
        told = [json.loads(line) for line in events.read_text().splitlines()]
        return [event["text"] for event in told if event["event"] == "warning"]

    return call


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_nobody_edited_is_not_told_of(warned: Any, scheduler: str) -> None:
    for steps in (2, 4, 6):
        assert warned(steps, scheduler, lr=0.1, betas=(0.8, 0.9), weight_decay=0.01) == []


@pytest.mark.parametrize(("scheduler", "name"), [("none", "lr"), ("steps", "initial_lr")])
def test_an_edited_learning_rate_is_named_with_both_numbers(warned: Any, scheduler: str, name: str) -> None:
    assert warned(2, scheduler, lr=0.1) == []
    (text,) = warned(4, scheduler, lr=0.25)
    assert f"as it was saved in step-00000002: {name} is 0.1 there and 0.25 in build (" in text


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_edits_that_no_scheduler_makes_are_named_beside_one(warned: Any, scheduler: str) -> None:
    assert warned(2, scheduler, lr=0.1) == []
    (text,) = warned(4, scheduler, lr=0.1, eps=1e-4, amsgrad=True)
    assert "amsgrad is False there and True in build, eps is 1e-08 there and 0.0001 in build (" in text


def test_groups_are_named_where_there_are_several(warned: Any) -> None:
    assert warned(2, "none", groups=2, lr=torch.tensor(0.5)) == []
    (text,) = warned(4, "none", groups=2, lr=torch.tensor(0.25), betas=(0.5, 0.5))
    assert "betas of group 0 is (0.9, 0.999) there and (0.5, 0.5) in build, lr of group 0 is 0.5 there" in text


def test_an_optimizer_of_another_kind_is_refused(warned: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """torch loads its state without a word and fails in the step."""
    warned(2, "none", lr=0.1)
    with pytest.raises(SystemExit, match="2"):
        warned(4, "none", kind=torch.optim.SGD, lr=0.1)
    said = capfd.readouterr().err
    assert (
        "expected to fit step-00000002, but do not: SGD needs dampening, which the saved optimizer did not have" in said
    )
