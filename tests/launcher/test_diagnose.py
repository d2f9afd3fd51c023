"""Evidence in, one culprit out. Every row is a way to die."""

from __future__ import annotations

from dataclasses import replace

import pytest

from samestep.launcher.contract import ErrorRecord
from samestep.launcher.diagnosis.diagnose import Evidence, describe, diagnose, hung
from samestep.launcher.diagnosis.traceback_text import last_exception, tells_of_another_rank
from samestep.launcher.supervise.outcome import Hang, RankEnd


def traceback(text: str, file: str = "user.py") -> tuple[str, ...]:
    return ("Traceback (most recent call last):", f'  File "{file}", line 12, in loss', "    x", text)


RESET = traceback("RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
BOOM = traceback("ValueError: boom")
RECORD = ErrorRecord(
    rank=0,
    host="h",
    pid=1,
    generation=0,
    step=40,
    phase="forward",
    kind="KeyError",
    message="'x'\nmore",
    frame="r.py:1 in f",
    traceback="",
    exit_code=1,
    time_ns=0,
)


def end(rank, code, at, *stderr, signalled=False, place=(None, ""), **more):
    ended = RankEnd(rank, 100 + rank, code, signalled, at, (), tuple(stderr), 0, *place)
    return Evidence(ended, f"logs/rank-{rank}.log", **more)


def record(rank, at, **more):
    return replace(RECORD, rank=rank, time_ns=at, **more)


CASES = {
    "exception, other one ended by us": ([end(1, 1, 5, *BOOM), end(0, -15, 6, signalled=True)], 1, "ValueError: boom"),
    "victim first": ([end(0, 1, 5, *RESET), end(1, 1, 6, *BOOM)], 1, "ValueError: boom"),
    "victim first, culprit ended by us": (
        [end(0, 1, 5, *RESET), end(1, -9, 6, *BOOM, signalled=True)],
        1,
        "ValueError: boom",
    ),
    "two exceptions, the earlier": ([end(2, 1, 5, *BOOM), end(0, 1, 6, *traceback("KeyError: 1"))], 2, "ValueError"),
    "signal": ([end(0, 1, 6, *RESET), end(1, -11, 7)], 1, "killed by SIGSEGV (signal 11)"),
    "signal while others were being ended": ([end(1, -9, 5), end(0, -9, 6, signalled=True)], 1, "killed by SIGKILL"),
    "unknown signal": ([end(0, -63, 5)], 0, "killed by signal 63"),
    "abort of a victim": (
        [end(0, -6, 5, "terminate called", "what(): Connection reset by peer"), end(1, -9, 6)],
        1,
        "killed by SIGKILL",
    ),
    "abort of its own": ([end(0, -6, 5, "double free or corruption"), end(1, 1, 6, *RESET)], 0, "SIGABRT"),
    "exception, then an abort on the way out": (
        [end(1, -6, 5, *BOOM, "terminate called without an active exception"), end(0, -15, 6, signalled=True)],
        1,
        "ValueError: boom",
    ),
    "records decide, not the order of death": (
        [
            end(0, 1, 5, record=record(0, 4, consequence=True, kind="RuntimeError")),
            end(1, 1, 9, record=record(1, 3)),
        ],
        1,
        "KeyError: 'x'",
    ),
    "record of a rank that we ended": (
        [end(0, 1, 5, *RESET), end(1, -9, 6, record=record(1, 3), signalled=True)],
        1,
        "KeyError: 'x'",
    ),
    "a rank that never came": (
        [
            end(0, 1, 5, record=record(0, 4, kind="JoinTimeoutError", message="rank 1 did not join", accused=1)),
            end(1, -15, 6, signalled=True),
        ],
        1,
        "rank 1 did not join",
    ),
    "two records, the earlier": ([end(0, 1, 5, record=record(0, 8)), end(1, 1, 6, record=record(1, 3))], 1, "KeyError"),
    "torch's own record": ([end(0, 1, 5, elastic_message="OSError: disk", elastic_time_ns=4)], 0, "OSError: disk"),
    "torch's own record of a victim": (
        [end(0, 1, 5, elastic_message="RuntimeError: Connection reset by peer"), end(1, 3, 6, "bye")],
        1,
        "exit code 3, last words: bye",
    ),
    "early leaver": ([end(1, 0, 3), end(0, 1, 5, *RESET)], 1, "it left with 0 before the run was done"),
    "early leaver, but somebody else has a reason": ([end(1, 0, 3), end(0, 1, 5, *BOOM)], 0, "ValueError: boom"),
    "only victims": ([end(1, 1, 5, *RESET), end(0, 1, 6, *RESET)], 1, "RuntimeError"),
    "stopped from outside": ([end(0, -15, 5), end(1, -15, 6)], 0, "killed by SIGTERM"),
    "quiet exit": ([end(0, 3, 5)], 0, "exit code 3"),
    "prefix of torch": ([end(0, 1, 5, *(f"[rank0]: {line}" for line in BOOM))], 0, "ValueError: boom"),
}


@pytest.mark.parametrize("case", CASES)
def test_culprit_and_cause(case):
    ranks, culprit, cause = CASES[case]
    failure = diagnose(ranks)
    assert failure is not None
    assert (failure.rank, cause in failure.cause) == (culprit, True), failure


def test_nobody_is_accused_of_success():
    assert diagnose([end(0, 0, 1), end(1, 0, 2)]) is None


def test_exit_code_is_the_culprits_own():
    assert diagnose([end(0, 75, 5), end(1, 75, 6)]).exit_code == 75
    assert diagnose([end(0, 1, 5, *RESET), end(1, -9, 6, record=record(1, 3), signalled=True)]).exit_code == 1


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ([end(0, 2, 5, record=record(0, 3, exit_code=2)), end(1, 2, 6)], True),
        ([end(1, 2, 5), end(0, 2, 6, record=record(0, 3, exit_code=2))], True),
        ([end(0, 2, 5), end(1, 2, 6)], False),  # nobody knows who chose that number
        ([end(0, 2, 5, record=record(0, 3))], False),
        ([end(1, 2, 5), end(0, -15, 6, signalled=True)], False),
        ([end(0, 1, 5, *BOOM)], False),
    ],
)
def test_usage_error_that_rank_zero_printed_is_not_repeated(ranks, told):
    assert diagnose(ranks).told is told


