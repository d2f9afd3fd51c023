"""Pure: which of the machines that have called take part, and in which order their ranks are numbered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A machine besides the head's; `node_rank` is None where the order of arrival decides."""

    node_rank: int | None
    host: str


def choose(candidates: Sequence[Candidate], room: int) -> list[int]:
    """Positions in `candidates`, in the order of the ranks; those with a rank of their own go first, by that rank."""
    order = sorted(
        range(len(candidates)),
        key=lambda index: (candidates[index].node_rank is None, candidates[index].node_rank or 0, index),
    )
    return order[:room]
