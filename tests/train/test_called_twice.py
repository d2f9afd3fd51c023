"""`train` called again and again in one process, as notebooks do."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from samestep.train import Components, supervised, train


def test_a_call_leaves_neither_its_model_nor_a_thread(tmp_path: Path, monkeypatch: Any) -> None:
    """On one rank: what several ranks hold until they end are their connections."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    models: list[weakref.ref[nn.Module]] = []

    def build(config: Any) -> Components:
        x, model = torch.randn(20, 4), nn.Linear(4, 1)
        models.append(weakref.ref(model))
        optimizer = torch.optim.Adam(model.parameters())
        return Components(
            model=model, loss=supervised(nn.MSELoss()), optimizer=optimizer, train_data=TensorDataset(x, x[:, :1])
        )

    threads = set(threading.enumerate())
    digests = {train(build, argv=["--run-dir", str(tmp_path / f"{n}"), "--max-steps", "2"]).digest for n in range(2)}
    gc.collect()
    assert len(digests) == 1
    assert [model() for model in models] == [None, None]
    ended = [thread for thread in set(threading.enumerate()) - threads if not _ends(thread)]
    assert ended == []


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        if index == 7:
            raise ValueError("broken")
        return torch.ones(4), torch.ones(1)


def test_an_exception_that_is_looked_at_holds_no_worker(tmp_path: Path, monkeypatch: Any) -> None:
    """Its traceback holds their iterator; torch would end them when that is collected, in 10 s for each."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def build(config: Any) -> Components:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters())
        return Components(model=model, loss=supervised(nn.MSELoss()), optimizer=optimizer, train_data=Broken())

    before = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match="broken") as raised:
        train(build, argv=["--run-dir", str(tmp_path / "run"), "--num-workers", "2", "--check", "never"])
    assert raised.tb is not None
    assert set(multiprocessing.active_children()) <= before


def _ends(thread: threading.Thread) -> bool:
    thread.join(20)
    return not thread.is_alive()
