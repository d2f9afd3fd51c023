"""A signal, last words and counters in; a cause and the fix out."""

from __future__ import annotations

import signal

import pytest

from samestep.launcher.diagnosis.death import explain, hint_for, last_words
from samestep.launcher.diagnosis.diagnose import Evidence, describe, diagnose
from samestep.launcher.diagnosis.memory_signs import MemorySigns
from samestep.launcher.supervise.outcome import RankEnd

GIB = 1 << 30
ROOMY = MemorySigns(limit=16 * GIB, shared_size=8 * GIB, shared_used=GIB)
GLOO = (
    "terminate called after throwing an instance of 'gloo::EnforceNotMet'",
    "  what():  [enforce fail at /a/b/pair.cc:456] op.preamble.length <= op.nbytes. 100000 vs 4. ",
)
STACK = (
    "Fatal Python error: Segmentation fault",
    "",
    "Thread 0x1 (most recent call first):",
    '  File "other.py", line 1 in somewhere_else',
    "",
    "Current thread 0x2 (most recent call first):",
    '  File "/x/site-packages/lib.py", line 2 in native',
    *(f'  File "r.py", line {line} in frame{line}' for line in range(3, 12)),
)
CASES = {
    "lack of memory": (
        9,
        (),
        GIB,
        MemorySigns(1, 2 * GIB),
        "for lack of memory, it held 1.0 GiB of 2.0 GiB",
        "batches",
    ),
    "lack of memory, size unknown": (9, (), 0, MemorySigns(1), "ended it for lack of memory", "higher memory limit"),
    "much memory, nothing counted": (9, (), 15 * GIB, ROOMY, "SIGKILL", "15.0 GiB of 16.0 GiB at most: memory may"),
    "killed with room left": (9, (), GIB, ROOMY, "killed by SIGKILL (signal 9)", "memory was not short (it held 1.0"),
    "killed, nothing known": (9, (), 0, MemorySigns(), "SIGKILL", "see dmesg"),
    "shared memory full": (7, (), 0, MemorySigns(0, 0, 64 << 20, 63 << 20), "shm has 64.0 MiB, 63.0 MiB", "--shm"),
    "bus error, room left": (7, (), 0, ROOMY, "SIGBUS", "shm has 8.0 GiB, 1.0 GiB used"),
    "bus error, nothing known": (7, (), 0, MemorySigns(), "SIGBUS", "became shorter"),
    "C++": (6, GLOO, 0, ROOMY, "gloo::EnforceNotMet: op.preamble.length <= op.nbytes. 100000", "different collectives"),
    "glibc": (6, ("free(): invalid pointer",), 0, ROOMY, "SIGABRT (signal 6): free(): invalid pointer", "gave up"),
    "assertion": (6, ("a: b.c:1: f: Assertion `x' failed.",), 0, ROOMY, "b.c:1: f: Assertion `x' failed", "gave up"),
    "silent abort": (6, ("some line", "Fatal Python error: Aborted"), 0, ROOMY, "by SIGABRT (signal 6)", "gave up"),
    "segmentation fault": (11, STACK, 0, ROOMY, "SIGSEGV", "--num-workers 0"),
    "illegal instruction": (4, (), 0, ROOMY, "SIGILL", "this CPU doesn't have"),
    "division by zero": (8, (), 0, ROOMY, "SIGFPE", "divided by zero"),
    "CPU time": (24, (), 0, ROOMY, "SIGXCPU", "ulimit -t"),
    "file size": (25, (), 0, ROOMY, "SIGXFSZ", "ulimit -f"),
    "forbidden call": (31, (), 0, ROOMY, "SIGSYS", "seccomp"),
    "asked to end": (15, (), 0, ROOMY, "SIGTERM", "this process alone"),
}


@pytest.mark.parametrize("case", CASES)
def test_signal_is_decoded_with_its_fix(case):
    number, stderr, peak, signs, cause, hint = CASES[case]
    death = explain(number, stderr, peak, signs)
    assert cause in death.cause
    assert hint in death.hint


def test_every_signal_that_ends_a_process_is_named():
    for number in set(signal.Signals) - {signal.SIGCHLD}:
        assert f"{number.name} (signal {number.value})" in explain(number, (), 0, ROOMY).cause
    assert explain(63, (), 0, ROOMY).cause == "killed by signal 63"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB.", "--shards"),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", "shm has 8.0"),
        ("RuntimeError: DataLoader worker (pid(s) 7) exited unexpectedly", "--num-workers 0"),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed. ", "dmesg"),
        ("RuntimeError: CUDA error: device-side assert triggered", "CUDA_LAUNCH_BLOCKING"),
        ("OSError: [Errno 24] Too many open files", "ulimit -n"),
        ("RuntimeError: can't start new thread", "ulimit -u"),
        ("OSError: [Errno 28] No space left on device: '/data/x'", "the disk is full"),
        ("RuntimeError: unable to write to file </torch_1>: No space left on device (28)", "shared memory is full"),
        ("MemoryError", "memory is full"),
        (
            "DistNetworkError: port: 29781, code: -98, name: EADDRINUSE, message: address already in use",
            "--master-port",
        ),
        ("ValueError: boom", ""),
    ],
)
def test_known_errors_come_with_their_fix(text, hint):
    assert hint in hint_for(text, ROOMY) if hint else hint_for(text, ROOMY) == ""


def test_killed_loader_is_lack_of_memory_where_the_kernel_counted_one():
    text = "RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed. "
    assert "for lack of memory (2.0 GiB)" in hint_for(text, MemorySigns(1, 2 * GIB))


def test_only_the_last_words_of_native_code_count():
    assert last_words(("terminate called after throwing an instance of 'a'", "  what():  x", "double free (top)")) == (
        "double free (top)"
    )


def test_a_recipe_that_crashed_while_it_trained_is_told_its_own_option():
    training = RankEnd(0, 1, -11, False, 5, (), STACK, 0, 4, "forward")
    failure = diagnose([Evidence(training, "logs/rank-0.log")], ROOMY)
    assert failure is not None
    assert failure.hint.endswith("run it alone with --num-workers 0 to see it in one process")


def test_block_of_a_crash_has_its_stack_and_is_one_look_long():
    ends = [RankEnd(1, 1, -11, False, 5, (), STACK), *(RankEnd(rank, 1, -9, True, 6) for rank in (0, 2))]
    ranks = [Evidence(end, f"logs/rank-{end.rank}.log") for end in ends]
    failure = diagnose(ranks, ROOMY)
    assert failure is not None
    assert describe(failure, 1) == [
        "samestep: rank 1 failed: killed by SIGSEGV (signal 11)",
        "  at r.py:3 in frame3",
        "    from r.py:4 in frame4",
        "    from r.py:5 in frame5",
        "    from r.py:6 in frame6",
        "    from r.py:7 in frame7",
        "  2 other ranks stopped as a consequence",
        "  log: logs/rank-1.log",
        "  exit code 1: user code or a worker failed for good",
        "  hint: it crashed in native code: the log has its Python stack; "
        "run it alone, without data loading processes, to see it in one process",
    ]
