"""Held streams, and batches of datasets that draw from some streams only: the bits of seeding every stream always."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from samestep.train.data import shard_dataset
from samestep.train.data.order import extend
from samestep.train.data.sampler import ShardSamples
from samestep.train.data.shard_dataset import ShardDataset
from samestep.train.data.streams import STREAMS, NumpyStream, PythonStream

KEYS = [0, 1, 1 << 63, (1 << 64) - 1, *range(100, 200)]
FROZEN = [2893199230, 4141043390, 2856896682]  # after the last of them; a change moves everybody's augmentation
DRAWS: dict[str, tuple[int, Callable[[], Any]]] = {
    "random.random": (0, random.random),
    "random.gauss": (0, lambda: random.gauss(0, 1)),
    "numpy.random.rand": (1, np.random.rand),
    "numpy.random.normal": (1, np.random.normal),
    "torch.rand": (2, lambda: torch.rand(())),
    "torch.randperm": (2, lambda: torch.randperm(100)[0]),
}


@pytest.fixture(autouse=True)
def streams_as_before() -> Any:
    states = [stream.save() for stream in STREAMS]
    yield
    for stream, state in zip(STREAMS, states, strict=True):
        stream.load(state)


@pytest.mark.parametrize("name", DRAWS)
def test_a_held_stream_tells_who_drew_and_is_where_it_was(name: str) -> None:
    number, draw = DRAWS[name]
    for stream in STREAMS:
        stream.seed(5)
    expected = float(draw())
    STREAMS[number].seed(5)
    drawn = [stream.hold() for stream in STREAMS]
    draw()
    assert [was_drawn() for was_drawn in drawn] == [other == number for other in range(3)]
    assert float(draw()) == expected


@pytest.mark.parametrize("number", range(3))
def test_a_held_stream_that_nobody_used_is_where_it_was(number: int) -> None:
    draw = [random.random, np.random.rand, lambda: float(torch.rand(()))][number]
    STREAMS[number].seed(5)
    expected = draw()
    STREAMS[number].seed(5)
    assert not STREAMS[number].hold()()
    assert draw() == expected


@pytest.mark.parametrize("value", [0, 1, 2**64 - 1])
def test_pythons_stream_is_seeded_as_by_its_own_function(value: int) -> None:
    drawn = []
    for seed in (random.seed, STREAMS[0].seed):
        random.seed(9)
        random.gauss(0, 1)  # leaves its second number, which nobody is to draw
        seed(value)
        drawn.append([random.gauss(0, 1), random.random()])
    assert drawn[0] == drawn[1]


def test_pythons_generator_starts_each_sample_at_the_same_words_with_and_without_its_memory() -> None:
    stream = PythonStream()
    assert stream._words is not None
    drawn = []
    for _ in range(2):
        random.gauss(0, 1)  # leaves its second number, which nobody is to draw
        drawn.append([(random.gauss(0, 1), random.getrandbits(7), random.random()) for _ in stream.seed_each(KEYS)])
        stream._words = None
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("memory", [True, False])
def test_a_saved_state_of_pythons_stream_is_gone_back_to_whatever_was_set_meanwhile(memory: bool) -> None:
    stream = PythonStream()
    if not memory:
        stream._words = None
    random.seed(5)
    random.gauss(0, 1)  # leaves its second number, which belongs to the state
    expected, saved = random.getstate(), stream.save()
    assert stream.mark() == saved
    random.seed(6)
    other = random.getstate()
    assert stream.mark() != saved
    stream.load(saved)
    assert random.getstate() == expected
    random.setstate(other)
    assert random.getstate() == other
    stream.load(saved)
    assert [random.gauss(0, 1), random.getstate()[1]] == [expected[2], expected[1]]


def test_what_pythons_generator_draws_for_samples_is_frozen() -> None:
    """A change needs another SPEC. Here the words are made one by one, by the function that makes keys."""
    for key, _ in zip(KEYS, PythonStream().seed_each(KEYS), strict=True):
        words = [half for number in range(312) for half in divmod(extend(key, number), 1 << 32)[::-1]]
        assert random.getstate() == (3, (*words, 0), None)
    assert [random.getrandbits(32) for _ in range(3)] == FROZEN


def test_first_numbers_of_samples_are_spread_evenly_and_know_nothing_of_each_other() -> None:
    keys = list(range(1 << 14))
    first = np.array([(random.random(), random.random()) for _ in PythonStream().seed_each(keys)])
    for pairs in (first, np.column_stack([first[:-1, 0], first[1:, 0]])):  # of one sample, of its neighbour
        cells = (8 * pairs).astype(np.int64) @ [8, 1]
        counts = np.bincount(cells, minlength=64)
        expected = len(pairs) / 64
        assert ((counts - expected) ** 2 / expected).sum() < 108  # chi-square of 63 degrees: 1 in 3000 is above


@pytest.mark.parametrize("value", [0, 5, 1 << 63, (1 << 63) + 5, (1 << 64) - 1])
def test_torchs_stream_is_seeded_with_all_64_bits_as_by_a_signed_number(value: int) -> None:
    STREAMS[2].seed(value)
    drawn = torch.rand(4)
    torch.manual_seed(value - (1 << 64) if value >> 63 else value)
    assert torch.equal(torch.rand(4), drawn)
    assert torch.initial_seed() % (1 << 64) == value


def test_a_second_normal_number_that_numpy_keeps_is_not_drawn_unseen() -> None:
    np.random.seed(5)
    np.random.normal()  # leaves its second number for the next call, which then touches no generator
    drawn = STREAMS[1].hold()
    np.random.normal()
    assert drawn()


def test_another_kind_of_numpy_generator_is_always_taken_as_drawn_from() -> None:
    usual = np.random.get_bit_generator()  # type: ignore[attr-defined]
    stream = NumpyStream()
    try:
        np.random.set_bit_generator(np.random.PCG64(0))  # type: ignore[attr-defined]
        assert stream.mark() != stream.mark()
        assert stream.hold()()
    finally:
        np.random.set_bit_generator(usual)  # type: ignore[attr-defined]
    assert not stream.hold()()


class Drawing:
    """Samples of three numbers, from the streams that `draw` uses; `late` ones begin to draw after half of them."""

    def __init__(self, draw: Callable[[int], float], late: bool = False) -> None:
        self.draw = draw
        self.late = late

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> torch.Tensor:
        number = 0.0 if self.late and index < 128 else self.draw(index)
        return torch.tensor([float(index), number], dtype=torch.float64)


def hidden(index: int) -> float:
    with torch.random.fork_rng():
        return torch.rand((), dtype=torch.float64).item()


def hidden_python(index: int) -> float:
    state = random.getstate()
    try:
        return random.random()
    finally:
        random.setstate(state)


def hidden_numpy(index: int) -> float:
    state = np.random.get_state()
    try:
        return float(np.random.rand())
    finally:
        np.random.set_state(state)


def sometimes(index: int) -> float:
    return random.random() if index % 50 == 49 else 0.0


WAYS: dict[str, Callable[[int], float]] = {
    "nothing": lambda index: 0.0,
    "python": lambda index: random.random(),
    "numpy": lambda index: float(np.random.normal()),
    "torch": lambda index: torch.rand((), dtype=torch.float64).item(),
    "two": lambda index: random.random() + float(np.random.rand()),
    "sometimes": sometimes,
    "hidden": hidden,
    "seed of the stream": lambda index: float(np.random.default_rng(torch.initial_seed() % 2**64).random()),
    "hidden python": hidden_python,
    "hidden numpy": hidden_numpy,
}


def batches(dataset: Any) -> list[torch.Tensor]:
    shards = ShardDataset(dataset, 3, None)
    result = []
    for begin in range(0, 256, 16):
        samples = ShardSamples(range(begin, begin + 16))
        samples.epoch = 2
        for stream in STREAMS:
            stream.seed(random.getrandbits(31))  # where the caller's streams stand is of no importance
        result.append(shards[samples])
    return result


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_batches_are_those_of_seeding_every_stream_for_every_sample(
    name: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = batches(Drawing(WAYS[name], late))
    monkeypatch.setattr(shard_dataset, "_WORTH_IT", 10**9)
    expected = batches(Drawing(WAYS[name], late))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_sample_that_fails_because_of_an_unseeded_stream_is_made_again_with_it_seeded() -> None:
    def draw(index: int) -> float:
        value = random.random()
        if index == 130 and made.setdefault(index, value) == value:
            raise ValueError
        return value

    made: dict[int, float] = {}
    assert len(batches(Drawing(draw, late=True))) == 16


def test_only_streams_that_are_drawn_from_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    shards, seeds = ShardDataset(Drawing(WAYS["torch"]), 3, None), []
    first, second = ShardSamples(range(32)), ShardSamples(range(32, 64))
    shards[first]
    for number, stream in enumerate(STREAMS):
        monkeypatch.setattr(stream, "seed", lambda value, number=number: seeds.append(number))
    shards[second]
    assert [seeds.count(number) for number in range(3)] == [0, 1, 32]  # numpy's once, to be held


@pytest.mark.parametrize("name", WAYS)
def test_the_callers_streams_are_as_before_also_while_some_are_held(name: str) -> None:
    shards = ShardDataset(Drawing(WAYS[name]), 3, None)
    for begin in range(0, 128, 32):
        for stream in STREAMS:
            stream.seed(begin)
        shards[ShardSamples(range(begin, begin + 32))]
        after = [random.random(), np.random.rand(), float(torch.rand(()))]
        for stream in STREAMS:
            stream.seed(begin)
        assert after == [random.random(), np.random.rand(), float(torch.rand(()))]
