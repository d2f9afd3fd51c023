"""`train` called again and again in one process, as notebooks do."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import random
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import Dataset, TensorDataset

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


def recipe(data: Dataset[Any]) -> Components:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return Components(model=model, loss=supervised(nn.MSELoss()), optimizer=optimizer, train_data=data)


def sound(config: Any) -> Components:
    x = torch.randn(64, 4)
    return recipe(Rows(x, x[:, :1]))


def broken(config: Any) -> Components:
    return recipe(Broken())


class Rows(TensorDataset):
    """Fetched one by one."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return super().__getitem__(index)


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        if index == 7:
            raise ValueError("broken")
        return torch.ones(4), torch.ones(1)


def test_an_exception_that_is_looked_at_holds_no_worker(alone: Path) -> None:
    """Its traceback holds their iterator; torch would end them when that is collected, in 10 s for each."""
    before = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match="broken") as raised:
        train(broken, argv=["--run-dir", str(alone / "run"), "--num-workers", "2", "--check", "never"])
    assert raised.tb is not None
    assert set(multiprocessing.active_children()) <= before


def test_workers_leave_no_descriptor_and_the_handler_of_their_deaths(alone: Path) -> None:
    """After 100 calls that leave 8 each a process has none left."""

    def call(name: str) -> None:
        train(sound, argv=["--run-dir", str(alone / name), "--num-workers", "2", "--global-batch-size", "16"])

    call("first")
    gc.collect()
    before, handler = psutil.Process().num_fds(), signal.getsignal(signal.SIGCHLD)
    threads = set(threading.enumerate())
    call("second")
    with pytest.raises(ValueError, match="broken"):
        train(broken, argv=["--run-dir", str(alone / "broken"), "--num-workers", "2", "--check", "never"])
    gc.collect()
    assert all(map(_ends, set(threading.enumerate()) - threads))  # those that feed queues hold their pipes
    assert psutil.Process().num_fds() <= before
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_a_call_in_a_thread_leaves_no_worker_either(alone: Path) -> None:
    raised: list[BaseException] = []

    def call() -> None:
        try:
            train(broken, argv=["--run-dir", str(alone / "run"), "--num-workers", "2", "--check", "never"])
        except ValueError as error:
            raised.append(error)

    before = set(multiprocessing.active_children())
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    assert len(raised) == 1
    assert set(multiprocessing.active_children()) <= before


def settings() -> list[object]:
    words: Any = np.random.get_state(legacy=False)
    return [
        *(
            random.getstate(),
            words["state"]["key"].tobytes(),
            torch.get_rng_state().numpy().tobytes(),
            torch.get_num_threads(),
        ),
        torch.are_deterministic_algorithms_enabled(),
        *(torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    ]


@pytest.mark.parametrize("build", [sound, broken])
def test_random_streams_and_settings_are_the_callers_again(build: Any, alone: Path) -> None:
    """Or a search that draws its options between calls would try the same ones for ever."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = settings()
    try:
        random.seed(3)
        torch.set_num_threads(3)
        torch.use_deterministic_algorithms(False)
        cudnn.benchmark, cudnn.deterministic = True, False
        mine = settings()
        with contextlib.suppress(ValueError):
            train(build, argv=["--run-dir", str(alone / "run"), "--check", "never", "--threads", "1"])
        assert settings() == mine
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(bool(before[4]))
        cudnn.benchmark, cudnn.deterministic = bool(before[5]), bool(before[6])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_the_caller_change_no_bit(mode: Any, alone: Path) -> None:
    for precision in ("no", "bf16"):
        flags = ["--precision", precision, "--run-dir"]
        plain = train(sound, argv=[*flags, str(alone / f"plain-{precision}")]).digest
        with mode():
            before = torch.autocast_increment_nesting(), torch.is_autocast_enabled("cpu")
            torch.autocast_decrement_nesting()
            assert train(sound, argv=[*flags, str(alone / f"inside-{precision}")]).digest == plain
            assert (torch.autocast_increment_nesting(), torch.is_autocast_enabled("cpu")) == before
            torch.autocast_decrement_nesting()


def test_autocast_uses_the_weights_of_its_step(alone: Path) -> None:
    """An outer context would keep its copies of the first ones, and the loss would not fall."""
    seen: list[float] = []

    def build(config: Any) -> Components:
        model, x = nn.Linear(4, 1), torch.randn(64, 4, generator=torch.Generator().manual_seed(1))

        def loss(model: nn.Module, batch: Any) -> Any:
            value = nn.functional.mse_loss(model(batch[0]).float(), batch[1])
            seen.append(value.item())
            return value

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = TensorDataset(x, x.sum(1, keepdim=True))
        return Components(model=model, loss=loss, optimizer=optimizer, train_data=data)

    flags = ["--precision", "bf16", "--epochs", "30", "--global-batch-size", "64", "--check", "never"]
    train(build, argv=[*flags, "--run-dir", str(alone / "run")])
    assert seen[-1] < 0.05 * seen[0]


def test_accelerators_of_the_caller_work_before_and_after(alone: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests before
    own = Accelerator(cpu=True, mixed_precision="bf16")
    train(sound, argv=["--run-dir", str(alone / "run")])
    assert own.mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)
    train(sound, argv=["--run-dir", str(alone / "again")])
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_two_calls_at_once_are_refused(alone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def build(config: Any) -> Components:
        with pytest.raises(SystemExit, match="2"):
            train(sound, argv=["--run-dir", str(alone / "inner")])
        return sound(config)

    assert (
        train(build, argv=["--run-dir", str(alone / "outer")]).digest
        == train(sound, argv=["--run-dir", str(alone / "plain")]).digest
    )
    assert "train is expected to be called once at a time" in capfd.readouterr().err


def _ends(thread: threading.Thread) -> bool:
    thread.join(20)
    return not thread.is_alive()


TWICE = """
import os
import torch.distributed as dist
from torch import nn, optim, randn
from torch.utils.data import TensorDataset
from samestep.train import Components, supervised, train

def build(config):
    x, model = randn(24, 3), nn.Linear(3, 1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    return Components(
        model=model, loss=supervised(nn.MSELoss()), optimizer=optimizer, train_data=TensorDataset(x, x[:, :1])
    )

RANKS = os.environ.get("WORLD_SIZE", "1")
if OWN and RANKS != "1":
    place = {"rank": int(os.environ["RANK"]), "world_size": int(RANKS)}
    dist.init_process_group("gloo", f"file://{os.getcwd()}/meeting", **place)
for number, seed in enumerate("121"):
    argv = ["--max-steps", "3", "--shards", "2", "--seed", seed, "--run-dir", f"run-{number}-of-{RANKS}"]
    print("digest", train(build, argv=argv).digest)
"""


@pytest.mark.parametrize("own", [False, True])
def test_it_may_be_called_again_on_several_ranks_and_in_a_group_that_is_there(
    start: Any, tmp_path: Path, own: bool
) -> None:
    script = tmp_path / "twice.py"
    script.write_text(TWICE.replace("OWN", str(own)))
    found = []
    for ranks in (1, 2):
        ended = start(script, ranks=ranks)
        assert ended.codes == [0] * ranks, ended.stderrs
        found.append([line for line in ended.stdout.splitlines() if line.startswith("digest")])
    assert found[0] == found[1]
    assert found[0][0] == found[0][2] != found[0][1]
