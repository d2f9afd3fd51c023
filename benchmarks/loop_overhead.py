"""What a loop costs beside its arithmetic: several loops alternately in one process group, on one workload.

    torchrun --nproc-per-node W benchmarks/loop_overhead.py WORKLOAD ROUNDS [DEVICE]

Rank zero prints one JSON line: median milliseconds a step, and median and spread of the ratios to hand-written DDP in
the same round, so a machine that slows down slows all of them. One rank also runs the loop without DDP; on a GPU that
one alone, and ratios are to it.
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
from pathlib import Path

import torch
from contenders import (
    WORKLOADS,
    Steps,
    accelerate_loop,
    fabric_loop,
    hand_written,
    hand_written_ddp,
    samestep,
)

from samestep.launcher import who_started
from samestep.train import environment, leave
from samestep.train.parallel.join import join, pick_device

DDP, PLAIN = "hand-written DDP", "without DDP"
PEERS = {"samestep": samestep, "accelerate": accelerate_loop, "fabric": fabric_loop}


def main(name: str, rounds: int, device: str = "cpu") -> None:
    env = who_started.worker(os.environ)
    environment.pin(1, False)
    member = join(env, pick_device(device, env))
    environment.pin(1, False)
    leave.end_hard(member)
    workload = WORKLOADS[name]
    by_hand = {DDP: hand_written_ddp} if device == "cpu" else {}
    by_hand |= {PLAIN: hand_written} if env.world_size == 1 else {}
    loops = PEERS | by_hand  # peers decide by themselves whether one rank needs a process group
    with tempfile.TemporaryDirectory() as folder:
        trains: dict[str, Steps] = {loop: make(workload, member, Path(folder) / loop) for loop, make in loops.items()}
        seconds: dict[str, list[float]] = {loop: [] for loop in trains}
        for train in trains.values():
            train(5)  # first steps wrap the model and import what optimizers need
        gc.collect()
        gc.freeze()
        for number in range(rounds):
            turns = list(trains.items())
            for loop, train in turns if number % 2 else reversed(turns):
                member.group.barrier()
                begin = time.perf_counter()
                train(workload.steps)
                if device != "cpu":
                    torch.cuda.synchronize()
                member.group.barrier()
                seconds[loop].append((time.perf_counter() - begin) / workload.steps)
    if env.rank == 0:
        on = "cpu" if device == "cpu" else torch.cuda.get_device_name()
        measured = table(seconds, next(iter(by_hand)))
        print(json.dumps({"workload": name, "W": env.world_size, "device": on, "loops": measured}), flush=True)
    member.group.barrier()


def table(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, object]]:
    """Per loop: milliseconds a step, ratio to the loop `base` and its spread."""
    rows: dict[str, dict[str, object]] = {}
    for loop, values in seconds.items():
        ratios = sorted(v / h for v, h in zip(values, seconds[base], strict=True))
        rows[loop] = {
            "ms": round(1000 * statistics.median(values), 3),
            "ratio": round(statistics.median(ratios), 3),
            "spread": [round(ratios[0], 3), round(ratios[-1], 3)],
        }
    return rows


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
