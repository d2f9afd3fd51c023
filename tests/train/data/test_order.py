"""The order of samples: frozen, a permutation, and the same as a slow second implementation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samestep.train.data.order import SPEC, key, mix, permute

SlowCipher = Callable[..., int]


def order(n: int, seed: int, epoch: int) -> list[int]:
    return permute(np.arange(n, dtype=np.int64), n, seed, epoch).tolist()


# Frozen: a change here changes the order of everybody's runs, and needs another SPEC.
VECTORS = {
    (1, 0, 0): [0],
    (2, 0, 0): [1, 0],
    (2, 1, 0): [0, 1],
    (3, 0, 0): [1, 2, 0],
    (10, 0, 0): [4, 8, 0, 9, 1, 6, 5, 7, 3, 2],
    (10, 0, 1): [3, 0, 6, 2, 1, 9, 8, 4, 7, 5],
    (10, 1, 0): [0, 4, 2, 9, 8, 3, 7, 6, 5, 1],
    (16, 7, 3): [11, 1, 8, 3, 0, 7, 13, 5, 10, 6, 15, 2, 9, 14, 4, 12],
    (17, 7, 3): [3, 0, 1, 14, 6, 12, 9, 15, 8, 16, 7, 4, 10, 13, 11, 5, 2],
    (13, 2**63 - 1, 12): [3, 0, 1, 2, 10, 9, 11, 5, 12, 7, 6, 4, 8],
}
LONG_VECTORS = {
    1_000: "ef6bf57d73aace7e50cb32188c1eeafd2ff891577f9812e0edffd497aa3e7ba5",
    10_000: "735888924c984bb1d2f0e5d01ba38b782fa03c65c1cc8a954a416689722d59b0",
    1 << 20: "8e76e7ff808b942b1e2aed89fca9dcdf829ad5cf574ee1a92dd3ffbbef50d8ff",
}


def test_spec_names_the_frozen_order() -> None:
    assert SPEC == "feistel-6-splitmix64/1"


@pytest.mark.parametrize(("case", "expected"), VECTORS.items(), ids=str)
def test_order_equals_its_frozen_vector(case: tuple[int, int, int], expected: list[int]) -> None:
    assert order(*case) == expected


@pytest.mark.parametrize(("n", "expected"), LONG_VECTORS.items())
def test_long_order_equals_its_frozen_hash(n: int, expected: str) -> None:
    ids = permute(np.arange(n, dtype=np.int64), n, 0, 0)
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() == expected


def test_huge_datasets_have_frozen_orders() -> None:
    positions = np.array([0, 1, 2, 3, 4, 10**12 - 1, 2**39])
    expected = [390847898484, 377581706453, 192288274143, 995113986236, 877946433768, 948533389901, 229478605713]
    assert permute(positions, 10**12, 3, 4).tolist() == expected
    positions = np.array([0, 1, 2**62 - 1])
    assert permute(positions, 2**62, 0, 0).tolist() == [612713258693607149, 1949935239975274876, 3318940409270061842]


def test_mix_is_splitmix64() -> None:
    """First outputs of the reference generator for seed 0, whose state grows by the golden gamma."""
    gamma = 0x9E3779B97F4A7C15
    reference = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [mix(number * gamma) for number in range(4)] == reference


def test_keys_are_frozen() -> None:
    assert [key(0), key(0, 0), key(1, 2, 3), key(-1)] == [
        0xD300120A5EA35CAC,
        0x37121CA7183301B2,
        0xA6505FB1DD334AF6,
        0x8178DDDCBDC92A12,
    ]


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5), st.data())
def test_key_depends_on_order_number_and_value_of_its_parts(parts: list[int], data: st.DataObject) -> None:
    assert key(*parts) != key(*parts, 0)
    assert key(*parts) != key(0, *parts)
    shuffled = data.draw(st.permutations(parts))
    assert (key(*parts) == key(*shuffled)) == (parts == shuffled)
    where = data.draw(st.integers(0, len(parts) - 1))
    changed = [part ^ (index == where) for index, part in enumerate(parts)]
    assert key(*parts) != key(*changed)


def test_order_is_a_permutation_for_every_small_length() -> None:
    for n in range(1, 301):
        for seed, epoch in ((0, 0), (5, 2)):
            assert sorted(order(n, seed, epoch)) == list(range(n)), (n, seed, epoch)


@pytest.mark.parametrize("n", [4096, 4097, 65_535, 65_536, 65_537, 300_001])
def test_order_is_a_permutation_around_powers_of_two(n: int) -> None:
    ids = permute(np.arange(n, dtype=np.int64), n, 1, 1)
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(n))


@given(st.integers(1, 400), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_order_equals_a_slow_second_implementation(slow_cipher: SlowCipher, n: int, seed: int, epoch: int) -> None:
    assert order(n, seed, epoch) == [slow_cipher(position, n, seed, epoch) for position in range(n)]


@given(st.integers(2, 2**62), st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.data())
def test_any_position_of_any_length_equals_the_slow_implementation(
    slow_cipher: SlowCipher, n: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    fast = permute(np.array(positions, dtype=np.int64), n, seed, epoch).tolist()
    assert fast == [slow_cipher(position, n, seed, epoch) for position in positions]


@given(st.integers(1, 2000), st.integers(0, 2**32), st.data())
def test_order_can_be_computed_from_any_point(n: int, seed: int, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, n))
    end = data.draw(st.integers(begin, n))
    part = permute(np.arange(begin, end, dtype=np.int64), n, seed, 3)
    assert part.tolist() == order(n, seed, 3)[begin:end]


def test_order_differs_between_epochs_and_seeds() -> None:
    seen = {tuple(order(50, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(seen) == 400


def test_every_sample_reaches_every_position() -> None:
    """No position is nailed down: over 2000 epochs each of 8 samples is first about 250 times."""
    first = np.bincount([order(8, 0, epoch)[0] for epoch in range(2000)], minlength=8)
    assert first.min() > 180
    assert first.max() < 330


def test_permute_leaves_its_argument_alone() -> None:
    positions = np.arange(100, dtype=np.int64)
    permute(positions, 100, 0, 0)
    assert np.array_equal(positions, np.arange(100))
