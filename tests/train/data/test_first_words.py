"""Batches whose samples get the first words of their state only: the bits of whole states, whatever they draw."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from samestep.train import SameOrderSampler
from samestep.train.data import shard_dataset
from samestep.train.data.first_words import WORDS, FirstWords
from samestep.train.data.loader import build_loader
from samestep.train.data.rng import seed_sample
from samestep.train.data.sampler import ShardSamples
from samestep.train.data.shard_dataset import ShardDataset
from samestep.train.data.streams import PYTHONS_NAMES, STREAMS, brought_back

SEED, EPOCH, SAMPLES, BATCH = 3, 2, 192, 48  # a batch is more than the samples that have room beside each other
LAST_OF_A_BATCH = SAMPLES - BATCH - 1
WHERE = {  # first and last of the samples
    "all": (0, SAMPLES),
    "later ones": (BATCH + 20, SAMPLES),
    "one in a batch": (100, 100),
    "last of a batch": (LAST_OF_A_BATCH, LAST_OF_A_BATCH),
}
Draw = Callable[[], float]


def words(count: int) -> Draw:
    """Something that depends on each of `count` words, and on one that comes later where there are none."""
    return lambda: float(sum(number * random.getrandbits(32) for number in range(1, count + 1)))


def shuffled(count: int) -> float:
    order = list(range(count))
    random.shuffle(order)
    return float(sum(place * value for place, value in enumerate(order)))


def seeded_anew() -> float:
    random.seed(5)
    return random.random()


def only_seeded() -> float:
    value = random.random()
    random.seed(5)
    return value


def seeded_after_many() -> float:
    return words(WORDS + 1)() + seeded_anew()


def getting_and_setting(count: int) -> float:
    state = random.getstate()
    value = words(count)()
    random.setstate(state)
    return value + random.random()


def getting_and_setting_by(getstate: Callable[[], Any], setstate: Callable[[Any], None]) -> float:
    state = getstate()
    value = words(100)()
    setstate(state)
    return value + random.random()


FEW: dict[str, Draw] = {  # words that suffice
    "nothing": lambda: 0.0,
    "one": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "gauss twice": lambda: random.gauss(0, 1) + random.gauss(0, 1) / 3,
    "shuffle": lambda: shuffled(8),
    "getrandbits": lambda: float(random.getrandbits(200)),
    "exactly all": words(WORDS),
}
MANY: dict[str, Draw] = {
    "one more": words(WORDS + 1),
    "623 words": words(623),
    "624 words": words(624),
    "back at its own words": words(624 + WORDS // 2),
    "700 words": words(700),
    "1300 words": words(1300),
    "gauss": lambda: sum(random.gauss(0, 1) for _ in range(101)),
    "shuffle": lambda: shuffled(300),
    "getrandbits": lambda: float(hash(random.getrandbits(20000))),
    "seed": seeded_anew,
    "seed at the end": only_seeded,
    "seed after many": seeded_after_many,
    "getstate and setstate": lambda: getting_and_setting(1),
    "getstate and setstate after many": lambda: getting_and_setting(100),
}
ANY = [*FEW.values(), *MANY.values()]
NAMES = [*(f"few: {name}" for name in FEW), *(f"many: {name}" for name in MANY)]


class Drawing(Dataset[Tensor]):
    """Samples draw one number; those from `first` to `last` as `draw` does."""

    def __init__(self, draw: Draw, first: int = 0, last: int = SAMPLES) -> None:
        self.draw, self.first, self.last = draw, first, last

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        drawn = self.draw() if self.first <= index <= self.last else random.random()
        return torch.tensor([index, drawn], dtype=torch.float64)


@pytest.fixture(autouse=True)
def streams_as_before() -> Iterator[None]:
    states = [stream.save() for stream in STREAMS]
    yield
    for stream, state in zip(STREAMS, states, strict=True):
        stream.load(state)


def batches(shards: ShardDataset) -> list[Tensor]:
    result = []
    for begin in range(0, SAMPLES, BATCH):
        samples = ShardSamples(range(begin, begin + BATCH))
        samples.epoch = EPOCH
        random.seed(begin)  # where the caller's stream stands is of no importance
        result.append(shards[samples])
    return result


def of_whole_states(dataset: Dataset[Tensor]) -> list[Tensor]:
    result = []
    for index in range(SAMPLES):
        seed_sample(SEED, EPOCH, index)
        result.append(dataset[index])
    return list(torch.stack(result).split(BATCH))


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("draw", ANY, ids=NAMES)
def test_batches_are_those_of_whole_states(draw: Draw, where: str) -> None:
    dataset = Drawing(draw, *WHERE[where])
    assert same(batches(ShardDataset(dataset, SEED, None)), of_whole_states(dataset))


@pytest.mark.parametrize("draw", ANY, ids=NAMES)
def test_whole_states_are_made_from_the_first_sample_on_that_needs_one(draw: Draw, monkeypatch: Any) -> None:
    made: list[int] = []
    monkeypatch.setattr(FirstWords, "seed_each", counted(FirstWords.seed_each, made))
    batches(ShardDataset(Drawing(draw, *WHERE["last of a batch"]), SEED, None))
    few = draw in FEW.values()
    assert len(made) == (3 if few else 2)  # all but the first of the four batches; that one and the one before


def counted(seed_each: Callable[..., Iterator[None]], made: list[int]) -> Callable[..., Iterator[None]]:
    def counting(stream: FirstWords, values: list[int]) -> Iterator[None]:
        made.append(len(values))
        return seed_each(stream, values)

    return counting


def test_a_sample_that_fails_because_it_drew_more_is_made_again_of_its_whole_state() -> None:
    seed_sample(SEED, EPOCH, 100)
    expected = words(100)()

    def draw() -> float:
        if (value := words(100)()) != expected:
            raise ValueError
        return value

    dataset = Drawing(draw, *WHERE["one in a batch"])
    assert same(batches(ShardDataset(dataset, SEED, None)), of_whole_states(dataset))


@pytest.mark.parametrize("count", [1, 100])
def test_a_sample_that_fails_anyway_fails_and_the_callers_stream_is_as_before(count: int) -> None:
    def fail() -> float:
        raise ValueError(words(count)())

    seed_sample(SEED, EPOCH, 100)
    number = words(count)()
    shards = ShardDataset(Drawing(fail, *WHERE["one in a batch"]), SEED, None)
    with pytest.raises(ValueError, match=str(number)):
        batches(shards)
    random.seed(BATCH * 2)  # as before the batch that failed
    expected = random.getstate()
    samples = ShardSamples(range(BATCH * 2, BATCH * 3))
    with contextlib.suppress(ValueError):
        shards[samples]
    assert random.getstate() == expected


@pytest.mark.parametrize("draw", ANY, ids=NAMES)
def test_the_callers_stream_is_as_before_with_its_second_normal_number(draw: Draw) -> None:
    shards = ShardDataset(Drawing(draw), SEED, None)
    random.seed(1)
    random.gauss(0, 1)  # leaves its second number
    expected = random.getstate()
    for begin in range(0, SAMPLES, BATCH):
        shards[ShardSamples(range(begin, begin + BATCH))]
        assert random.getstate() == expected


@pytest.fixture
def library() -> Iterator[ModuleType]:
    """A module that has `from random import getstate as get, setstate as put`."""
    module = sys.modules["library"] = ModuleType("library")
    vars(module).update(get=random.getstate, put=random.setstate)
    yield module
    del sys.modules["library"]
    vars(module).clear()
    assert len(PYTHONS_NAMES.places()) == 2  # of `random` itself


@pytest.mark.parametrize("first", [0, BATCH + 20], ids=["all", "later ones"])
def test_samples_that_bring_the_generator_back_by_imported_names_get_whole_states(
    first: int, library: ModuleType
) -> None:
    assert shard_dataset._FIRST_WORDS.is_safe()
    dataset = Drawing(lambda: getting_and_setting_by(library.get, library.put), first)
    assert same(batches(ShardDataset(dataset, SEED, None)), of_whole_states(dataset))
    assert (library.get, library.put) == (random.getstate, random.setstate)


def test_a_stream_that_an_imported_name_brings_back_is_noticed(library: ModuleType) -> None:
    with brought_back() as found:
        assert not found
        library.get()
    assert found == {0}


def test_samples_that_bring_the_generator_back_by_functions_that_nobody_sees_get_whole_states() -> None:
    functions = random.getstate, random.setstate
    dataset = Drawing(lambda: getting_and_setting_by(*functions))
    assert not shard_dataset._FIRST_WORDS.is_safe()
    assert same(batches(ShardDataset(dataset, SEED, None)), of_whole_states(dataset))


def test_a_batch_inside_another_ones_sample_hides_nothing() -> None:
    inner = ShardDataset(Drawing(words(WORDS)), SEED, None)

    def draw() -> float:
        drawn = words(WORDS + 1)()  # more than it has, and then a batch whose samples have enough
        return drawn + float(inner[ShardSamples(range(BATCH))].sum())

    dataset = Drawing(draw, *WHERE["one in a batch"])
    draw()  # the inner one has looked at its samples
    assert same(batches(ShardDataset(dataset, SEED, None)), of_whole_states(dataset))


def test_without_the_generators_memory_whole_states_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_dataset._FIRST_WORDS, "_words", None)
    monkeypatch.setattr(FirstWords, "seed_each", None)
    dataset = Drawing(words(WORDS))
    assert same(batches(ShardDataset(dataset, SEED, None)), of_whole_states(dataset))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("count", [2, 640])
def test_loader_workers_make_the_batches_of_whole_states(count: int, workers: int) -> None:
    dataset = Drawing(words(count), LAST_OF_A_BATCH)
    sampler = SameOrderSampler(dataset, 1, 0, seed=SEED, global_batch_size=BATCH, shards=1)
    sampler.set_epoch(EPOCH)
    loader = build_loader(dataset, sampler, collate_fn=None, num_workers=workers, device=torch.device("cpu"))
    with contextlib.closing(loader):
        found = torch.cat(list(loader))
    assert torch.equal(found[found[:, 0].argsort()], torch.cat(of_whole_states(dataset)))
