"""Each second of a loop is counted once: in a phase of a step, between two steps, or where it is reported by itself."""

from __future__ import annotations

from typing import Any

import pytest

from samestep.train.observe.phases import BETWEEN, PHASES, HostClock


@pytest.fixture
def hands() -> list[float]:
    return [0.0]


def test_time_between_steps_is_no_phase_of_either(hands: list[float]) -> None:
    clock = HostClock(lambda: hands[0])

    def spend(seconds: float) -> None:
        hands[0] += seconds

    def step() -> list[float]:
        for number, phase in enumerate(PHASES):
            clock.enter(phase)
            spend(10.0**number)
        return clock.take()()

    spend(0.5)  # what the loop does before its first step
    assert step() == [1, 10, 100, 1000, 10_000, 0.5]
    spend(0.25)
    assert step() == [1, 10, 100, 1000, 10_000, 0.25]
    spend(7.0)  # an evaluation, which is reported by itself
    clock.skip()
    spend(0.125)
    assert step() == [1, 10, 100, 1000, 10_000, 0.125]


def test_the_phase_last_entered_is_told_until_the_next_step_begins(hands: list[float]) -> None:
    told: list[str] = []
    clock = HostClock(lambda: hands[0], told.append)
    clock.enter("data")
    clock.enter("optimizer")
    clock.take()
    assert clock.current == "optimizer"  # where a failure in what follows is placed
    assert told == ["data", "optimizer"]


def test_a_slow_evaluation_is_in_no_step(trained: Any) -> None:
    """The recipe's clock jumps by 100 s in each evaluation."""
    ended = trained("slow_evaluation", "--eval-every", 1, "--epochs", 3)
    assert all(event["seconds"] > 100 for event in ended.events("eval"))
    for step in ended.events("step"):
        assert all(spread["max"] < 50 for spread in step["seconds"].values())
        assert step["samples_per_s"] > step["samples"] / 50
    loads = [step["rank_seconds"] for step in ended.events("step") if "rank_seconds" in step]
    assert [set(load) for load in loads] == [{*PHASES, BETWEEN}] * 6
