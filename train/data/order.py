"""Which sample stands at which position of an epoch: a keyed permutation that can be computed anywhere, at any point.

`permute(positions, n, seed, epoch)` is a balanced Feistel network over the smallest even number of bits that holds `n`,
with cycle walking: whoever lands at `n` or above walks on until inside (Black and Rogaway, "Ciphers with arbitrary
finite domains", CT-RSA 2002). Round keys and the round function use the splitmix64 finaliser (Steele, Lea and Flood,
OOPSLA 2014). Integers only, so the order is the same with every version of torch and numpy;
`tests/train/data/test_order.py` holds fixed vectors. SPEC changes when the order does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

SPEC = "feistel-6-splitmix64/1"

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


def mix(value: int) -> int:
    """splitmix64 finaliser of a 64-bit integer."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def key(*parts: int) -> int:
    """One 64-bit key from any integers; a different number, order or value of parts gives an unrelated key."""
    return extend(begin(len(parts)), *parts)


@lru_cache(maxsize=1024)
def begin(length: int, *parts: int) -> int:
    """A key of `length` parts, as far as its first `parts` bring it; kept, since steps and samples share them."""
    return extend(mix(length), *parts)


def extend(state: int, *parts: int) -> int:
    """Go on with a key: `extend(begin(4, a, b), c, d)` is `key(a, b, c, d)`."""
    for part in parts:
        state = mix(state ^ mix(part & _MASK64))
    return state


def extend_each(state: int, parts: Sequence[int]) -> list[int]:
    """`extend(state, part)` of many parts at once."""
    mixed = _mix(np.array(parts, dtype=np.int64).astype(np.uint64))
    keys: list[int] = _mix(np.uint64(state) ^ mixed).tolist()
    return keys


def permute(positions: npt.NDArray[np.int64], n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Sample ids, shape and dtype of `positions` (int64, each in [0, n)), for one epoch's order of `range(n)`."""
    if n < 2:
        return np.zeros_like(positions)
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = [np.uint64(key(seed, epoch, number)) for number in range(_ROUNDS)]
    ids = _rounds(positions.astype(np.uint64), half, keys)
    outside = np.flatnonzero(ids >= n)
    while outside.size:
        ids[outside] = _rounds(ids[outside], half, keys)
        outside = outside[ids[outside] >= n]
    return ids.astype(np.int64)


def _rounds(values: npt.NDArray[np.uint64], half: int, keys: list[np.uint64]) -> npt.NDArray[np.uint64]:
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for round_key in keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << np.uint64(half)) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
