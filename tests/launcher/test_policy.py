"""Restart and exit decisions, as a table."""

from __future__ import annotations

import signal

import pytest

from samestep.launcher.supervise.policy import (
    Memory,
    Restart,
    Stop,
    after_exit,
    after_signal,
    decide,
    devices_left,
    fewer_ranks,
    never_began,
    signature,
)

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.mark.parametrize(
    ("failure_code", "stopped_by", "own_codes", "restarts_left", "verdict"),
    [
        (None, None, {0}, 0, Stop(0)),
        (None, None, {0}, 3, Stop(0)),
        (1, None, {1}, 0, Stop(1)),
        (1, None, {1}, 1, Restart()),
        (-9, None, set(), 0, Stop(1)),
        (-9, None, set(), 1, Restart()),
        (3, None, {3}, 0, Stop(1)),
        (130, None, {130}, 0, Stop(1)),
        (70, None, {70}, 0, Stop(70)),
        (2, None, {2}, 3, Stop(2)),
        (75, None, {75}, 3, Stop(75)),
        (76, None, {76}, 3, Stop(76)),
        (77, None, {77}, 3, Stop(77)),
        (78, None, {78}, 3, Stop(78)),
        (None, INT, set(), 3, Stop(130)),
        (None, TERM, set(), 3, Stop(143)),
        (None, HUP, set(), 3, Stop(143)),
        (None, TERM, {0}, 0, Stop(143)),
        (None, TERM, {75}, 0, Stop(75)),
        (None, INT, {75, 76}, 0, Stop(76)),
        (None, INT, {75, 1}, 0, Stop(130)),
    ],
)
def test_what_follows_a_generation(failure_code, stopped_by, own_codes, restarts_left, verdict):
    decided = decide(
        failure_code=failure_code, stopped_by=stopped_by, own_codes=frozenset(own_codes), restarts_left=restarts_left
    )
    assert decided == verdict


@pytest.mark.parametrize("code", [1, 3, 70, -9, -11])
def test_survivors_of_a_failure_end_at_once(code):
    patience = after_exit(code)
    assert patience.wait == 0
    assert patience.grace <= 0.5


@pytest.mark.parametrize("code", [2, 75, 76, 77, 78])
def test_orderly_leavers_are_not_interrupted(code):
    assert after_exit(code).wait >= 2


def test_culprit_may_finish_its_sentence_when_a_victim_dies_first():
    assert 0 < after_exit(1, is_victim=True).wait <= 0.5


def test_operator_who_asks_twice_waits_for_nothing():
    assert after_signal(1, None).grace == 5
    assert after_signal(1, 30).grace == 30
    assert after_signal(2, 30).grace == 0


@pytest.mark.parametrize(("fruitless", "delay"), [(0, 0), (1, 1), (2, 2), (4, 8), (10, 30)])
def test_the_first_restart_comes_at_once_and_later_ones_wait_up_to_a_bound(fruitless, delay):
    decided = decide(failure_code=1, stopped_by=None, own_codes=frozenset({1}), restarts_left=1, fruitless=fruitless)
    assert decided == Restart(delay)


@pytest.mark.parametrize(("code", "left", "expected"), [(1, 3, 77), (-11, 3, 77), (1, 0, 77), (2, 3, 2), (78, 3, 78)])
def test_the_same_failure_again_without_progress_is_final(code, left, expected):
    decided = decide(
        failure_code=code, stopped_by=None, own_codes=frozenset(), restarts_left=left, fruitless=1, repeated=True
    )
    assert decided == Stop(expected)


def test_the_budget_begins_anew_with_every_new_checkpoint():
    memory = Memory(committed=10)
    for committed, fruitless in ((10, 1), (10, 2), (20, 1), (20, 2), (15, 3), (21, 1)):
        memory = memory.after(committed, None).restarted()
        assert memory.fruitless == fruitless


def test_only_the_same_place_twice_without_a_checkpoint_in_between_repeats():
    here = signature(rank=1, cause="ValueError: a", frame="r.py:3 in loss", step=4)
    later = signature(rank=1, cause="ValueError: b", frame="r.py:3 in loss", step=5)
    assert here == signature(rank=1, cause="ValueError: other words", frame="r.py:3 in loss", step=4)
    memory = Memory().after(-1, here)
    assert not memory.repeated
    assert memory.restarted().after(-1, here).repeated
    assert not memory.restarted().after(-1, later).repeated
    assert not memory.restarted().after(8, here).repeated
    assert not memory.restarted().after(-1, None).restarted().after(-1, here).repeated


def test_a_kill_from_outside_is_never_the_same_failure():
    assert signature(rank=1, cause="killed by SIGKILL (signal 9)", frame="", step=None) is None


@pytest.mark.parametrize(
    ("cause", "phase", "expected"),
    [
        ("ModuleNotFoundError: No module named 'x'", "", True),
        ("exit code 1, last words: SyntaxError: invalid syntax", "", True),
        ("ImportError: cannot import name 'x'", "build", True),
        ("ModuleNotFoundError: No module named 'x'", "step", False),
        ("ValueError: boom", "", False),
    ],
)
def test_code_that_can_not_be_imported_is_not_started_again(cause, phase, expected):
    assert never_began(cause, phase) == expected


@pytest.mark.parametrize(
    ("world_size", "min_ranks", "cause", "expected"),
    [
        (4, 2, "RuntimeError: CUDA error: unspecified launch failure", 3),
        (4, 2, "AcceleratorError: CUDA error: uncorrectable ECC error encountered", 3),
        (4, 2, "RuntimeError: Unable to determine the device handle for GPU0000:01:00.0: GPU is lost.", 3),
        (2, 2, "RuntimeError: CUDA error: unspecified launch failure", 2),
        (4, None, "RuntimeError: CUDA error: unspecified launch failure", 4),
        (4, 2, "OutOfMemoryError: CUDA out of memory", 4),
        (4, 2, "RuntimeError: CUDA error: device-side assert triggered", 4),  # an index out of range: the code's fault
        (4, 1, "ValueError: boom", 4),
    ],
)
def test_only_a_device_that_is_gone_costs_a_rank(world_size, min_ranks, cause, expected):
    assert fewer_ranks(world_size, min_ranks, cause) == expected


@pytest.mark.parametrize(
    ("visible", "world_size", "local_rank", "left"),
    [("", 4, 1, "0,2,3"), ("4,5,6", 3, 0, "5,6"), ("GPU-a, GPU-b", 2, 1, "GPU-a"), ("", 1, 0, "")],
)
def test_the_device_that_is_gone_is_hidden_from_the_ranks(visible, world_size, local_rank, left):
    assert devices_left(visible, world_size, local_rank) == left
