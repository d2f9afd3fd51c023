"""Gathers of real ranks: small ones in the memory that they share, large ones through gloo, each of them counted."""

from __future__ import annotations

from typing import Any


def test_small_gathers_go_through_memory_and_large_ones_through_gloo(start: Any) -> None:
    ended = start("letters", ranks=3)
    assert ended.codes == [0, 0, 0], ended.stderrs
    *ways, counted = ended.stdout.splitlines()
    assert ways == ["0 in memory", "8 in memory", f"{256 << 10} in memory", f"{(256 << 10) + 8} through gloo"]
    assert counted == "counted 1"  # what the hang watch tells ranks apart by
