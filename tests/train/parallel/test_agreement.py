"""All ranks hear of the same stop after the same step, without an exchange in each step."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from samestep.train.parallel.agreement import Agreement, AtOnce, paced, words_after
from samestep.train.parallel.group import SoloGroup


@dataclass
class Script:
    """A group whose other rank says what was written down; counts the exchanges."""

    other: list[int]
    sent: list[list[int]] = field(default_factory=list)
    rank: int = 0
    world_size: int = 2

    def gather(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor.tolist())
        return torch.stack([tensor, torch.tensor(self.other)])


@pytest.mark.parametrize(
    ("every", "microseconds", "expected"),
    [
        (1, 0, 2),
        (1, 50_000, 2),
        (64, 1_000, 128),  # never more than doubled
        (64, 100_000, 64),
        (64, 6_400_000, 1),  # steps became a hundred times slower
        (2, 10_000_000, 1),
    ],
)
def test_exchanges_come_about_ten_times_a_second(every: int, microseconds: int, expected: int) -> None:
    assert paced(every, microseconds, 0.1) == expected


def test_steps_of_a_millisecond_hardly_ever_exchange() -> None:
    group, moment = Script([0, 0, 0, 1]), 0.0
    agreement = Agreement(group, AtOnce(group), lambda: 0, lambda: False, now=lambda: moment)  # type: ignore[arg-type]
    for number in range(10_000):
        moment = number / 1000
        assert not agreement.after_step()
    assert 100 <= len(group.sent) <= 120  # in ten seconds


@pytest.mark.parametrize(("mine", "others", "stop"), [(0, 15, 15), (10, 15, 10), (2, 0, 2), (0, 0, 0)])
def test_the_first_rank_that_was_asked_decides_for_all(mine: int, others: int, stop: int) -> None:
    group = Script([others, 0, 0, 1])
    agreement = Agreement(group, AtOnce(group), lambda: mine, lambda: False)  # type: ignore[arg-type]
    assert agreement.after_step() == bool(stop)
    assert agreement.stop == stop


def test_only_rank_zeros_clock_counts() -> None:
    group = Script([0, 1, 0, 1])
    late = Agreement(group, AtOnce(group), lambda: 0, lambda: True)  # type: ignore[arg-type]
    in_time = Agreement(group, AtOnce(group), lambda: 0, lambda: False)  # type: ignore[arg-type]
    assert (late.after_step(), late.stop) == (True, 0)
    assert not in_time.after_step()


@dataclass
class Later:
    """As between GPUs: what was said at one exchange is heard at the next one."""

    group: Script
    before: list[list[int]] = field(default_factory=list)

    def __call__(self, words: list[int]) -> list[list[int]]:
        heard, said = self.before, words_after(self.before, words)
        self.before = self.group.gather(torch.tensor(said)).tolist()
        return heard


def test_what_is_heard_one_exchange_later_is_acted_on_once() -> None:
    moment, wound = 0.0, [0.0]
    agreement = Agreement(
        Script([0, 0, 0, 1]),  # type: ignore[arg-type]
        Later(Script([0, 0, 0, 1])),
        lambda: 15 if moment > 50 else 0,
        lambda: moment - wound[0] >= 10,
        now=lambda: moment,
    )
    saves, stops = [], []
    for second in range(60):
        moment = float(second)
        if agreement.after_step():
            saves.append(second)
            wound[0] = moment
            stops += [second] * bool(agreement.stop)
    assert saves[:4] == [11, 22, 33, 44]
    assert stops[0] == 52


def test_with_a_pace_of_nothing_every_step_is_asked_about() -> None:
    agreement = Agreement(SoloGroup(), AtOnce(SoloGroup()), lambda: 0, lambda: True, pace_seconds=1e-9)
    assert all(agreement.after_step() for _ in range(5))
