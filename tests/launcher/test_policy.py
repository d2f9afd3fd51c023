"""Restart and exit decisions, as a table."""

from __future__ import annotations

import signal

import pytest

from samestep.launcher.supervise.policy import Restart, Stop, after_exit, after_signal, decide

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
