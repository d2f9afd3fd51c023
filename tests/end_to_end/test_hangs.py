"""A rank that hangs is found, named with its place, and costs a restart and no bit; a rank with time is left alone."""

import re

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]
FLAGS = ("--max-steps", "12", "--checkpoint-every", "4", "--global-batch-size", "64")
RECIPE = """
import ctypes, os, re, signal, time
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset
from samestep.train import Components, supervised, train

RANK, FIRST = int(os.environ.get("RANK", "0")), {always} or os.environ.get("SAMESTEP_GENERATION") == "0"
FAULT, STRUCK, SLOW = "{fault}", RANK == {rank} and FIRST, {slow}
calls = items = 0


def never_returns():
    time.sleep(3600)


def strike(model):
    match FAULT:
        case "sleep":
            never_returns()
        case "regex":
            re.match(r"(a?){{40}}a{{40}}", "a" * 40)
        case "lock":
            ctypes.PyDLL(None).sleep(3600)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "extra":
            dist.all_reduce(torch.ones(3))
        case "backward":
            next(model.parameters()).register_hook(lambda gradient: never_returns())


def loss(model, batch):
    global calls
    calls += 1
    time.sleep(SLOW.get("loss", 0) if RANK == {rank} else 0)
    time.sleep(SLOW.get(calls, 0))
    if FIRST and calls == {call} and model.training:
        if FAULT == "skip" and not STRUCK:
            dist.all_reduce(torch.ones(3))
        if STRUCK:
            strike(model)
    if STRUCK and FAULT == "evaluation" and not model.training and calls > 13:
        never_returns()
    return supervised(nn.MSELoss())(model, batch)


class Data(Dataset):
    def __len__(self):
        return 64 * 12

    def __getitem__(self, index):
        global items
        items += 1
        time.sleep(SLOW.get("item", 0) if RANK == {rank} else 0)
        if STRUCK and FAULT == "data" and items == 150:
            never_returns()
        if STRUCK and FAULT == "stopped worker" and items == 150:
            os.kill(os.getpid(), signal.SIGSTOP)
        return torch.full((10,), index / 768), torch.ones(1)


def build(config):
    time.sleep(SLOW.get("build", 0))
    if STRUCK and FAULT == "build":
        never_returns()
    model = nn.Linear(10, 1)
    return Components(
        model=model, loss=loss, optimizer=torch.optim.Adam(model.parameters()), train_data=Data(),
        eval_data=Data() if FAULT == "evaluation" or "evaluation" in SLOW else None,
        metrics=dict(slow=evaluated) if "evaluation" in SLOW else dict(),
    )


def evaluated(model, batch):
    time.sleep(SLOW["evaluation"])
    return supervised(nn.MSELoss())(model, batch)


if __name__ == "__main__":
    train(build)
"""


@pytest.fixture
def run(start, tmp_path):
    """`run(fault)`: in the first generation a rank does that in its seventh call of the loss, and never comes back.

    `slow` gives seconds by number of the call, or for every loss, item, build, evaluation.
    """

    def start_one(fault, *flags, rank=1, call=7, slow=None, world_size=2, shards=None, always=False, **more):
        name = f"{fault}-{rank}-{world_size}"
        recipe = tmp_path / f"{name}.py"
        recipe.write_text(RECIPE.format(fault=fault, rank=rank, call=call, slow=slow or {}, always=always))
        flags = (*FLAGS, "--shards", str(shards or world_size), *flags)
        return start("samestep", world_size, str(recipe), *flags, run_dir=name, **more)

    return start_one


def restarted_with_the_bits_of(outcome, reference, rank, phase):
    (failed,) = outcome.of("worker_failed")
    assert (failed["rank"], failed["phase"]) == (rank, phase), failed
    assert re.match(r"hang: \d+ s in ", failed["cause"])
    assert re.search(rf"rank {rank} failed: hang: .*; restart 1 of 3", outcome.stderr)
    assert outcome.digest == reference.digest
    assert outcome.losses == reference.losses
    assert outcome.of("run_finished")[-1]["restarts"] == 1
    stacks = (outcome.run_dir / "errors" / "stacks-0.txt").read_text()
    assert re.findall(r"^rank (\d), pid \d+", stacks, re.MULTILINE) == ["0", "1"]
    return failed, stacks


@pytest.fixture
def reference(run):
    """The undisturbed run."""

    def undisturbed(*flags, **more):
        outcome = run("none", *flags, **more)
        assert outcome.of("worker_failed") == []
        return outcome

    return undisturbed


