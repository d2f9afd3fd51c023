"""Rank zero writes a file late and meets the others; they look for it right after the meeting."""

import os
import sys
import time
from pathlib import Path

import torch

from samestep.launcher import who_started
from samestep.train.leave import end_hard
from samestep.train.parallel.join import join, pick_device

if __name__ == "__main__":
    env = who_started.worker(os.environ)
    member = join(env, pick_device("cuda", env))
    end_hard(member)
    member.group.barrier()
    for number in range(5):
        file = Path(f"written-{number}")
        if env.rank == 0:
            time.sleep(0.3)
            file.touch()
        member.group.barrier()
        if not file.exists():
            sys.exit(f"the file of meeting {number} is not there")
    words = member.group.gather_bytes(b"x" * (env.rank + 1))
    assert [len(part) for part in words] == [1, 2], words
    assert torch.cuda.current_device() == 0
