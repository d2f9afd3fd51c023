"""P5: whatever ends a rank in the middle of training, that rank is named, with the cause and the fix."""

import random

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]
RECIPE = """
import ctypes, mmap, os, signal, sys, tempfile
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset
from samestep.train import Components, supervised, train

KIND, CULPRIT, STEP = os.environ["KIND"], os.environ["CULPRIT"], int(os.environ["STEP"])
calls = 0


class Data(Dataset):
    def __len__(self):
        return 96

    def __getitem__(self, index):
        if index == 17 and KIND == "sample":
            raise ValueError("bad file")
        if index == 17 and KIND == "loader killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 17 and KIND == "loader left":
            os._exit(3)
        return torch.full((10,), float(index)), torch.ones(1)


def crash():
    ctypes.string_at(0)


def shorten():
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        mapped = mmap.mmap(file.fileno(), 4096)
        file.truncate(0)
        mapped[0]


def free_twice():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    place, _ = libc.malloc(2000), libc.malloc(2000)
    libc.free(ctypes.c_void_p(place))
    libc.free(ctypes.c_void_p(place))


def fail():
    raise KeyError("label")


def memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.11 GiB")


STRIKES = {
    "exit 0": lambda: sys.exit(0),
    "hard exit 0": lambda: os._exit(0),
    "exit 5": lambda: sys.exit(5),
    "segmentation fault": crash,
    "bus error": shorten,
    "heap": free_twice,
    "abort": os.abort,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "illegal": lambda: os.kill(os.getpid(), signal.SIGILL),
    "exception": fail,
    "device memory": memory,
}


def loss(model, batch):
    global calls
    calls += 1
    mine = os.environ["RANK"] == CULPRIT
    if calls == STEP and KIND == "other collective":
        dist.all_reduce(torch.ones(1 if mine else 100000))
    if calls == STEP and mine and KIND in STRIKES:
        STRIKES[KIND]()
    return supervised(nn.MSELoss())(model, batch)


def build(config):
    model = nn.Linear(10, 1)
    return Components(model=model, loss=loss, optimizer=torch.optim.Adam(model.parameters()), train_data=Data())


if __name__ == "__main__":
    train(build)
"""
LEFT = "left with 0 before the run was done"
# what the block says: the cause in its first line, then anywhere
KINDS = {
    "exit 0": (LEFT, "in <lambda>", "all ranks after the same step"),
    "hard exit 0": (LEFT, "others still needed it", "early exit or return"),
    "exit 5": ("SystemExit: left with 5", "in <lambda>", "every rank must take part"),
    "segmentation fault": ("killed by SIGSEGV (signal 11)", "in crash", "    from "),
    "bus error": ("killed by SIGBUS (signal 7)", "in shorten", "shared memory"),
    "heap": ("killed by SIGABRT (signal 6): double free or corruption", "in free_twice", "native code gave up"),
    "abort": ("killed by SIGABRT (signal 6)", "in <lambda>|in loss", "native code gave up"),
    "kill": ("killed by SIGKILL (signal 9)", "memory was not short (it held", "step 2, phase forward"),
    "illegal": ("killed by SIGILL (signal 4)", "in <lambda>", "this CPU doesn't have"),
    "exception": ("KeyError: 'label'", "in fail, step", "phase forward"),
    "device memory": (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB",
        "in memory",
        "2 micro-batches",
    ),
    "sample": (
        "ValueError: bad file (sample 17 of the dataset, in DataLoader worker 0)",
        "in __getitem__",
        "phase data",
    ),
    # torch leaves the signal or status out where its queue notices before its handler of SIGCHLD does
    "loader killed": ("DataLoader worker (pid", "killed by signal: Killed|exited unexpectedly", "data loading process"),
    "loader left": ("DataLoader worker (pid", "exited unexpectedly", "a data loading process died"),
}
BY_DATA = {"sample", "loader killed", "loader left"}
FAST = ("segmentation fault",)


def block_of(start, monkeypatch, tmp_path, kind, culprit=1, step=2, world_size=2):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "recipe.py").write_text(RECIPE)
    for name, value in {"KIND": kind, "CULPRIT": culprit, "STEP": step}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PET_MAX_RESTARTS", "0")
    flags = ["--num-workers", "1"] if kind in BY_DATA else []
    outcome = start("samestep", world_size, str(tmp_path / "recipe.py"), *flags, run_dir=tmp_path.name, status=1)
    lines = outcome.stderr.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("samestep: rank "))
    return lines[first:]


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_the_block_names_the_culprit_the_cause_and_the_fix(kind, start, monkeypatch, tmp_path):
    block = block_of(start, monkeypatch, tmp_path, kind)
    text = "\n".join(block)
    cause, *others = KINDS[kind]
    assert cause in block[0]
    assert kind in BY_DATA or block[0].startswith("samestep: rank 1 failed: ")
    for words in others:
        assert any(word in text for word in words.split("|")), text
    assert "1 other rank stopped as a consequence" in text
    assert "exit code 1: " in text
    assert len(block) <= 12


@pytest.mark.slow
def test_ranks_that_call_different_collectives_are_told_so(start, monkeypatch, tmp_path):
    block = block_of(start, monkeypatch, tmp_path, "other collective")
    assert "gloo::EnforceNotMet: op.preamble.length <= op.nbytes" in block[0]
    assert "ranks called different collectives" in block[-1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_random_culprits_are_all_named(start, monkeypatch, tmp_path):
    choose, named, wrong = random.Random(4), 0, []
    kinds = [kind for kind in KINDS if kind not in BY_DATA]
    for trial in range(100):
        kind, world_size = choose.choice(kinds), choose.choice((2, 3))
        culprit, step = choose.randrange(world_size), choose.choice((1, 2, 3))
        block = block_of(start, monkeypatch, tmp_path / f"{trial}", kind, culprit, step, world_size)
        right = block[0].startswith(f"samestep: rank {culprit} failed: ") and KINDS[kind][0] in block[0]
        named += right
        if not right:
            wrong.append((kind, culprit, step, world_size, block[0]))
    assert wrong == [], f"{named} of 100 named"
