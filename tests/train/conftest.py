"""Ranks for tests, and the order of samples computed a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent


Runs = Callable[..., Any]  # gives an Ended, see tests/conftest.py


@pytest.fixture
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Runs:
    """`start(name, *flags, ranks=1, cwd=…)`: run tests/train/recipes/<name>.py, or a path, to its end."""
    with_compiler = request.node.get_closest_marker("compiler") is not None
    server = request.getfixturevalue("compiler_server" if with_compiler else "rank_server")

    def run(name: str | Path, *flags: object, cwd: str = "job", **more: Any) -> Any:
        script = name if isinstance(name, Path) else HERE / "recipes" / f"{name}.py"
        return server(tmp_path / cwd, script, *flags, **more)

    return run


@pytest.fixture
def trained(start: Runs) -> Runs:
    """As `start` with `--run-dir run`; fails with what the ranks said unless all of them end with 0."""

    def run(name: str | Path, *flags: object, **more: Any) -> Any:
        ended = start(name, "--run-dir", "run", *flags, **more)
        assert not any(ended.codes), f"{ended.codes}\n{ended.stderrs}"
        return ended

    return run


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, and the environment of a process that no launcher has started."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


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
        if {"rank_server", "start"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.processes)
