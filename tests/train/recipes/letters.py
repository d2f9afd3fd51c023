"""Gathers tensors below and above what fits into shared memory, and prints which of them came out right."""

import os

import torch

from samestep.launcher import who_started
from samestep.train.parallel.join import join, pick_device
from samestep.train.parallel.shared_memory import LETTER_BYTES

if __name__ == "__main__":
    env = who_started.worker(os.environ)
    group = join(env, pick_device("cpu", env)).group
    for size in (0, 8, LETTER_BYTES, LETTER_BYTES + 8):
        before = group.arena.meetings if group.arena else 0
        mine = torch.arange(size // 8) + env.rank
        expected = torch.stack([torch.arange(size // 8) + rank for rank in range(env.world_size)])
        assert torch.equal(group.gather(mine), expected), size
        met = group.arena.meetings - before if group.arena else 0
        print(size, "in memory" if met else "through gloo")
    counted = group.collectives()
    group.barrier()
    print("counted", group.collectives() - counted)
