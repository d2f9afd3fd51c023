"""Workers live as long as their rank, and no longer."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from samestep.train.data.shield import ShieldedLoader, shield

LOADS = """
import os, sys, time
from torch.utils.data import Dataset
from torch.utils.data._utils import worker
from samestep.train.data.shield import ShieldedLoader, shield


class Slow(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index


def late(number):
    # the second worker begins when the rank is dead
    while number == 1 and os.getppid() == rank:
        time.sleep(0.01)
    shield(number)


rank = os.getpid()
worker.MP_STATUS_CHECK_INTERVAL = 600  # torch's own look for the parent, every 5 s: too late to help here
batches = iter(ShieldedLoader(Slow(), num_workers=2, worker_init_fn=late if sys.argv[1] == "late" else shield))
next(batches)
print("loading", flush=True)
time.sleep(600)
"""


@pytest.mark.timeout(60)
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells of a parent's death")
@pytest.mark.parametrize("begins", ["before", "late"])
def test_workers_end_at_once_with_a_rank_that_is_killed(begins: str, tmp_path: Path) -> None:
    script = tmp_path / "loads.py"
    script.write_text(LOADS)
    held, holds = os.pipe()  # at its end when the last process that has `holds` is gone
    rank = subprocess.Popen([sys.executable, script, begins], stdout=subprocess.PIPE, pass_fds=[holds])
    os.close(holds)
    assert rank.stdout is not None
    assert rank.stdout.readline() == b"loading\n"
    rank.send_signal(signal.SIGKILL)
    rank.wait(20)
    ended, _, _ = select.select([held], [], [], 20.0)
    os.close(held)
    rank.stdout.close()
    assert ended


class OfTheParent:
    """Part of a cycle; a CUDA event in its place would abort where a fork destroys it."""

    def __init__(self, ended_by: Path) -> None:
        self.itself = self
        self.ended_by = ended_by

    def __del__(self) -> None:
        with self.ended_by.open("a") as file:
            file.write(f"{os.getpid()}\n")


class Collects(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


def test_what_the_rank_has_not_collected_yet_is_left_to_it_by_its_workers(tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        OfTheParent(tmp_path / "ended-by")
        assert len(list(ShieldedLoader(Collects(), num_workers=2, worker_init_fn=shield))) == 4
        assert not (tmp_path / "ended-by").exists()
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "ended-by").read_text() == f"{os.getpid()}\n"
