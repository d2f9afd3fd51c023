"""Stacks of real processes, whatever they do: asleep, stopped, with the interpreter lock held, without py-spy."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from samestep.launcher import contract
from samestep.launcher.diagnosis import stack_probe
from samestep.launcher.diagnosis.stacks import Stacks, parse_faulthandler, parse_spy

from .conftest import wait_until

OURS = Path(contract.__file__).resolve().parent.parent / "train"
PROGRAM = """
import re, signal, sys, threading, time
from pathlib import Path
from samestep.launcher.diagnosis.stack_signal import tell_stacks_when_asked
tell_stacks_when_asked()
def busy(): Path(sys.argv[1]).touch(); {what}
def loss(): busy()
threading.Thread(target=lambda: time.sleep(3600), name="loader", daemon=True).start()
loss()
"""


@pytest.fixture
def process(tmp_path):
    """`process(what)`: a program that does `what` in busy(), which loss() has called."""
    started = []

    def start(what):
        script, mark = tmp_path / "program.py", tmp_path / "mark"
        script.write_text(PROGRAM.format(what=what))
        started.append(subprocess.Popen([sys.executable, str(script), str(mark)]))
        wait_until(mark.exists, "the program is where it should be")
        return started[-1].pid

    yield start
    for program in started:
        program.kill()
        program.wait()


def names(stacks: Stacks) -> list[str]:
    assert stacks.main, stacks
    return [frame.name for frame in stacks.main.python if frame.file.endswith("program.py")][:2]


SLEEPS = "time.sleep(3600)"
HOLDS_THE_LOCK = "re.match(r'(a?){40}a{40}', 'a' * 40)"


@pytest.mark.parametrize("what", [SLEEPS, HOLDS_THE_LOCK], ids=["asleep", "holds the lock"])
def test_python_and_native_frames_of_a_living_process(process, what):
    pid = process(what)
    stacks = stack_probe.take([pid])[pid]
    assert names(stacks) == ["busy", "loss"]
    assert stacks.user_frame.endswith("program.py:6 in busy")
    assert stacks.main.owns_gil == (what == HOLDS_THE_LOCK)
    assert any(not frame.line for frame in stacks.main.frames)
    assert "loader" in [thread.name for thread in stacks.threads]


def test_a_stopped_process_has_stacks_and_stays_stopped(process):
    pid = process(SLEEPS)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: stack_probe.is_stopped(pid), "it is stopped")
    assert names(stack_probe.take([pid])[pid]) == ["busy", "loss"]
    assert stack_probe.is_stopped(pid)


@pytest.mark.parametrize("what", [SLEEPS, HOLDS_THE_LOCK], ids=["asleep", "holds the lock"])
def test_without_py_spy_the_process_tells_its_stacks_itself(process, what, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *words, **more: None)
    pid = process(what)
    for _ in range(2):  # the second answer is not the first one
        stacks = stack_probe.take([pid])[pid]
        assert names(stacks) == ["busy", "loss"]
        assert len(stacks.threads) == 2


def test_who_has_no_ear_for_the_signal_is_not_killed_by_it(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *words, **more: None)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) as program:
        try:
            assert stack_probe.take([program.pid])[program.pid].problem == "py-spy is not installed"
            assert program.poll() is None
        finally:
            program.kill()


def test_processes_that_a_rank_started_are_looked_at_too(process):
    pid = process("import subprocess; subprocess.run([sys.executable, '-c', 'import time; time.sleep(3600)'])")
    wait_until(lambda: len(stack_probe.take([pid])) == 2, "the child is there")
    (child,) = [stacks for stacks in stack_probe.take([pid]).values() if stacks.parent == pid]
    os.kill(child.pid, signal.SIGKILL)  # its parent ends with the test, and would leave it
    assert child.pid != pid


def test_a_process_that_is_gone_has_a_problem():
    program = subprocess.Popen([sys.executable, "-c", ""])
    program.wait()
    assert stack_probe.take([program.pid])[program.pid].problem


def test_the_users_signal_handler_is_left_alone():
    code = (
        "import signal; mine = lambda *_: None; signal.signal(signal.SIGUSR2, mine)\n"
        "from samestep.launcher.diagnosis.stack_signal import tell_stacks_when_asked as tell\n"
        "tell(); assert signal.getsignal(signal.SIGUSR2) is mine"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- reading


def spied(*files):
    frames = [{"name": f"f{n}", "filename": file, "line": n + 1} for n, file in enumerate(files)]
    return Stacks(1, parse_spy(json.dumps([{"thread_name": "MainThread", "pid": 1, "frames": frames}]).encode()))


@pytest.mark.parametrize(
    ("files", "frame", "waits"),
    [
        (["recipe.py", f"{OURS}/step.py", "recipe.py"], "recipe.py:1 in f0", False),
        (["/v/site-packages/torch/nn/linear.py", "net.py", f"{OURS}/step.py"], "net.py:2 in f1", False),
        # what is above our first frame is only the script's call of train
        (["/usr/lib/python3.11/queue.py", f"{OURS}/step.py", "recipe.py"], "", False),
        ([f"{OURS}/parallel/exchange.py", f"{OURS}/step.py", "recipe.py"], "", True),
        ([f"{OURS}/parallel/shared_memory.py", f"{OURS}/step.py", "recipe.py"], "", True),
        (["/v/site-packages/torch/distributed/distributed_c10d.py", "recipe.py"], "recipe.py:2 in f1", True),
        (["libc.so.6", "/v/site-packages/torch/distributed/distributed_c10d.py"], "", True),
        ([], "", False),
    ],
)
def test_user_frames_and_waiting_are_read_off_the_files(files, frame, waits):
    stacks = spied(*files)
    assert (stacks.user_frame, stacks.waits_for_others) == (frame, waits)


@pytest.mark.parametrize("text", [b"", b"Error: permission denied", b"{}x", b'[{"frames": 3}]', b"[3]"])
def test_what_is_not_a_dump_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        parse_spy(text)


def test_faulthandlers_last_thread_is_the_main_one():
    text = (
        "Thread 0x00007f (most recent call first):\n"
        '  File "a.py", line 3 in wait\n\n'
        "Current thread 0x00007e (most recent call first):\n"
        '  File "recipe.py", line 7 in loss\n'
        '  File "recipe.py", line 9 in <module>\n'
    )
    threads = parse_faulthandler(text)
    assert [thread.is_main for thread in threads] == [False, True]
    assert [str(frame) for frame in threads[1].frames] == ["recipe.py:7 in loss", "recipe.py:9 in <module>"]


# --- the command


def test_stacks_of_a_live_run_name_every_rank(samestep):
    samestep.start_acting("*=wait", ranks=2)
    shown = samestep("stacks", "runs/actor")
    assert shown.code == 0, shown.stderr
    assert re.findall(r"^rank (\d), pid \d+$", shown.stdout, re.MULTILINE) == ["0", "1"]
    assert shown.stdout.count("in act\n") == 2


def test_stacks_of_what_does_not_run_is_a_sentence(samestep):
    assert samestep.act("*=exit:0").code == 0
    (samestep.cwd / "elsewhere").mkdir()
    owner = {"pid": 7, "host": "far-away", "boot_id": "", "start_time": 1, "generation": 1}
    (samestep.cwd / "elsewhere" / "lock").write_text(json.dumps(owner))
    for path, text in [
        ("runs/actor", "nobody holds its lock"),
        ("runs/nothing", "there is no folder runs/nothing"),
        ("elsewhere", "pid 7 on far-away holds its lock"),
        ("--all", "unknown option --all"),
        ("x" * 300, "can't be read: File name too long"),
    ]:
        refused = samestep("stacks", path)
        assert refused.code == 2
        assert text in refused.stderr
        assert refused.stderr.count("\n") == 2
