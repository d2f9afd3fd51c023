"""An exception in; its kind, a message that names the sample, and the user's frame out, also from another process."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._utils import ExceptionWrapper

from samestep.launcher import lock
from samestep.launcher.contract import RunDir
from samestep.train import leave
from samestep.train.cause import blame, cause_of
from samestep.train.data.fingerprint import look_at
from samestep.train.data.loader import build_loader
from samestep.train.data.sampler import SameOrderSampler, ShardSamples
from samestep.train.data.shard_dataset import ShardDataset


class TwoWordsError(Exception):
    """Can't be made again from its text alone, as torch would."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class Flawed(torch.utils.data.Dataset):
    """Sample 7 raises, or ends its process."""

    def __init__(self, fault: object) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 7 and isinstance(self.fault, BaseException):
            raise self.fault
        return torch.ones(7) if self.fault == "ragged" and index == 7 else torch.ones(3)


class Whole(Flawed):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        if 7 in indices:
            raise KeyError("shelf")
        return [torch.ones(3) for _ in indices]


def raised_by(dataset: Flawed, *, in_loader: bool, collate_fn: Any = None) -> Exception:
    """What a rank gets; from a data loading process as torch hands it over, in text."""
    sampler = SameOrderSampler(dataset, num_replicas=1, rank=0, shards=2, global_batch_size=20, seed=1)
    loader = build_loader(dataset, sampler, collate_fn=collate_fn, num_workers=0, device=torch.device("cpu"))
    try:
        list(loader)
    except Exception as error:  # noqa: BLE001 (whatever it raises)
        if not in_loader:
            return error
        try:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()
        except Exception as again:  # noqa: BLE001 (as above)
            return again
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("in_loader", [False, True])
@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (ValueError("bad file\nsecond line"), "ValueError", "bad file"),
        (KeyError("label"), "KeyError", "'label'"),
        (TwoWordsError("a", "b"), "TwoWordsError", "a b"),
        (FileNotFoundError(2, "No such file", "x.png"), "FileNotFoundError", "[Errno 2] No such file: 'x.png'"),
    ],
)
def test_the_sample_that_raised_is_named_without_a_change_of_type(fault, kind, message, in_loader):
    error = raised_by(Flawed(fault), in_loader=in_loader)
    cause = cause_of(error)
    assert cause.kind == kind
    first = cause.message.splitlines()[0]
    assert first.startswith(f"{message} (sample 7 of the dataset")
    assert ("DataLoader worker" in first) == in_loader
    assert Path(cause.frame.partition(":")[0]).name == "test_cause.py"
    assert cause.frame.endswith("in __getitem__")
    if kind != "TwoWordsError":
        assert isinstance(error, type(fault))


class Own(BaseException):
    """Passes whoever catches an Exception, as a data loading process does."""


@pytest.mark.parametrize("in_loader", [False, True])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (StopIteration(), "raised StopIteration"),
        (StopIteration(3), "raised StopIteration: 3"),
        (Own("a"), "raised Own: a"),
    ],
)
def test_what_would_end_a_generator_or_a_loading_process_is_told_with_its_sample(fault, message, in_loader):
    error = raised_by(Flawed(fault), in_loader=in_loader)
    cause = cause_of(error)
    assert cause.kind == "RuntimeError"
    assert cause.message.splitlines()[0].startswith(f"{message} (sample 7 of the dataset")
    assert cause.frame.endswith("in __getitem__")


@pytest.mark.parametrize("in_loader", [False, True])
def test_a_batch_or_a_collate_function_that_stops_is_told_with_its_samples(in_loader):
    class Stopping(Flawed):
        def __getitems__(self, indices):
            return [next(iter(())) for _ in indices]

    def stopping(items):
        return next(iter(()))

    for error in (
        raised_by(Stopping(None), in_loader=in_loader),
        raised_by(Flawed(None), in_loader=in_loader, collate_fn=stopping),
    ):
        cause = cause_of(error)
        assert cause.message.splitlines()[0].startswith("raised StopIteration (a batch of the dataset's samples ")
        assert Path(cause.frame.partition(":")[0]).name == "test_cause.py"


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_who_leaves_from_a_dataset_leaves(leaving):
    with pytest.raises(leaving) as raised:
        ShardDataset(Flawed(leaving()), 1, None)[ShardSamples([6, 7])]
    assert not hasattr(raised.value, "__notes__")


@pytest.mark.parametrize("fault", [ValueError("bad file"), StopIteration()])
def test_a_sample_that_fails_at_the_first_look_is_named(fault):
    with pytest.raises((ValueError, RuntimeError)) as raised:
        look_at(torch.utils.data.Subset(Flawed(fault), [1, 2, 7]), 1)
    assert "(sample 2 of the dataset)" in cause_of(raised.value).message


@pytest.mark.parametrize("in_loader", [False, True])
@pytest.mark.parametrize(("dataset", "kind"), [(Whole(None), "KeyError"), (Flawed("ragged"), "RuntimeError")])
def test_what_a_batch_raises_names_the_batch(dataset, kind, in_loader):
    cause = cause_of(raised_by(dataset, in_loader=in_loader))
    assert cause.kind == kind
    assert "a batch of the dataset's samples " in cause.message.splitlines()[0]
    assert " and 2 more" in cause.message.splitlines()[0]


@pytest.mark.parametrize("seen", [ConnectionResetError(104, "Connection reset by peer"), EOFError(), OSError("other")])
def test_the_death_of_a_loader_is_the_cause_whatever_the_rank_saw_of_it(seen, monkeypatch):
    looks = []

    def fails() -> None:
        looks.append(1)
        if len(looks) == 2:  # its sockets close before it has ended
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._error_if_any_worker_fails", fails)
    try:
        found = leave.loader_death(seen)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert ("DataLoader worker" in str(found)) == (str(seen) != "other")
    assert len(looks) == (1 if str(seen) == "other" else 2)


def test_the_death_of_a_loader_is_the_cause_where_torch_leaves_the_signal_out():
    told = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    seen = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    seen.__cause__ = told
    before = signal.getsignal(signal.SIGCHLD)
    try:
        assert leave.loader_death(seen) is told
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_the_first_to_know_is_believed():
    error = ValueError("x")
    blame(error, "sample 7 of the dataset")
    blame(error, "a batch")
    assert cause_of(error).message == "x (sample 7 of the dataset)"
    assert cause_of(ValueError()).message == ""


@pytest.mark.parametrize(
    ("code", "phase", "expected"),
    [
        (0, "forward", 1),
        (None, "forward", 1),
        (3, "build", 3),
        ("some words", "data", 1),
        (75, "forward", None),
        (2, "build", None),
        (0, "joining", None),
        (0, "closing", None),
    ],
)
def test_a_rank_that_leaves_in_the_middle_says_so_unless_the_end_is_one_of_ours(code, phase, expected):
    record = leave.early_exit(SystemExit(code), 1, 0, 5, phase)
    if expected is None:
        assert record is None
        return
    assert record is not None
    assert (record.exit_code, record.step, record.consequence) == (expected, 5, False)
    assert record.message.endswith("before the run was done")


def test_no_frame_of_samesteps_own_passes_for_the_users(tmp_path):
    with pytest.raises(lock.SupersededError) as caught:
        lock.check(RunDir(tmp_path), 1)
    assert Path(cause_of(caught.value).frame.partition(":")[0]).name == "test_cause.py"


def test_a_message_of_megabytes_is_cut_where_people_read_it():
    cause = cause_of(ValueError("k" * 3_000_000))
    assert len(cause.message) < 5000
    assert cause.message.endswith("... and 2996000 characters more, in the log")
