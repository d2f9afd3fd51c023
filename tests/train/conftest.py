"""Ranks for tests, and the order of samples computed a second time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent


def without_ranks(environ: dict[str, str]) -> dict[str, str]:
    """An environment in which nobody started us as a rank."""
    theirs = (
        "SAMESTEP_",
        "PET_",
        "TORCHELASTIC_",
        "ACCELERATE_",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "MASTER_",
        "OMP_",
        "MKL_",
    )
    return {name: value for name, value in environ.items() if not name.startswith(theirs)}


@dataclass
class Ended:
    """A run all of whose ranks have ended."""

    cwd: Path
    codes: list[int]

    @property
    def stdout(self) -> str:
        return (self.cwd / "rank-0.out").read_text()

    @property
    def stderr(self) -> str:
        return (self.cwd / "rank-0.err").read_text()

    @property
    def stderrs(self) -> str:
        return "\n".join(
            f"--- rank {rank}\n{(self.cwd / f'rank-{rank}.err').read_text()}" for rank in range(len(self.codes))
        )

    @property
    def run_dir(self) -> Path:
        return self.cwd / "run"

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.run_dir / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    @property
    def checkpoint(self) -> Path:
        return sorted((self.run_dir / "checkpoints").glob("step-*"))[-1]

    @property
    def digest(self) -> str:
        return str(self.events("run_finished")[-1]["digest"])

    @property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.checkpoint / "model.safetensors")

    @property
    def bits(self) -> dict[str, Any]:
        """All that is promised to be the same: weights and buffers, optimizer state, the loss of every step."""
        return {
            "digest": self.digest,
            "optimizer": hashlib.sha256((self.checkpoint / "optimizer.safetensors").read_bytes()).hexdigest(),
            "losses": [
                (event["step"], event["epoch"], event["samples"], event["loss_hex"]) for event in self.events("step")
            ],
            "epochs": [event["loss_hex"] for event in self.events("epoch")],
            "evals": [event["metrics_hex"] for event in self.events("eval")],
        }


class RankServer:
    """See rank_server.py."""

    def __init__(self) -> None:
        environ = without_ranks(dict(os.environ)) | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "rank_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
        )

    def __call__(
        self,
        cwd: Path,
        script: Path,
        *argv: object,
        ranks: int = 1,
        env: dict[str, str] | None = None,
        seconds: float = 60,
        to_the_end: bool = False,
    ) -> Ended:
        cwd.mkdir(parents=True, exist_ok=True)
        job = {"script": str(script), "argv": list(map(str, argv)), "cwd": str(cwd), "ranks": ranks, "env": env or {}}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job | {"seconds": seconds, "to_the_end": to_the_end}) + "\n")
        self.process.stdin.flush()
        return Ended(cwd, json.loads(self.process.stdout.readline())["codes"])

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def rank_server() -> Iterator[RankServer]:
    """Started once for all tests of this folder."""
    server = RankServer()
    yield server
    server.close()


Runs = Callable[..., Ended]


@pytest.fixture
def start(rank_server: RankServer, tmp_path: Path) -> Runs:
    """`start(name, *flags, ranks=1, cwd=…)`: run tests/train/recipes/<name>.py, or a path, to its end."""

    def run(name: str | Path, *flags: object, cwd: str = "job", **more: Any) -> Ended:
        script = name if isinstance(name, Path) else HERE / "recipes" / f"{name}.py"
        return rank_server(tmp_path / cwd, script, *flags, **more)

    return run


@pytest.fixture
def trained(start: Runs) -> Runs:
    """As `start` with `--run-dir run`; fails with what the ranks said unless all of them end with 0."""

    def run(name: str | Path, *flags: object, **more: Any) -> Ended:
        ended = start(name, "--run-dir", "run", *flags, **more)
        assert not any(ended.codes), f"{ended.codes}\n{ended.stderrs}"
        return ended

    return run


def slow_mix(value: int) -> int:
    """splitmix64's finaliser, one integer at a time."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def slow_key(*parts: int) -> int:
    state = slow_mix(len(parts))
    for part in parts:
        state = slow_mix(state ^ slow_mix(part % 2**64))
    return state


def slow_permute(position: int, n: int, seed: int, epoch: int) -> int:
    """Six rounds of a balanced Feistel network, walked until the value is below n."""
    if n < 2:
        return 0
    bits = 2
    while 2**bits < n:
        bits += 2
    half = bits // 2
    value = position
    while True:
        left, right = value // 2**half, value % 2**half
        for number in range(6):
            left, right = right, left ^ slow_mix(right ^ slow_key(seed, epoch, number)) % 2**half
        value = left * 2**half + right
        if value < n:
            return value


@pytest.fixture(scope="session")
def slow_order() -> Callable[[int, int, int], list[int]]:
    """`slow_order(n, seed, epoch)`: the order of an epoch, without numpy and without our code."""
    return lambda n, seed, epoch: [slow_permute(position, n, seed, epoch) for position in range(n)]


@pytest.fixture(scope="session")
def slow_cipher() -> Callable[..., int]:
    """`slow_cipher(position, n, seed, epoch)`: one position."""
    return slow_permute


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is written into the working tree, and torch's settings are left as they were."""
    monkeypatch.chdir(tmp_path)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever starts ranks is marked so."""
    for item in items:
        if "rank_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.processes)
