"""Which sample stands at which position of an epoch: a keyed permutation that can be computed anywhere, at any point.

`permute(positions, n, seed, epoch)` is a balanced Feistel network over the smallest even number of bits that holds `n`,
with cycle walking: whoever lands at `n` or above walks on until inside (Black and Rogaway, "Ciphers with arbitrary
finite domains", CT-RSA 2002). Round keys and the round function use the splitmix64 finaliser (Steele, Lea and Flood,
OOPSLA 2014). Integers only, so the order is the same with every version of torch and numpy;
`tests/train/data/test_order.py` holds fixed vectors. SPEC changes when the order does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

SPEC = "feistel-6-splitmix64/1"

Ints = npt.NDArray[np.int64]

_ROUNDS = 6
_LOOKED_UP = 16  # bits of a round's input up to which all its values are computed once and kept
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


def key_tables(keys: Sequence[int], length: int) -> npt.NDArray[np.uint64]:
    """`extend(key, number)` of many keys and each number below `length`; (keys, length) uint64."""
    values = np.array(keys, dtype=np.uint64)[:, None] ^ _mixed_numbers(length)
    return _mix(values)


@lru_cache(maxsize=2)
def _mixed_numbers(length: int) -> npt.NDArray[np.uint64]:
    return _mix(np.arange(length, dtype=np.uint64))


def permute(positions: Ints, n: int, seed: int, epoch: int) -> Ints:
    """Sample ids, shape and dtype of `positions` (int64, each in [0, n)), for one epoch's order of `range(n)`."""
    if n < 2:
        return np.zeros_like(positions)
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    functions = _round_functions(half, tuple(key(seed, epoch, number) for number in range(_ROUNDS)))
    ids = _rounds(positions, half, functions)
    outside = np.flatnonzero(ids >= n)
    while outside.size:
        walked = _rounds(ids[outside], half, functions)
        ids[outside] = walked
        outside = outside[walked >= n]
    return ids


def _rounds(values: Ints, half: int, functions: Sequence[Callable[[Ints], Ints]]) -> Ints:
    left, right = values >> half, values & ((1 << half) - 1)
    for function in functions:
        left, right = right, left ^ function(right)
    return (left << half) | right


@lru_cache(maxsize=2)
def _round_functions(half: int, keys: tuple[int, ...]) -> list[Callable[[Ints], Ints]]:
    """The function of each round; looked up where all its values are few."""
    functions = [partial(_round, half=half, round_key=np.uint64(round_key)) for round_key in keys]
    if half > _LOOKED_UP:
        return list(functions)
    inputs = np.arange(1 << half)
    return [function(inputs).take for function in functions]


def _round(right: Ints, half: int, round_key: np.uint64) -> Ints:
    return (_mix(right.astype(np.uint64) ^ round_key) & np.uint64((1 << half) - 1)).astype(np.int64)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)  # in place: what is made anew each time takes longer to get than to fill
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
    return values