def test_block_is_culprit_first_and_ends_with_the_fix():
    ranks = [end(1, 1, 5, record=record(1, 3, hint="fix it")), *(end(rank, -15, 6, signalled=True) for rank in (0, 2))]
    failure = diagnose(ranks)
    assert failure is not None
    assert describe(failure, 1) == [
        "samestep: rank 1 failed: KeyError: 'x'",
        "  at r.py:1 in f, step 41, phase forward",
        "  2 other ranks stopped as a consequence",
        "  log: logs/rank-1.log",
        "  exit code 1: user code or a worker failed for good",
        "  hint: fix it",
    ]


def test_block_has_no_empty_lines():
    failure = diagnose([end(0, 3, 5)])
    assert failure is not None
    assert describe(failure, 1) == [
        "samestep: rank 0 failed: exit code 3",
        "  log: logs/rank-0.log",
        "  exit code 1: user code or a worker failed for good",
    ]


def test_frame_is_the_users_innermost():
    lines = (
        "Traceback (most recent call last):",
        '  File "/home/me/train.py", line 3, in main',
        '  File "/x/site-packages/torch/nn/module.py", line 9, in forward',
        "torch.OutOfMemoryError: CUDA out of memory",
        "some later line",
    )
    said = last_exception(lines)
    assert (said.frame, said.text) == ("/home/me/train.py:3 in main", "torch.OutOfMemoryError: CUDA out of memory")


def test_last_traceback_of_a_chain_counts():
    chain = (*BOOM, "", "During handling of the above exception, another exception occurred:", "", *RESET)
    assert last_exception(chain).kind == "RuntimeError"


GROUP = (
    "  + Exception Group Traceback (most recent call last):",
    '  |   File "user.py", line 4, in main',
    "  |     async with asyncio.TaskGroup() as tasks:",
    "  | ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception)",
    "  +-+---------------- 1 ----------------",
)
PART = ("    | Traceback (most recent call last):", '    |   File "user.py", line 2, in bad', "    | ValueError: late")
END = ("    +------------------------------------",)


