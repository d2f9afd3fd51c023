"""How long training stands still for a checkpoint of 100 million parameters (400 MB), and who notices a flipped bit.

    python benchmarks/save_stall.py FOLDER [DEVICE]

Alternately in one process: samestep's saver (copy, then a thread), torch.save, torch.distributed.checkpoint.async_save.
Prints one JSON line: milliseconds until training may go on (median and range of the rounds after each one's first).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.utils.data import TensorDataset

from samestep.launcher import manifest
from samestep.launcher.contract import RunDir
from samestep.train import Components, supervised
from samestep.train.observe.reporter import Reporter
from samestep.train.parallel.agreement import Agreement, AtOnce
from samestep.train.parallel.group import SoloGroup
from samestep.train.scaling import Unscaled
from samestep.train.state.saver import Clock, Schedule, WritingSaver
from samestep.train.state.train_state import TrainState

ROUNDS = 6


def main(folder: Path, device: str = "cpu") -> None:
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(100))).to(device)
    data = TensorDataset(torch.zeros(1, 1000), torch.zeros(1, 1000))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    components = Components(model=model, loss=supervised(nn.MSELoss()), optimizer=optimizer, train_data=data)
    state = TrainState(components, Unscaled(), None, {"seed": 0})
    run_dir = RunDir(folder / "ours")
    agreement = Agreement(SoloGroup(), AtOnce(SoloGroup()), lambda: 0, lambda: False)
    saver = WritingSaver(Schedule(None, Clock(None), agreement), run_dir, 0, 2)
    reporter = Reporter()

    def ours(number: int) -> Callable[[], object]:
        state.step = number + 1
        saver.save(state, reporter)
        return lambda: saver.wait(reporter)

    def torch_save(number: int) -> Callable[[], object]:
        torch.save(model.state_dict(), folder / f"{number % 2}.pt")
        return lambda: None

    def async_save(number: int) -> Callable[[], object]:
        future = dcp.async_save({"model": model.state_dict()}, checkpoint_id=folder / f"dcp-{number % 2}", no_dist=True)
        assert isinstance(future, Future)
        return future.result

    contenders = {"samestep": ours, "torch.save": torch_save, "dcp.async_save": async_save}
    stalls: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(ROUNDS):
        for name, save in contenders.items():
            if device != "cpu":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            finish = save(number)
            if device != "cpu":
                torch.cuda.synchronize()  # copies that only the device waits for count too
            stalls[name].append(1000 * (time.perf_counter() - begin))
            finish()  # its own time: the next contender starts on a quiet machine
            os.sync()
    row = {
        name: {"ms": round(statistics.median(values[1:])), "range": [round(min(values[1:])), round(max(values[1:]))]}
        for name, values in stalls.items()
    }
    print(json.dumps(row | {"flips": flips(run_dir, folder)}), flush=True)


def flips(run_dir: RunDir, folder: Path, tries: int = 50) -> dict[str, int]:
    """One bit of a tensor flipped on disk, 50 times: who says so?"""
    draw, noticed = random.Random(0), {"samestep": 0, "torch.load": 0}
    small = folder / "small.pt"
    torch.save(nn.Linear(1000, 1000).state_dict(), small)
    newest, _ = manifest.newest_valid(run_dir.checkpoints)
    assert newest is not None
    for _ in range(tries):
        noticed["samestep"] += _flip(newest / "model.safetensors", draw, lambda: bool(manifest.verify(newest)))
        noticed["torch.load"] += _flip(small, draw, lambda: _torch_load_refuses(small))
    return noticed | {"of": tries}


def _flip(path: Path, draw: random.Random, refused: Callable[[], bool]) -> bool:
    offset, bit = draw.randrange(path.stat().st_size // 4, path.stat().st_size // 2), 1 << draw.randrange(8)
    with path.open("r+b") as file:
        file.seek(offset)
        before = file.read(1)
        file.seek(offset)
        file.write(bytes([before[0] ^ bit]))
        file.flush()
        result = refused()
        file.seek(offset)
        file.write(before)
    return result


def _torch_load_refuses(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:  # noqa: BLE001 (whatever it says counts as noticed)
        return True
    return False


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    main(target, *sys.argv[2:])
