"""Ranks for tests on one GPU: each passes for a machine of its own, so that NCCL lets them share the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
TRAIN, SCRIPTS = HERE.parent / "train" / "recipes", HERE.parents[1] / "scripts" / "recipes"
FOLDERS = (HERE / "recipes", TRAIN, SCRIPTS)
SHARING = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_P2P_DISABLE": "1"}

Runs = Callable[..., Any]  # gives an Ended, see tests/conftest.py


def recipe(name: str) -> Path:
    return next(folder / f"{name}.py" for folder in FOLDERS if (folder / f"{name}.py").exists())


@pytest.fixture
def start(rank_server: Runs, tmp_path: Path) -> Runs:
    """`start(name, *flags, ranks=1, cwd=…)`: run a recipe on the GPU to its end."""

    def run(name: str, *flags: object, cwd: str = "job", env: dict[str, str] | None = None, **more: Any) -> Any:
        environ = SHARING | {"RECIPE": str(recipe(name))} | (env or {})
        argv = ("--run-dir", "run", "--device", "cuda", *flags)
        return rank_server(tmp_path / cwd, HERE / "recipes" / "one_gpu.py", *argv, env=environ, seconds=150, **more)

    return run


@pytest.fixture
def trained(start: Runs) -> Runs:
    """As `start`; fails with what the ranks said unless all of them end with 0."""

    def run(name: str, *flags: object, **more: Any) -> Any:
        ended = start(name, *flags, **more)
        assert not any(ended.codes), f"{ended.codes}\n{ended.stderrs}"
        return ended

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs a GPU, and as long as a first use of CUDA takes."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(400))
            if "rank_server" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.processes)
