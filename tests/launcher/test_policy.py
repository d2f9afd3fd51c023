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
    after_stop,
    decide,
    devices_left,
    fewer_ranks,
    grace,
    meant,
    never_began,
    restarts_left,
    signature,
)

INT, TERM, HUP, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1


@pytest.mark.parametrize(
    ("failure_code", "stopped", "restarts_left", "verdict"),
    [
        (None, None, 0, Stop(0)),
        (None, None, 3, Stop(0)),
        (1, None, 0, Stop(1)),
        (1, None, 1, Restart()),
        (-9, None, 0, Stop(1)),
        (-9, None, 1, Restart()),
        (3, None, 0, Stop(1)),
        (130, None, 0, Stop(1)),
        (70, None, 0, Stop(70)),
        (2, None, 3, Stop(2)),
        (75, None, 3, Stop(75)),
        (76, None, 3, Stop(76)),
        (77, None, 3, Stop(77)),
        (78, None, 3, Stop(78)),
        (None, 130, 3, Stop(130)),
        (None, 75, 3, Stop(75)),
        (1, 76, 3, Stop(76)),  # it failed and would have started again, had nobody asked to stop
        (2, 143, 3, Stop(2)),
    ],
)
def test_what_follows_a_generation(failure_code, stopped, restarts_left, verdict):
    assert decide(failure_code=failure_code, stopped=stopped, restarts_left=restarts_left) == verdict


@pytest.mark.parametrize(
    ("signum", "codes", "forced", "committed", "of_a_recipe", "of_a_script"),
    [
        (INT, [], False, True, 130, 130),  # before a rank was started
        (TERM, [], False, False, 143, 143),
        (TERM, [], False, True, 76, 143),  # an earlier launch had saved: the scheduler wants it again
        (INT, [-15, -15], False, True, 130, 130),  # joining or building: SIGTERM ends a rank by itself
        (TERM, [-15, -15], False, True, 76, 143),
        (USR1, [143, -15], False, True, 76, 143),
        (TERM, [-15, -15], False, False, 143, 143),
        (HUP, [143, -15], False, False, 143, 143),
        (TERM, [75, 75], False, True, 75, 75),
        (TERM, [76, 76], False, True, 76, 76),
        (INT, [75, 76], False, True, 76, 76),
        (INT, [130, 130], False, False, 130, 130),  # trained, but nothing could ever be saved
        (TERM, [0, 0], False, True, 0, 143),  # it was the last step
        (TERM, [-9, 1], False, True, 76, 143),  # a rank died meanwhile
        (TERM, [-9, 1], False, False, 143, 143),
        (TERM, [-9, -9], False, True, 76, 143),  # hung until the grace time was over
        (USR1, [-9, -9], False, False, 143, 143),
        (TERM, [75, -9], False, True, 75, 143),  # saved, but a rank could not leave
        (INT, [75, 1], False, False, 130, 130),
        (INT, [-9, -9], True, True, 130, 130),  # asked twice
        (INT, [75, -9], True, True, 130, 130),
        (TERM, [-9, -9], True, True, 143, 143),
    ],
)
def test_how_a_run_ends_that_the_operator_stops(signum, codes, forced, committed, of_a_recipe, of_a_script):
    assert after_stop(signum, codes, forced=forced, saves=True, committed=committed) == of_a_recipe
    assert after_stop(signum, codes, forced=forced, saves=False, committed=False) == of_a_script


@pytest.mark.parametrize(("committed", "code"), [(True, 76), (False, 143)])
def test_ranks_that_sigterm_ends_after_their_last_step_had_trained(committed, code):
    assert after_stop(TERM, [-15, 0], forced=False, saves=True, committed=committed, trained=True) == code
    assert after_stop(TERM, [-15, -15], forced=False, saves=True, committed=committed, trained=True) == code
    assert after_stop(TERM, [], forced=False, saves=True, committed=committed, trained=True) == code


@pytest.mark.parametrize("code", [1, 3, 70, -9, -11])
def test_survivors_of_a_failure_end_at_once(code):
    patience = after_exit(code)
    assert patience.wait == 0
    assert patience.grace <= 0.5


