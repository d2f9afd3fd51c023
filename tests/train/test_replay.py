"""A step of a finished run again: the same bits, alone, in a folder of its own, and in a debugger if asked."""

import contextlib
import hashlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parent / "recipes" / "small.py"
EVERY = ("--checkpoint-every", "3", "--keep-checkpoints", "99", "--shards", "2")


def content(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("step", [4, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3, 11))])
def test_a_step_of_two_ranks_has_the_same_bits_on_one(trained, start, step):
    ended = trained("small", *EVERY, ranks=2)
    before = content(ended.run_dir)
    again = start("small", "--run-dir", "run", *EVERY, "--replay", step)
    assert again.codes == [0], again.stderr
    assert f"Replayed step {step}: loss " in again.stdout
    assert "the same bits as in the run" in again.stdout
    assert content(ended.run_dir) == before, "the run itself is only read"


def test_another_learning_rate_is_told_from_the_run(trained, start):
    trained("small", *EVERY)
    other = start("small", "--run-dir", "run", *EVERY, "--replay", 6, "--clip-grad-norm", "0.001")
    assert other.codes == [1]
    assert "Replayed step 6: the loss is" in other.stdout
    assert "--clip-grad-norm changed from None to 0.001" in other.stderr


def test_another_seed_is_named_though_no_checkpoint_is_old_enough(trained, start):
    trained("small", "--shards", "2", "--seed", "3")
    other = start("small", "--run-dir", "run", "--shards", "2", "--replay", 2)
    assert other.codes == [1]
    assert "--seed changed from 3 to 0" in other.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--replay", "99"), "--replay is expected to name a step that"),
        (("--replay", "0"), "--replay is expected to be at least 1, but is 0"),
        (("--debug",), "--debug is expected to go with --replay STEP"),
    ],
)
def test_what_can_not_be_replayed_is_a_usage_error(trained, start, flags, said):
    trained("small", *EVERY)
    ended = start("small", "--run-dir", "run", *flags)
    assert ended.codes == [2]
    assert said in ended.stderr


def test_several_ranks_or_no_run_at_all_are_refused(start):
    ended = start("small", "--run-dir", "run", "--replay", "1", ranks=2)
    assert ended.codes == [2, 2]
    assert "--replay is expected to run on one process, but there are 2" in ended.stderr
    assert "holds none" in start("small", "--run-dir", "nowhere", "--replay", "1").stderr


@pytest.mark.slow
def test_the_debugger_stops_before_the_step(trained):
    ended = trained("small", *EVERY)
    argv = [sys.executable, str(RECIPE), "--run-dir", str(ended.run_dir), *EVERY, "--replay", "5", "--debug"]
    words = "p 'at step', plan.step + 1\nc\n"
    process = subprocess.run(
        argv, input=words, env=os.environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "('at step', 5)" in process.stdout
    assert "Replayed step 5" in process.stdout


@pytest.mark.slow
def test_nothing_is_drawn_over_the_debuggers_prompt(trained):
    ended = trained("small", *EVERY)
    argv = [sys.executable, str(RECIPE), "--run-dir", str(ended.run_dir), *EVERY, "--replay", "5", "--debug"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True) as process:
        os.close(theirs)
        os.write(ours, b"c\n")
        said = b""
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
            while data := os.read(ours, 4096):
                said += data
    os.close(ours)
    assert process.returncode == 0, said
    assert b"(Pdb)" in said.replace(b"\x1b[1m", b"")
    assert b"\x1b[2K" not in said, "no line was cleared"