@pytest.mark.parametrize("faults", [["sleep"], pytest.param(["stop", "regex", "lock"], marks=pytest.mark.slow)])
def test_a_rank_that_hangs_in_forward_costs_a_restart_and_no_bit(run, reference, faults):
    undisturbed = reference()
    for fault in faults:
        outcome = run(fault)
        failed, stacks = restarted_with_the_bits_of(outcome, undisturbed, 1, "forward")
        assert ("stopped by a signal" in failed["cause"]) == (fault == "stop")
        assert "in loss" in stacks
        frame = "never_returns" if fault == "sleep" else "strike"
        assert re.search(rf" at \S+/{fault}-1-2.py:\d+ in {frame}\b.*; restart", outcome.stderr)


def test_a_loading_process_that_somebody_stopped_is_named_as_stopped(run, reference):
    outcome = run("stopped worker", "--num-workers", "1")
    failed, _ = restarted_with_the_bits_of(outcome, reference("--num-workers", "1"), 1, "data")
    assert re.search(r"in Data.__getitem__ .*: process \d+, which it has started, is stopped by", failed["cause"])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "phase", "flags"),
    [
        ("backward", "backward", ()),
        ("data", "data", ()),
        ("data", "data", ("--num-workers", "1")),
        ("evaluation", "evaluation", ("--eval-every", "4")),
    ],
)
def test_a_rank_that_hangs_elsewhere_is_named_with_its_frame(run, reference, fault, phase, flags, rank, monkeypatch):
    if fault == "evaluation":
        monkeypatch.setenv("PET_HANG_TIMEOUT", "8")  # the first one has minutes otherwise
    outcome = run(fault, *flags, rank=rank)
    restarted_with_the_bits_of(outcome, reference(*flags), rank, phase)
    usual = "" if fault == "evaluation" else r" \(.*\)"  # it is the first one: nothing is known of what is usual
    assert re.search(rf"in never_returns{usual}; restart", outcome.stderr)


@pytest.mark.slow
def test_a_rank_that_hangs_before_training_is_named(run, reference, monkeypatch):
    monkeypatch.setenv("PET_HANG_TIMEOUT", "8")
    outcome = run("build")
    assert re.search(r"rank 1 failed: hang: \d+ s in build at \S+ in never_returns; restart 1 of 3", outcome.stderr)
    assert outcome.digest == reference().digest


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("fault", ["skip", "extra"])
def test_the_rank_with_another_collective_is_named(run, reference, fault, rank):
    outcome = run(fault, rank=rank, world_size=3)
    assert outcome.digest == reference(world_size=3).digest
    (failed,) = outcome.of("worker_failed")
    assert failed["rank"] == rank, outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2])
def test_with_more_ranks_than_shards_the_one_that_idles_is_not_to_blame_for_it(run, reference, rank):
    outcome = run("skip", rank=rank, world_size=3, shards=2)  # rank 0 has no samples
    assert outcome.digest == reference(world_size=3, shards=2).digest
    (failed,) = outcome.of("worker_failed")
    assert failed["rank"] == rank, outcome.stderr


@pytest.mark.slow
def test_a_hang_at_the_same_place_again_is_given_up(run):
    outcome = run("sleep", call=2, always=True, status=77)
    assert outcome.stderr.count("; restart ") == 1
    assert re.search(r"rank 1 failed: hang: \d+ s in forward", outcome.stderr)
    assert re.search(r"hint: stacks of all ranks: \S+/errors/stacks-1.txt", outcome.stderr)
    assert (outcome.run_dir / "errors" / "stacks-1.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "slow",
    [
        {"build": 12},
        {1: 12},  # the first step
        {"loss": 0.15, 9: 3.0},  # one step 20 times as long as the others
        {"evaluation": 0.8},  # 10 s long
        {"item": 0.02},
    ],
    ids=["build", "first step", "20 times", "evaluation", "data"],
)
def test_what_only_takes_long_is_no_hang(run, slow):
    for number in range(2):
        outcome = run("none", *(("--eval-every", "4") if "evaluation" in slow else ()), slow=slow, rank=number)
        assert outcome.of("worker_failed") == []
        assert not (outcome.run_dir / "errors" / "stacks-0.txt").exists()


@pytest.mark.slow
def test_ranks_that_are_programs_of_their_own_are_watched_too(run, reference, monkeypatch):
    monkeypatch.setenv("PET_NO_WARM", "1")
    restarted_with_the_bits_of(run("sleep"), reference(), 1, "forward")


@pytest.mark.slow
def test_off_means_off(run, monkeypatch):
    monkeypatch.setenv("PET_HANG_TIMEOUT", "off")
    assert run("none", slow={7: 20}).of("worker_failed") == []