@pytest.mark.parametrize(
    ("about", "wait", "grace"),
    [
        ({}, 0.0, 0.5),  # a script may have a handler for SIGTERM
        ({"resumes": True}, 0.0, 0.0),
        ({"resumes": True, "saving": True}, 0.0, 0.5),
        ({"resumes": True, "is_victim": True}, 0.5, 0.5),
        ({"resumes": True, "is_victim": True, "saving": True}, 0.5, 0.5),
    ],
)
@pytest.mark.parametrize("code", [1, 3, 70, -9, -11])
def test_survivors_of_a_recipe_get_no_time_unless_they_save_or_know_the_reason(code, about, wait, grace):
    patience = after_exit(code, **about)
    assert (patience.wait, patience.grace) == (wait, grace)


@pytest.mark.parametrize("code", [2, 75, 76, 77, 78])
def test_orderly_leavers_are_not_interrupted(code):
    assert after_exit(code).wait >= 2


def test_culprit_may_finish_its_sentence_when_a_victim_dies_first():
    assert 0 < after_exit(1, is_victim=True).wait <= 0.5


def test_operator_who_asks_twice_waits_for_nothing():
    assert after_signal(1, 30).grace == 30
    assert after_signal(2, 30).grace == 0


@pytest.mark.parametrize(
    ("grace_seconds", "shutdown_timeout", "saves", "expected"),
    [(None, None, True, 25), (None, None, False, 5), (None, 7, True, 7), (3, 7, True, 3), (0, None, False, 0)],
)
def test_the_time_to_save_in(grace_seconds, shutdown_timeout, saves, expected):
    assert grace(grace_seconds, shutdown_timeout, saves=saves) == expected


@pytest.mark.parametrize(("fruitless", "delay"), [(0, 0), (1, 1), (2, 2), (4, 8), (10, 30)])
def test_the_first_restart_comes_at_once_and_later_ones_wait_up_to_a_bound(fruitless, delay):
    decided = decide(failure_code=1, restarts_left=1, fruitless=fruitless)
    assert decided == Restart(delay)


@pytest.mark.parametrize(("code", "left", "expected"), [(1, 3, 77), (-11, 3, 77), (1, 0, 77), (2, 3, 2), (78, 3, 78)])
def test_the_same_failure_again_without_progress_is_final(code, left, expected):
    decided = decide(failure_code=code, restarts_left=left, fruitless=1, repeated=True)
    assert decided == Stop(expected)


def test_the_budget_begins_anew_with_every_new_checkpoint():
    memory = Memory(committed=10)
    for committed, fruitless in ((10, 1), (10, 2), (20, 1), (20, 2), (15, 3), (21, 1)):
        memory = memory.after(committed, None).restarted()
        assert memory.fruitless == fruitless


def test_what_is_remedied_costs_no_try_but_asks_whether_there_are_any():
    memory = Memory(committed=10).restarted().restarted(remedied=True)
    assert memory.fruitless == 1
    assert restarts_left(3, memory, final=False, remedied=False) == 2
    assert restarts_left(1, memory, final=False, remedied=False) == 0
    assert restarts_left(1, memory, final=False, remedied=True) == 1
    assert restarts_left(0, memory, final=False, remedied=True) == 0
    assert restarts_left(3, memory, final=True, remedied=True) == 0


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


def test_an_exception_without_a_line_of_the_users_is_the_same_where_its_words_are():
    def told(cause, step=4):
        return signature(rank=1, cause=cause, frame="", step=step, recorded=True)

    unequal = "RuntimeError: stack expects each tensor to be equal size"
    assert told(unequal) == told(unequal)
    assert told(unequal) not in (None, told(unequal, 5), told("RuntimeError: other words"))
    assert told("OSError: [Errno 28] No space left on device") is None
    assert told("PermissionError: [Errno 13]") is None


@pytest.mark.parametrize("code", [2, 70, 75, 76, 77, 78])
def test_our_codes_are_failures_like_any_other_where_a_program_does_not_train_with_us(code):
    assert meant(code, ours=False) == 1
    assert meant(code, ours=True) == code
    assert [meant(other, ours=False) for other in (0, 1, 3, -9)] == [0, 1, 3, -9]


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
