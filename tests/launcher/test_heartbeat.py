"""A few bytes of shared memory: what one process writes, another one reads, and nothing is left of them."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from samestep.launcher.heartbeat import PHASES, SPANS, Beat, Board, Heartbeat, NoPulse, pulse, where

from .conftest import wait_until


class Clock:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def board():
    board = Board(3)
    yield board
    board.close()


def beating(board, rank=1, clock=None):
    return Heartbeat(mmap.mmap(board.fd, 0), rank, clock or Clock())


def test_a_rank_writes_to_its_own_slot(board):
    for rank in range(3):
        beating(board, rank).at(rank, PHASES[1 + rank])
    assert [(board.read(rank).step, board.read(rank).phase) for rank in range(3)] == [
        (0, "joining"),
        (1, "build"),
        (2, "evaluation"),
    ]


def test_nothing_was_published_yet(board):
    assert board.read(0) == Beat()


def test_every_change_counts_and_carries_its_time(board):
    clock = Clock()
    heart = beating(board, clock=clock)
    heart.count_by(lambda: 42)
    heart.at(5, "step")
    clock.seconds += 1
    heart.enter("forward")
    assert board.read(1) == Beat(2, 5, "forward", True, 42, 101.0)
    heart.enter("forward")
    assert board.read(1).beats == 3


def test_the_longest_of_each_kind_is_kept(board):
    clock = Clock()
    heart = beating(board, clock=clock)
    spans = [
        *[("step", 9.0), ("step", 0.5), ("step", 0.25), ("evaluation", 3.0), ("checkpoint", 2.0)],
        *[("step", 4.0), ("step", 0.125), ("evaluation", 1.0), ("loading", 70.0), ("step", 1.0)],
    ]
    for step, (phase, seconds) in enumerate(spans):
        heart.at(step, phase)
        clock.seconds += seconds
    heart.at(len(spans), "closing")
    known = dict(zip(SPANS, board.read(1).longest, strict=True))
    assert known == {"edge": 9.0, "step": 0.5, "evaluation": 3.0, "checkpoint": 2.0, "closing": 0.0}


def test_a_step_after_something_else_is_an_edge(board):
    heart, seen = beating(board), []
    for phase in ("build", "step", "step", "evaluation", "step", "step"):
        heart.at(0, phase)
        seen.append(board.read(1).edge)
    assert seen == [False, True, False, False, True, False]


def test_a_rank_that_comes_to_sync_without_a_forward_pass_is_idle_in_that_step(board):
    heart, seen = beating(board), []
    heart.at(0, "step")
    for phase in ("sync", "optimizer", "step", "data", "forward", "data", "forward", "sync", "step", "data", "sync"):
        heart.at(1, "step") if phase == "step" else heart.enter(phase)
        seen.append(board.read(1).idle)
    assert seen == [True, True, False, False, False, False, False, False, False, False, True]


def test_where_a_rank_stands_still_its_device_is_asked(board):
    heart, places = beating(board), [(3, "sync")]
    heart.at(10, "step")
    heart.follow(lambda: places[0] if places else None)
    try:
        wait_until(lambda: board.read(1).device == (7, "sync"), "the device")
        assert board.read(1).place == (7, "sync")
        heart.enter("optimizer")
        places.clear()
        assert board.read(1).device is None
        assert board.read(1).place == (10, "optimizer")
        places.append((0, "backward"))
        wait_until(lambda: board.read(1).place == (10, "backward"), "the device")
    finally:
        heart.at(10, "")
    wait_until(lambda: not any(thread.name == "device" for thread in threading.enumerate()), "the device")


def test_a_second_run_of_a_process_goes_on_counting(board):
    beating(board).at(0, "build")
    beating(board).at(0, "build")
    assert board.read(1).beats == 2


def test_what_ranks_said_that_are_gone_is_forgotten(board):
    beating(board).at(3, "step")
    board.clear()
    assert board.read(1) == Beat()


@pytest.mark.parametrize("text", ["", "no", "-1", "99999"])
def test_without_memory_nobody_is_told(text):
    assert isinstance(pulse({"SAMESTEP_HEARTBEAT_FD": text}, 0), NoPulse)


def test_a_descriptor_that_is_something_else_is_refused(tmp_path):
    with (tmp_path / "short").open("w+b") as file:
        file.write(b"x")
        file.flush()
        assert isinstance(pulse({"SAMESTEP_HEARTBEAT_FD": str(file.fileno())}, 0), NoPulse)
        assert (tmp_path / "short").read_bytes() == b"x"


PROGRAM = """
import os, sys, time
from samestep.launcher.heartbeat import pulse
heart = pulse(os.environ, 2)
for step in range(10 ** 9):
    heart.at(step, "step")
    for phase in ("data", "forward", "backward", "sync", "optimizer"):
        heart.enter(phase)
"""


def test_a_reader_never_sees_half_a_beat_and_the_memory_has_no_name(board):
    os.set_inheritable(board.fd, True)
    environ = dict(os.environ) | {"SAMESTEP_HEARTBEAT_FD": str(board.fd)}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environ, pass_fds=(board.fd,))
    try:
        wait_until(lambda: board.read(2).step > 100, "the process beats")
        last = board.read(2)
        for _ in range(20_000):
            beat = board.read(2)
            assert beat.beats >= last.beats
            assert 6 * beat.step < beat.beats <= 6 * beat.step + 6
            last = beat
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert str(Path(f"/proc/self/fd/{board.fd}").readlink()).startswith("/memfd:")


def test_a_step_in_which_a_rank_was_is_counted_as_people_count():
    assert where(7, "forward") == "step 8"
    assert where(0, "data") == "step 1"
    assert where(7, "evaluation") == where(7, "") == "after step 7"
    assert where(0, "build") == where(None, "forward") == ""
