"""`train` called again and again in one process, as notebooks do."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

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


def _ends(thread: threading.Thread) -> bool:
    thread.join(20)
    return not thread.is_alive()
