"""What a recipe sets for its whole process: another folder, threads, a default dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]
FLAGS = ("--shards", 2)
CUDA = torch.cuda.is_available()


def test_a_recipe_may_go_to_another_folder(trained: Any, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ended = trained("moving", *FLAGS, "--checkpoint-every", 2, "--folder", elsewhere, ranks=2)
    assert (ended.cwd / "run" / "weights.safetensors").exists()
    assert not list(elsewhere.iterdir())


def test_threads_that_build_sets_are_set_back_and_named(trained: Any) -> None:
    plain = trained("moving", *FLAGS, "--threads", 1, cwd="plain")
    ended = trained("moving", *FLAGS, "--threads", 1, "--build-threads", 2, cwd="set")
    assert ended.bits == plain.bits
    (warning,) = ended.events("warning")
    assert warning["text"].startswith("build sets 2 threads, but a rank goes on with 1:")


def test_threads_that_a_loss_sets_are_named(trained: Any) -> None:
    ended = trained("moving", *FLAGS, "--threads", 1, "--loss-threads", 2)
    (warning,) = ended.events("warning")
    assert warning["text"].startswith("the loss changes the number of threads from 1 to 2 (")


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_float64_may_be_the_default(trained: Any, policy: str) -> None:
    runs = [
        trained("moving", *FLAGS, "--double", "--nan-policy", policy, ranks=ranks, cwd=f"on-{ranks}")
        for ranks in (1, 2)
    ]
    assert runs[0].bits == runs[1].bits
    assert runs[0].weights["0.weight"].dtype == torch.float64


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.skipif(CUDA, reason="has one"))])
@pytest.mark.parametrize("where", ["as it is imported", "in build"])
def test_a_default_device_that_nothing_can_be_computed_on_is_a_sentence(start: Any, device: str, where: str) -> None:
    flags = ("--default-device", device) if where == "in build" else ()
    env = {} if flags else {"DEFAULT_DEVICE": device}
    ended = start("moving", "--run-dir", "run", *FLAGS, *flags, "--device", "cpu", env=env, ranks=2)
    assert set(ended.codes) == {2}
    assert ended.stderr.startswith("error: torch's default device is expected to be cpu, as this rank computes on cpu")
    assert "hint: leave torch.set_default_device out" in ended.stderr
    assert "Traceback" not in ended.stderrs


def test_the_cpu_may_be_the_default_device(trained: Any) -> None:
    assert trained("moving", *FLAGS, cwd="plain").bits == trained("moving", *FLAGS, "--default-device", "cpu").bits


def test_a_model_without_values_is_a_sentence(start: Any) -> None:
    ended = start("moving", "--run-dir", "run", "--meta")
    assert set(ended.codes) == {2}
    assert "returns it, but 0.weight is on the meta device, as are 8 more" in ended.stderr


def test_weights_are_looked_for_where_the_recipe_was_started(trained: Any, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first = trained("moving", *FLAGS, cwd="first")
    (tmp_path / "second").mkdir()
    (first.run_dir / "weights.safetensors").rename(tmp_path / "second" / "first.safetensors")
    began = ("--weights", "first.safetensors", "--max-steps", 0, "--folder", elsewhere)
    assert trained("moving", *FLAGS, *began, cwd="second").digest == first.digest
