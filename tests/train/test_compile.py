"""--compile: the same bits on any number of ranks, and a sentence where there is no compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from samestep.train.compilation import compile_in_place
from samestep.train.parallel.group import SoloGroup

CPU = torch.device("cpu")


def test_without_a_compiler_the_model_stays_and_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = nn.Linear(2, 1)
    text = compile_in_place(model, CPU, SoloGroup())
    assert "--compile is left out" in text
    assert "No working C++ compiler found" in text
    assert model._compiled_call_impl is None


def test_one_rank_without_a_compiler_is_enough_for_none_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(SoloGroup):
        def gather_bytes(self, data: bytes) -> list[bytes]:
            return [data, b"no triton"]

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = nn.Linear(2, 1)
    assert "rank 1: no triton" in compile_in_place(model, CPU, Two())
    assert model._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_runs_have_the_same_bits_on_any_world_size_and_over_a_stop(trained: Any) -> None:
    flags = ("--compile", "--shards", 2, "--global-batch-size", 15, "--epochs", 1)
    one = trained("small", *flags, cwd="one", seconds=300)
    two = trained("small", *flags, cwd="two", ranks=2, seconds=300)
    assert two.bits == one.bits
    trained("small", *flags, "--max-steps", 3, cwd="stopped", seconds=300)
    again = trained("small", *flags, cwd="stopped", ranks=2, seconds=300)
    assert again.digest == one.digest
    assert not any("left out" in event["text"] for event in one.events("warning")), "it was really compiled"
