"""For every test: forked ranks, what they left behind, and no GPU test where there is no GPU."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("busy", deadline=None)  # a busy machine is no flaw
settings.load_profile("busy")
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
    def weights(self) -> dict[str, Any]:
        from safetensors.torch import load_file  # imports torch, which not every test needs

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

    def __init__(self, *words: str) -> None:
        environ = without_ranks(dict(os.environ)) | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "rank_server.py"), *words],
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
        self.process.terminate()  # a loader's worker of a failed test may hold the pipe too, so no end of it comes
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def rank_server() -> Iterator[RankServer]:
    """Started once for all tests of this folder."""
    server = RankServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def compiler_server() -> Iterator[RankServer]:
    """For ranks that would each import torch's compiler: for a profile, a GradScaler, a DDP made by hand."""
    server = RankServer("compiler")
    yield server
    server.close()


@pytest.fixture(scope="session")
def digits_digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """That of the README's first table on this machine: another kind of CPU has bits of its own."""
    recipe = HERE.parent / "scripts" / "recipes" / "digits_cnn.py"
    argv = [sys.executable, str(recipe), *"--epochs 1 --shards 4 --device cpu --run-dir run".split()]
    folder = tmp_path_factory.mktemp("digits")
    environ = without_ranks(dict(os.environ))
    subprocess.run(argv, cwd=folder, env=environ, check=True, timeout=120)
    return Ended(folder, [0]).digest


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """`limit(n)`: from now on no file of this process gets larger than n bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@functools.cache
def _has_gpu() -> bool:
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device; nvidia-smi is asked, because importing torch would slow every collection."""
    for item in items:
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