def test_a_group_of_exceptions_is_told_by_the_last_one_in_it():
    said = last_exception([*BOOM, *GROUP, *PART, *END])
    assert (said.text, said.frame) == ("ValueError: late", "user.py:2 in bad")
    said = last_exception(["[rank0]: " + line for line in (*GROUP, "    | ValueError: made by hand", *END)])
    assert (said.kind, said.frame) == ("ExceptionGroup", "user.py:4 in main")
    assert last_exception([*GROUP, *PART, *END, *BOOM]).text == "ValueError: boom"


def test_native_crash_shows_its_python_frame():
    lines = (
        "Fatal Python error: Segmentation fault",
        "Current thread 0x0 (most recent call first):",
        '  File "/usr/lib/python3.11/ctypes/__init__.py", line 5 in string_at',
        '  File "user.py", line 7 in crash',
    )
    assert diagnose([end(0, -11, 5, *lines)]).frame == "user.py:7 in crash"


@pytest.mark.parametrize("kind", ["SystemExit: 1", "KeyboardInterrupt"])
def test_being_stopped_is_no_exception(kind):
    assert last_exception(traceback(kind)) is None


@pytest.mark.parametrize(
    ("text", "is_victim"),
    [
        ("RuntimeError: [..]/gloo/transport/tcp/pair.cc:547] Connection closed by peer", True),
        ("RuntimeError: [..] Read error [127.0.0.1]:1: Connection reset by peer", True),
        ("torch.distributed.DistBackendError: NCCL error: remote process exited or there was a network error", True),
        ("torch.distributed.DistNetworkError: failed to recv, got 0 bytes", True),
        ("RuntimeError: Gloo connectFullMesh failed with [..]", True),
        ("ValueError: connection string is empty", False),
        ("RuntimeError: mat1 and mat2 shapes cannot be multiplied", False),
        ("torch.OutOfMemoryError: CUDA out of memory", False),
    ],
)
def test_victims_are_known_by_what_they_say(text, is_victim):
    assert tells_of_another_rank(text) is is_victim


def test_a_hang_is_a_failure_of_the_rank_that_hangs():
    hang = Hang(2, 40, "forward", 31.4, 0.2, "r.py:12 in loss", "", "errors/stacks-0.txt")
    failure = hung(hang, "logs/rank-2.log", 4)
    assert describe(failure, 1) == [
        "samestep: rank 2 failed: hang: 31 s in forward at r.py:12 in loss (a whole step took at most 0.2 s before)",
        "  step 41, phase forward",
        "  3 other ranks stopped as a consequence",
        "  log: logs/rank-2.log",
        "  exit code 1: user code or a worker failed for good",
        "  hint: stacks of all ranks: errors/stacks-0.txt",
    ]


@pytest.mark.parametrize(
    ("hang", "cause"),
    [
        (Hang(0, 0, "build", 600.0), "hang: 600 s in build"),
        (Hang(0, 9, "evaluation", 31, 2.0), "hang: 31 s in evaluation (it took at most 2 s before)"),
        (Hang(0, 9, "", 5, how="stopped by a signal"), "hang: 5 s in no phase of training: stopped by a signal"),
    ],
)
def test_what_is_not_known_of_a_hang_is_left_out(hang, cause):
    assert hung(hang, "log", 1).cause == cause


VICTIM = end(0, 1, 6, record=record(0, 6, consequence=True, step=39))


@pytest.mark.parametrize(
    ("ranks", "place"),
    [
        ([end(1, -9, 5, place=(6, "forward")), VICTIM], (6, "forward")),
        ([end(1, 3, 5, place=(6, "data")), VICTIM], (6, "data")),
        ([end(1, -9, 5, place=(0, "joining"))], (0, "joining")),
        ([end(1, -9, 5, place=(6, "")), VICTIM], (39, "")),  # it had left training
        ([end(1, -9, 5), VICTIM], (39, "")),  # a script, which publishes nothing
        ([end(1, 1, 5, place=(6, "data"), record=record(1, 5))], (40, "forward")),  # its own words count more
        ([end(1, -9, 5, place=(6, "sync")), end(0, -9, 6, signalled=True, place=(6, "forward"))], (6, "sync")),
    ],
)
def test_a_culprit_that_can_say_nothing_is_placed_by_what_it_published(ranks, place):
    failure = diagnose(ranks)
    assert (failure.rank, failure.step, failure.phase) == (1, *place)
