"""Calls of `train` that end in the middle, in a process that lives on: nothing of them is left in it."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from samestep.launcher import manifest
from samestep.launcher.contract import RunDir, UsageError
from samestep.launcher.lock import RunLock
from samestep.train import Components, train
from samestep.train.state.files import write_tensors

FLAGS = ("--global-batch-size", "8", "--checkpoint-every", "1")
WAIT, WRITE = "samestep.train.state.saver.wait_for_all", "samestep.train.state.checkpoint.write_tensors"
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


class Rows(TensorDataset):
    """Fetched one by one."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return super().__getitem__(index)


def recipe(model: nn.Module, at: int = 0, fault: Callable[[], None] = lambda: None) -> Callable[[Any], Components]:
    """Step `at` begins with a fault."""
    losses = iter(range(1, 1000))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if next(losses) == at:
            fault()
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def build(config: Any) -> Components:
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return Components(model=model, loss=loss, optimizer=optimizer, train_data=Rows(X, X[:, :1]))

    return build


def raising(error: BaseException) -> Callable[[], None]:
    def fault() -> None:
        raise error

    return fault


class Disk:
    """Writes the first checkpoint when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        monkeypatch.setattr(WRITE, self)

    def __call__(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        if not self.begun.is_set():
            self.begun.set()
            assert self.go.wait(60)
        write_tensors(tensors, path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    slow = Disk(monkeypatch)
    yield slow
    slow.go.set()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine")], ids=type)
def test_the_directory_is_free_once_its_checkpoint_is_written(
    error: BaseException, alone: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(alone / "run")

    def waiting(*what: Any) -> Any:
        with pytest.raises(UsageError, match="in use"):
            RunLock(run_dir)
        disk.go.set()
        return wait(*what)

    def fault() -> None:
        assert disk.begun.wait(60)
        monkeypatch.setattr(WAIT, waiting)
        raise error

    with pytest.raises(type(error)) as raised:
        train(recipe(nn.Linear(4, 1), 2, fault), argv=[*FLAGS, "--run-dir", str(run_dir.path)])
    assert raised.value is error
    RunLock(run_dir).release()
    assert [path.name for path in run_dir.checkpoints.iterdir()] == ["step-00000001"]
    last = json.loads(run_dir.events.read_text().splitlines()[-1])
    assert (last["event"], last["step"]) == ("checkpoint", 1)


def test_a_write_that_fails_hides_no_exception(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def broken(*_what: Any) -> None:
        begun.set()
        raise RuntimeError("the disk's own")

    def fault() -> None:
        assert begun.wait(60)
        raise ValueError("mine")

    monkeypatch.setattr(WRITE, broken)
    with pytest.raises(ValueError, match="mine"):
        train(recipe(nn.Linear(4, 1), 2, fault), argv=[*FLAGS, "--run-dir", str(alone / "run")])
    assert "the checkpoint of step 1 could not be written (the disk's own)" in (alone / "run/events.jsonl").read_text()


def test_who_interrupts_twice_does_not_wait_and_the_write_spoils_no_later_call(
    alone: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(alone / "run")
    writer: list[threading.Thread] = []

    def fault() -> None:
        assert disk.begun.wait(60)
        writer.extend(thread for thread in threading.enumerate() if thread.name.startswith("checkpoint"))
        monkeypatch.setattr(WAIT, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        raise KeyboardInterrupt

    argv = [*FLAGS, "--run-dir", str(run_dir.path)]
    with pytest.raises(KeyboardInterrupt):
        train(recipe(nn.Linear(4, 1), 2, fault), argv=argv)
    monkeypatch.setattr(WAIT, wait)
    assert writer[-1].is_alive()
    digest = train(recipe(nn.Linear(4, 1)), argv=argv).digest
    disk.go.set()
    writer[-1].join(60)
    assert digest == train(recipe(nn.Linear(4, 1)), argv=[*FLAGS, "--run-dir", str(alone / "whole")]).digest
    assert {path.name for path in run_dir.checkpoints.iterdir()} == {"step-00000007", "step-00000008"}
    assert not any(map(manifest.verify, run_dir.checkpoints.iterdir()))


def test_a_model_of_the_callers_keeps_no_hook(alone: Path) -> None:
    model, register = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)), torch.Tensor.register_hook
    with pytest.raises(KeyboardInterrupt):
        train(recipe(model, 2, raising(KeyboardInterrupt())), argv=["--run-dir", str(alone / "run"), "--shards", "2"])
    assert torch.Tensor.register_hook is register
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == [{}, {}, {}]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine")], ids=type)
def test_an_exception_that_is_looked_at_holds_no_thread(error: BaseException, alone: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(type(error)) as raised:
        train(
            recipe(nn.Linear(4, 1), 3, raising(error)),
            argv=[*FLAGS, "--run-dir", str(alone / "run"), "--num-workers", "2"],
        )
    assert raised.tb is not None
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive(), thread


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("at", [2, 0], ids=["fails", "ends"])
def test_a_terminal_has_its_cursor_again(at: int, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    build = recipe(nn.Linear(4, 1), at, raising(ValueError("mine")))
    try:
        train(build, argv=["--run-dir", str(alone / "run")])
    except ValueError:
        assert at
    said = terminal.getvalue()
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") == 1


def test_a_tracked_run_that_fails_is_failed_there(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    store = f"file://{alone / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    states: list[str] = []
    for at in (3, 0):
        argv = [*FLAGS, "--run-dir", str(alone / "run"), "--trackers", "mlflow"]
        try:
            train(recipe(nn.Linear(4, 1), at, raising(KeyboardInterrupt())), argv=argv)
        except KeyboardInterrupt:
            assert at
        assert mlflow.active_run() is None
        states += [run.info.status for run in mlflow.search_runs(search_all_experiments=True, output_format="list")]
    assert states[0] == "FAILED"
    assert states[-1] == "FINISHED"


def test_what_the_caller_kept_from_the_collector_stays_so(alone: Path) -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    try:
        train(recipe(nn.Linear(4, 1)), argv=["--run-dir", str(alone / "run")])
        assert before * 0.99 < gc.get_freeze_count() <= before, "and nothing of the call is among it"
    finally:
        gc.unfreeze()
    train(recipe(nn.Linear(4, 1)), argv=["--run-dir", str(alone / "again")])
    assert gc.get_freeze_count() == 0
