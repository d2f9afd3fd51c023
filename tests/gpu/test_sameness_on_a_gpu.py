"""The same bits on any number of ranks that compute on a GPU and talk through NCCL, in each precision, resumed."""

from __future__ import annotations

import json
from typing import Any

import pytest


@pytest.mark.parametrize("unused", ["--unused", "--no-unused"])
def test_everything_that_is_hard_has_the_same_bits_on_any_number_of_ranks(trained: Any, unused: str) -> None:
    """Four ranks send one root each, three and two of five shards several, one sends nothing."""
    flags = ("--shards", 5, "--samples", 58, unused)
    alone = trained("everything", *flags, cwd="alone")
    for ranks in (2, 3, 4):
        together = trained("everything", *flags, ranks=ranks, cwd=f"on-{ranks}")
        assert together.bits == alone.bits
        assert json.loads((together.run_dir / "config.json").read_text())["exchange"] == "the process group"


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["digits_cnn", "char_lm"])
def test_recipes_have_the_same_bits_on_one_rank_and_two(trained: Any, name: str, precision: str) -> None:
    flags = ("--shards", 2, "--max-steps", 12, "--precision", precision, "--log-every", 5)
    runs = [trained(name, *flags, ranks=ranks, cwd=f"on-{ranks}") for ranks in (1, 2)]
    assert runs[0].bits == runs[1].bits
    assert json.loads((runs[1].run_dir / "config.json").read_text())["environment"]["device"] != "cpu"


def test_a_run_goes_on_with_another_number_of_ranks(trained: Any) -> None:
    whole = trained("digits_cnn", "--shards", 3, "--max-steps", 16, cwd="whole")
    parts = [
        trained("digits_cnn", "--shards", 3, "--max-steps", steps, ranks=ranks, cwd="parts")
        for ranks, steps in ((3, 6), (1, 11), (2, 16))
    ]
    assert parts[-1].digest == whole.digest


def test_a_compiled_model_has_the_same_bits_on_one_rank_and_two(trained: Any) -> None:
    flags = ("--shards", 2, "--max-steps", 6, "--compile")
    runs = [trained("digits_cnn", *flags, ranks=ranks, cwd=f"on-{ranks}") for ranks in (1, 2)]
    assert runs[0].bits == runs[1].bits
    assert "--compile is left out" not in runs[0].stderr + runs[0].stdout


def test_fast_reduction_and_compression_learn_on_nccl(trained: Any) -> None:
    flags = ("--shards", 2, "--max-steps", 6, "--reduction", "fast")
    losses = {
        hook: [loss for *_, loss in trained("digits_cnn", *flags, *hook, ranks=2, cwd="-".join(hook)).bits["losses"]]
        for hook in ((), ("--comm-hook", "bf16"), ("--comm-hook", "fp16"))
    }
    assert len({tuple(found) for found in losses.values()}) == 3
    first = {float.fromhex(found[0]) for found in losses.values()}
    assert len(first) == 1
