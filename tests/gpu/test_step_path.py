"""Between two reports the host runs ahead of the device, and copies run ahead of use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from samestep.train.data.device import _one_ahead, on_device
from samestep.train.finite import start_of_backward
from samestep.train.observe.phases import PHASES, CudaClock
from samestep.train.parallel import exchange
from samestep.train.parallel.exchange import TreeExchange, _TreeFlight
from samestep.train.state.checkpoint import Snapshot
from samestep.train.state.saver import CopyBuffers

LONG = 3_000_000_000  # cycles, more than a second


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def soon(condition: Callable[[], bool], seconds: float = 0.5) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
    return True


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("weigh", ["samples", "mean", "numbers", "host", "tokens"])
def test_no_step_waits_for_the_device(trained: Any, weigh: str, ranks: int) -> None:
    flags = ("--weigh", weigh, "--shards", 2, "--num-workers", 0, "--clip-grad-norm", 1.0)
    assert trained("unwaited", *flags, ranks=ranks).events("run_finished")


@pytest.mark.parametrize("weigh", ["samples", "tokens"])
def test_neither_does_one_of_a_single_shard(trained: Any, weigh: str) -> None:
    assert trained("unwaited", "--weigh", weigh, "--shards", 1, "--num-workers", 0).events("run_finished")


def test_neither_does_one_that_averages_weights(trained: Any) -> None:
    assert trained("unwaited", "--average", "--shards", 1, "--num-workers", 0).events("run_finished")


def pinned(count: int) -> Iterator[Tensor]:
    for number in range(count):
        yield torch.full((1 << 20,), float(number)).pin_memory()


def overwritten(count: int) -> Iterator[Tensor]:
    """Small ones, whose memory the next one takes."""
    memory = torch.empty(1 << 14)
    for number in range(count):
        yield memory.fill_(number)


def test_the_next_batch_is_copied_while_the_device_works_on_this_one(device: torch.device) -> None:
    side = torch.cuda.Stream(device)
    batches = _one_ahead(pinned(3), device, side)
    next(batches)
    torch.cuda._sleep(LONG)
    working = torch.cuda.current_stream(device).record_event()
    assert soon(side.query)
    assert not working.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize(("source", "bits"), [(pinned, 20), (overwritten, 14)])
def test_copies_are_whole_when_they_are_used_and_stay_until_then(
    device: torch.device, source: Callable[[int], Iterator[Tensor]], bits: int
) -> None:
    """Each is used late, while those after it are on their way and memory is handed out again."""
    sums = []
    for batch in on_device(source(60), device):
        torch.cuda._sleep(10_000_000)
        sums.append(batch.sum())
    assert [float(total) for total in sums] == [float(number << bits) for number in range(60)]


def test_a_small_copy_from_any_memory_does_not_wait_for_the_device(device: torch.device) -> None:
    batches = on_device(overwritten(20), device)
    next(batches)
    torch.cuda._sleep(LONG)
    working = torch.cuda.current_stream(device).record_event()
    assert len(list(batches)) == 19
    assert not working.query()
    torch.cuda.synchronize()


def test_backward_does_not_wait_for_slices_that_are_added_up(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = torch.cuda.Stream(device)

    class Work:
        """A collective that other ranks are late for."""

        def wait(self) -> None:
            torch.cuda.current_stream(device).wait_stream(other)

    monkeypatch.setattr(exchange, "all_gather", lambda *_, **__: Work())
    received, like = torch.arange(6.0, device=device).view(2, 3), torch.zeros(3, device=device)
    aside = torch.cuda.Stream(device)
    first, flight = (
        _TreeFlight(like, 3, [(0, 1), (1, 2)], 2, received, Work(), 1, like, aside)  # type: ignore[arg-type]
        for _ in range(2)
    )
    first.finish()  # loading kernels at their first use waits for the device
    with torch.cuda.stream(other):
        torch.cuda._sleep(LONG)
    flight.advance()
    assert soon(torch.cuda.current_stream(device).record_event().query)
    assert not other.query()
    flight.finish()
    ended = torch.cuda.current_stream(device).record_event()
    assert not ended.query()
    ended.synchronize()
    assert other.query()


def test_one_rank_adds_up_its_shards_without_other_streams(device: torch.device) -> None:
    roots = [torch.full((5,), 2.0, device=device)]
    assert TreeExchange(0, 1, 4, torch.cuda.Stream(device)).start(roots, roots[0], 4).finish() is roots[0]


def test_time_on_the_device_is_attributed_to_its_phase(device: torch.device) -> None:
    clock = CudaClock(now=lambda: 0.0)

    def step() -> Callable[[], list[float]]:
        for phase in PHASES:
            clock.enter(phase)
            if phase == "backward":
                torch.cuda._sleep(LONG // 10)
        return clock.take()

    for _ in range(2):  # what was read is used again
        for reading in [step() for _ in range(3)]:
            seconds = dict(zip(PHASES, reading(), strict=False))
            assert seconds["backward"] > 10 * max(seconds[phase] for phase in PHASES if phase != "backward")
    assert len(clock._read) == 3 * len(PHASES) + 1  # a step begins with the event that closed the one before


def test_where_the_device_is_can_be_asked(device: torch.device) -> None:
    clock = CudaClock()

    def step(slow: str = "") -> Callable[[], list[float]]:
        for phase in PHASES:
            clock.enter(phase)
            if phase == slow:
                torch.cuda._sleep(LONG)
        return clock.take()

    step()()
    torch.cuda.synchronize()
    assert clock.behind() is None
    readings = [step("backward"), step(), step()]
    assert soon(lambda: clock.behind() == (2, "backward"))
    clock.enter("data")
    assert clock.behind() == (3, "backward")
    for reading in readings:
        reading()
    torch.cuda.synchronize()
    assert clock.behind() is None


def test_data_are_what_the_device_had_to_wait_for(device: torch.device) -> None:
    clock = CudaClock()
    seconds = []
    for work in (0, LONG // 10):
        torch.cuda.synchronize()
        clock.skip()
        torch.cuda._sleep(work)
        clock.enter("data")
        time.sleep(0.05)
        clock.enter("forward")
        seconds.append(clock.take()()[0])
    assert seconds[0] > 0.045
    assert seconds[1] < 0.01


@pytest.mark.parametrize(("loss", "start"), [(2.5, 1.0), (-0.0, 1.0), (float("inf"), None), (float("nan"), None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_backward_starts_from_one_or_from_nan(
    device: torch.device, loss: float, start: float | None, dtype: torch.dtype
) -> None:
    found = start_of_backward(torch.tensor(loss, dtype=dtype, device=device))
    assert found.shape == ()
    assert found.dtype == dtype
    assert (float(found) == 1.0) if start else bool(found.isnan())


def test_a_snapshot_is_of_the_moment_it_was_taken(device: torch.device) -> None:
    weights = {"w": torch.zeros(1 << 24, device=device)}
    copies = CopyBuffers()
    for number in range(3):
        weights["w"].add_(1)
        torch.cuda._sleep(LONG // 100)
        kept = copies.copy(Snapshot(number, weights, {}, {}, {}))
        weights["w"].add_(100).sub_(100)
        copies.wait()
        assert kept.weights["w"].is_pinned()
        assert kept.weights["w"].device.type == "cpu"
        assert bool((kept.weights["w"] == number + 1).all())
