"""Each second of a loop is counted once: in a phase of a step, between two steps, or where it is reported by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from samestep.train.observe.phases import AT_ONCE, BETWEEN, PHASES, CudaClock, HostClock


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


class Event:
    """As CUDA's, on a device that does at once what it is told."""

    device_time = 0.0
    recorded = 0

    def record(self, stream: Any) -> None:
        self.moment = Event.device_time
        Event.recorded += 1

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.moment - self.moment)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """It is done."""


def test_a_step_that_begins_at_once_needs_no_event_of_its_own(
    hands: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    clock = CudaClock(now=lambda: hands[0], _stream=None)  # type: ignore[arg-type]

    def step(between: float) -> tuple[Any, int]:
        before = Event.recorded
        Event.device_time, hands[0] = Event.device_time + between, hands[0] + between
        for phase in PHASES:
            clock.enter(phase)
            Event.device_time += 1.0
        return clock.take()(), Event.recorded - before

    assert step(0.0) == (pytest.approx([1.0] * 5 + [0.0]), 6)
    assert step(AT_ONCE / 2) == (pytest.approx([1.0 + AT_ONCE / 2] + [1.0] * 4 + [0.0]), 5)
    assert step(0.5) == (pytest.approx([1.0] * 5 + [0.5]), 6)
    Event.device_time += 7.0  # an evaluation, which is reported by itself
    clock.skip()
    assert step(0.0) == (pytest.approx([1.0] * 5 + [0.0]), 6)
    assert clock.behind() is None


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
