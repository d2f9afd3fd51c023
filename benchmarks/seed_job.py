"""The seed's job (linear, 10 000 samples, batch 32, Adam): an epoch of four loops, alternately in one process.

    python benchmarks/seed_job.py ROUNDS

The loop as it was written, with its 4 loader workers; the same without workers; whole-batch indexing by hand, which is
the floor; samestep. Prints one JSON line: median seconds an epoch, and ratios to the floor of the same round.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from contenders import Workload, recipe, samestep, squared
from torch import nn
from torch.utils.data import DataLoader

from samestep.launcher import who_started
from samestep.train import Components, environment, leave
from samestep.train.parallel.join import join, pick_device

BATCH = 32
MAKE = recipe("seed_linear", "SeedConfig")


def by_hand(batches_of: Callable[[Components], Callable[[], Iterator[Any]]]) -> Callable[[], None]:
    components = MAKE()
    model, optimizer, criterion = components.model, components.optimizer, nn.MSELoss()
    batches = batches_of(components)

    def epoch() -> None:
        total = 0.0
        for x, y in batches():
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()

    return epoch


def with_workers(workers: int) -> Callable[[Components], Callable[[], Iterator[Any]]]:
    def batches_of(components: Components) -> Callable[[], Iterator[Any]]:
        loader: Any = DataLoader(components.train_data, batch_size=BATCH, shuffle=True, num_workers=workers)
        return lambda: iter(loader)

    return batches_of


def indexed(components: Components) -> Callable[[], Iterator[Any]]:
    data: Any = components.train_data

    def batches() -> Iterator[Any]:
        order = torch.randperm(len(data))
        return (data[order[begin : begin + BATCH]] for begin in range(0, len(data), BATCH))

    return batches


def main(rounds: int) -> None:
    env = who_started.worker(os.environ)
    environment.pin(1, False)
    member = join(env, pick_device("cpu", env))
    environment.pin(1, False)
    steps = -(-10_000 // BATCH)
    with tempfile.TemporaryDirectory() as folder:
        train = samestep(Workload(MAKE, squared, BATCH, steps), member, Path(folder) / "run")
        epochs: dict[str, Callable[[], None]] = {
            "by hand, whole batches": by_hand(indexed),
            "samestep": lambda: train(steps),
            "the seed's loop, 0 workers": by_hand(with_workers(0)),
            "the seed's loop, 4 workers": by_hand(with_workers(4)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in epochs}
        for epoch in epochs.values():
            epoch()
        gc.collect()
        gc.freeze()
        for _ in range(rounds):
            for name, epoch in epochs.items():
                begin = time.perf_counter()
                epoch()
                seconds[name].append(time.perf_counter() - begin)
    floor, row = seconds["by hand, whole batches"], {}
    for name, values in seconds.items():
        ratios = sorted(value / least for value, least in zip(values, floor, strict=True))
        row[name] = {
            "ms": round(1000 * statistics.median(values), 1),
            "ratio": round(statistics.median(ratios), 2),
            "spread": [round(ratios[0], 2), round(ratios[-1], 2)],
        }
    print(json.dumps(row), flush=True)
    leave.end_hard(member)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]))
