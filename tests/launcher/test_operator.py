"""The person at the keyboard, and worse: signals end everything, in the time that was promised."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time

import pytest

from .conftest import WORKERS, gone, wait_until

pytestmark = pytest.mark.alone


def all_gone(samestep, pattern="*.pid"):
    pids = [int(path.read_text()) for path in samestep.cwd.glob(pattern)]
    assert pids
    return all(gone(pid) for pid in pids)


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)],
)
def test_signal_ends_everything_with_its_code(signum, code, samestep):
    process = samestep.start_acting("0=spawn,detach,wait", "1=wait")
    since = time.monotonic()
    process.send_signal(signum)
    ended = samestep.finish(process, since)
    assert ended.code == code
    assert ended.seconds < 1.0
    assert all_gone(samestep)
    assert "Traceback" not in ended.stderr or signum == signal.SIGINT, "that of KeyboardInterrupt in the ranks"
    assert "failed" not in ended.stderr


def test_ctrl_c_reaches_scripts_that_catch_it(samestep):
    script = samestep.cwd / "catches.py"
    script.write_text(
        "import os, pathlib, time\n"
        "try:\n"
        "    pathlib.Path(f'ready-{os.environ[\"RANK\"]}').touch()\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    pathlib.Path(f'saved-{os.environ[\"RANK\"]}').touch()\n"
    )
    process = samestep.start("run", "--nproc-per-node", "2", script)
    wait_until(lambda: len(list(samestep.cwd.glob("ready-*"))) == 2, "both ranks wait")
    process.send_signal(signal.SIGINT)
    assert samestep.finish(process, time.monotonic()).code == 130
    assert len(list(samestep.cwd.glob("saved-*"))) == 2


def test_second_ctrl_c_ends_stubborn_ranks_at_once(samestep):
    process = samestep.start_acting("*=ignore-term,spawn,wait")
    process.send_signal(signal.SIGINT)
    assert b"stopping all ranks" in process.stderr.readline()
    since = time.monotonic()
    process.send_signal(signal.SIGINT)
    ended = samestep.finish(process, since)
    assert ended.code == 130
    assert ended.seconds < 1.0
    assert all_gone(samestep)


def test_stubborn_ranks_get_the_time_that_was_given_and_no_more(samestep):
    process = samestep.start_acting("0=ignore-term,wait", "1=wait", options=("--shutdown-timeout", "0.3"))
    since = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ended = samestep.finish(process, since)
    assert ended.code == 143
    assert 0.3 <= ended.seconds < 1.3
    assert all_gone(samestep)


@pytest.mark.parametrize(("trains", "code"), [(True, 75), (False, 143)])
def test_ranks_that_saved_before_leaving_are_believed_where_they_train_with_us(samestep, trains, code):
    if trains:
        (samestep.cwd / "runs" / "actor").mkdir(parents=True)
        (samestep.cwd / "runs" / "actor" / "config.json").write_text("{}")
    process = samestep.start_acting("*=exit-on-term:75,wait")
    process.terminate()
    assert samestep.finish(process, time.monotonic()).code == code


def test_ranks_die_with_a_killed_launcher(samestep):
    process = samestep.start_acting("*=ignore-term,wait")
    process.kill()
    wait_until(lambda: all_gone(samestep, "rank-*.pid"), "no rank outlives the launcher", seconds=2.0)


def test_shells_pass_the_signal_on_to_their_children(samestep):
    actor = shlex.join([sys.executable, str(WORKERS / "actor.py"), "*=exit-on-term:75,wait"]) + "; exit $?"
    process = samestep.start("run", "--no-python", "sh", "-c", f"trap : TERM; {actor}")
    wait_until(lambda: (samestep.cwd / "rank-0.generation-0.pid").exists(), "the actor is on stage")
    process.terminate()
    assert samestep.finish(process, time.monotonic()).code in (75, 143)
    assert all_gone(samestep)


def test_exits_are_seen_where_there_is_no_pidfd(samestep):
    code = "import os; del os.pidfd_open; from samestep.launcher.cli import main; main()"
    words = [sys.executable, "-c", code, "run", "--nproc-per-node", "2", str(WORKERS / "actor.py")]
    for parts, expected in ((["*=exit:0"], 0), (["0=ignore-term,wait", "1=raise"], 1)):
        ended = subprocess.run(
            [*words, *parts], cwd=samestep.cwd, env=samestep.environ(), capture_output=True, timeout=30, check=False
        )
        assert ended.returncode == expected, ended.stderr
        for leftover in samestep.cwd.glob("*.pid"):
            leftover.unlink()


def test_closed_console_does_not_end_the_run(samestep):
    process = samestep.start("run", "--nproc-per-node", "2", WORKERS / "actor.py", "0=say:a,say:b,exit:0")
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert "b" in (samestep.cwd / "runs/actor/logs/rank-0.log").read_text()


def test_run_survives_a_terminal_that_hangs_up_under_nohup(samestep):
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", "samestep.launcher", "run", str(WORKERS / "actor.py"), "0=wait"],
        cwd=samestep.cwd,
        env=samestep.environ(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    samestep.started.append(process)
    wait_until(lambda: (samestep.cwd / "rank-0.generation-0.pid").exists(), "the actor is on stage")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)
    process.send_signal(signal.SIGINT)
    assert samestep.finish(process, time.monotonic()).code == 130


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_stopped_while_a_restart_waits_it_ends_with_the_signals_code(signum, code, samestep):
    process = samestep.start_acting("0=raise", "1=wait", options=("--max-restarts", "9"))
    while b" in 2 s" not in process.stderr.readline():
        pass
    process.send_signal(signum)
    ended = samestep.finish(process, time.monotonic())
    assert ended.code == code
    assert all_gone(samestep)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_launcher_whose_output_nobody_takes_is_stopped_all_the_same(signum, code, samestep):
    long = "x" * 100_000  # of which a pipe takes 65 536 bytes
    process = samestep.start("run", WORKERS / "actor.py", f"0=say:{long}", f"0=say:{long}", "0=wait")
    log = samestep.cwd / "runs/actor/logs/rank-0.log"
    wait_until(lambda: log.exists() and log.stat().st_size > 70_000, "more is said than a pipe takes")
    process.send_signal(signum)
    assert process.wait(timeout=20) == code
    assert all_gone(samestep)
