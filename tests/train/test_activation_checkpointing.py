"""Activations that are computed again in backward have the bits of those that were kept, dropout included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(120)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
RECIPE = Path(__file__).resolve().parent / "recipes" / "checkpointed.py"


def test_recomputed_activations_change_no_bit_on_any_number_of_ranks(trained: Any) -> None:
    kept = trained("checkpointed", "--shards", 2, cwd="kept").bits
    for ranks in (1, 2):
        ended = trained("checkpointed", "--shards", 2, "--recompute", ranks=ranks, cwd=f"W{ranks}")
        assert ended.bits == kept, ranks
    parts = ("--shards", 2, "--micro-batches", 2)
    again = trained("checkpointed", *parts, "--recompute", ranks=2, cwd="parts")
    assert again.bits == trained("checkpointed", *parts, cwd="kept parts").bits


def test_the_documented_lines_are_those_of_the_recipe() -> None:
    block = DOCS.read_text().split("```python\n")[1].split("```")[0]
    recipe = {line.strip() for line in RECIPE.read_text().splitlines()}
    assert block.strip()
    assert [line for line in block.splitlines() if line.strip() and line.strip() not in recipe] == []
