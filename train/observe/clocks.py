"""How far the clocks of the ranks are apart, measured through collectives that no rank leaves before all have entered.

Where a rank's clock is `offset` ahead of rank zero's, each round bounds it: rank zero enters before the other leaves,
and the other way round. Ranks of one host read one clock, and so do hosts as far as can be told: there it is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from samestep.train.parallel.group import Group, gather_json

Round = Sequence[int]  # entered and left, in nanoseconds of the rank's own clock
_ROUNDS = 8


def measure_offsets(group: Group, now: Callable[[], int]) -> list[int]:
    """Nanoseconds by which each rank's clock `now` is ahead of rank zero's. A collective."""
    rounds = []
    for _ in range(_ROUNDS):
        entered = now()
        group.gather_bytes(b"")  # waits for the device too, which a barrier does not
        rounds.append((entered, now()))
    by_rank = gather_json(group, rounds)
    return [offset(by_rank[0], rounds) for rounds in by_rank]


def offset(first: Sequence[Round], other: Sequence[Round]) -> int:
    """Zero where that fits all rounds, else the middle of what fits: wrong by half a round trip at most."""
    most = min(left - entered for (entered, _), (_, left) in zip(first, other, strict=True))
    least = max(entered - left for (_, left), (entered, _) in zip(first, other, strict=True))
    return 0 if least <= 0 <= most else (least + most) // 2
