"""Activations that are computed again in backward have the bits of those that were kept, dropout included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(120)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
RECIPE = Path(__file__).resolve().parent / "recipes" / "checkpointed.py"


@pytest.mark.compiler
def test_recomputed_activations_change_no_bit_on_any_number_of_ranks(trained: Any) -> None:
    kept = trained("checkpointed", "--shards", 2, cwd="kept").bits
    for ranks in (1, 2):
        ended = trained("checkpointed", "--shards", 2, "--recompute", ranks=ranks, cwd=f"W{ranks}")
        assert ended.bits == kept, ranks
    parts = ("--shards", 2, "--micro-batches", 2)
    again = trained("checkpointed", *parts, "--recompute", ranks=2, cwd="parts")
    assert again.bits == trained("checkpointed", *parts, cwd="kept parts").bits


@pytest.mark.compiler
@pytest.mark.parametrize(("shards", "ranks", "parts"), [(2, 1, 1), (2, 2, 1), (1, 2, 1), (3, 2, 2)])
def test_reentrant_checkpoints_are_refused_where_their_parameters_would_get_no_gradient(
    start: Any, shards: int, ranks: int, parts: int
) -> None:
    flags = ("--run-dir", "run", "--shards", shards, "--micro-batches", parts, "--reentrant")
    ended = start("checkpointed", *flags, ranks=ranks)
    assert 2 in ended.codes, ended.stderrs
    assert 0 not in ended.codes, ended.stderrs
    assert ended.stderrs.count("error: ") == 1
    assert "use_reentrant=True" in ended.stderrs
    assert "\nhint: pass use_reentrant=False" in ended.stderrs
    assert "Traceback" not in ended.stderrs
    assert not ended.events("step")


@pytest.mark.compiler
@pytest.mark.parametrize("parts", [1, 2])
def test_with_one_shard_on_one_rank_reentrant_checkpoints_have_the_bits_of_kept_activations(
    trained: Any, parts: int
) -> None:
    flags = ("--shards", 1, "--micro-batches", parts)
    assert trained("checkpointed", *flags, "--reentrant", cwd="re").bits == trained("checkpointed", *flags).bits


def test_the_documented_lines_are_those_of_the_recipe() -> None:
    block = DOCS.read_text().split("```python\n")[1].split("```")[0]
    recipe = {line.strip() for line in RECIPE.read_text().splitlines()}
    assert block.strip()
    assert [line for line in block.splitlines() if line.strip() and line.strip() not in recipe] == []
