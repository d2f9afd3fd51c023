"""When a checkpoint is told of, and what it cost."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from samestep.launcher.contract import RunDir
from samestep.train.observe.reporter import Reporter
from samestep.train.state import saver as module
from samestep.train.state.checkpoint import Snapshot
from samestep.train.state.saver import WritingSaver


class Heard(Reporter):
    """Remembers checkpoints: step and seconds."""

    def __init__(self) -> None:
        self.checkpoints: list[tuple[int, float]] = []

    def checkpoint(self, step: int, path: Path, seconds: float) -> None:
        self.checkpoints.append((step, seconds))


def state(step: int) -> Any:
    snapshot = Snapshot(step, {}, {}, {}, {})
    return SimpleNamespace(step=step, loaded_step=None, best_step=None, capture=lambda _offset: snapshot)


@pytest.fixture
def heard() -> Heard:
    return Heard()


def make(tmp_path: Path) -> WritingSaver:
    schedule: Any = None
    return WritingSaver(schedule, RunDir(tmp_path), 0, 2)


def test_a_checkpoint_is_told_once_it_is_there_and_not_with_the_next_one(tmp_path: Path, heard: Heard) -> None:
    saver = make(tmp_path)
    saver.save(state(5), heard)
    assert saver._writing is not None
    wait([saver._writing[2]], 30)
    assert heard.checkpoints == []
    saver.tell(heard)
    saver.tell(heard)
    assert [step for step, _ in heard.checkpoints] == [5]
    saver.save(state(5), heard)
    assert saver.wait(heard)
    assert [step for step, _ in heard.checkpoints] == [5]


def test_training_also_stands_still_while_the_last_checkpoint_is_still_written(
    tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, now, again = [0], [0.0], threading.Event()

    def clock() -> float:
        asked[0] += 1
        if asked[0] == 3:  # the second save begins
            again.set()
        return now[0]

    def commit(snapshot: Snapshot, *_where: Any) -> Path:
        if snapshot.step == 1:
            assert again.wait(30)
            now[0] += 5.0
        return tmp_path

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock, monotonic=time.monotonic))
    monkeypatch.setattr(module, "commit", commit)
    saver = make(tmp_path)
    saver.save(state(1), heard)
    saver.save(state(2), heard)
    saver.wait(heard)
    assert heard.checkpoints == [(1, 0.0), (2, 5.0)]
