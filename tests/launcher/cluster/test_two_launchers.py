"""Two launchers of one run on this machine, with ranks that need no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(60)]
SAMESTEP = Path(sys.executable).with_name("samestep")
SCRIPT = """
import os, signal, sys, time
if os.environ["WORLD_SIZE"] == "1":
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open("ready-" + os.environ["RANK"], "w").close()
time.sleep(60)
"""


@pytest.fixture
def launchers(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The head's and another one, once their ranks run; a test may choose what they run, and options."""
    text, *options = getattr(request, "param", (SCRIPT,))
    (tmp_path / "script.py").write_text(text)
    theirs = ("SAMESTEP_", "PET_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    run = [str(SAMESTEP), "run", "--nnodes", "1:2", "--rdzv-conf", "last_call_timeout=30", *options, "--node-rank"]
    started = []
    for node in ("0", "1"):
        with (tmp_path / f"node-{node}").open("w") as output:
            words = [*run, node, "script.py"]
            started.append(subprocess.Popen(words, cwd=tmp_path, env=environ, stdout=output, stderr=output))
    try:
        until = time.monotonic() + 40
        while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < until, (tmp_path / "node-0").read_text()
            time.sleep(0.02)
        yield started
    finally:
        for launcher in started:
            launcher.kill()
            launcher.wait()


def test_a_machine_that_is_asked_to_stop_and_leaves_at_once_is_done_without(launchers, tmp_path):
    """The head's rank takes its time to end: the other launcher is gone when the head comes to count."""
    launchers[1].send_signal(signal.SIGTERM)
    launchers[1].send_signal(signal.SIGINT)  # once more: at once
    assert launchers[0].wait(timeout=40) == 0, (tmp_path / "node-0").read_text()
    assert "leaves" in (tmp_path / "node-0").read_text()


def test_who_loses_the_head_before_the_first_checkpoint_fails(launchers, tmp_path):
    launchers[0].kill()
    assert launchers[1].wait(timeout=40) == 1
    said = (tmp_path / "node-1").read_text()
    assert "the head of the run is gone" in said
    assert "the ranks of this machine are ended, exit code 1" in said


FAILING = """
import os, signal, sys, time
if os.environ["WORLD_SIZE"] == "1":
    sys.exit(0)
rank = os.environ["RANK"]
signal.signal(signal.SIGTERM, lambda *_: open("told-" + rank, "w").close())
with open("pid-" + rank, "w") as file:
    file.write(str(os.getpid()))
open("ready-" + rank, "w").close()
while True:
    time.sleep(60)
"""


@pytest.mark.parametrize("launchers", [(FAILING, "--max-restarts", "1", "--grace-seconds", "0.2")], indirect=True)
def test_a_machine_that_is_asked_to_stop_while_its_ranks_end_for_anothers_failure_leaves(launchers, tmp_path):
    os.kill(int((tmp_path / "pid-0").read_text()), signal.SIGKILL)
    until = time.monotonic() + 40
    while not (tmp_path / "told-1").exists():
        assert time.monotonic() < until
        time.sleep(0.005)
    launchers[1].send_signal(signal.SIGTERM)
    assert launchers[1].wait(timeout=40) == 143, (tmp_path / "node-1").read_text()
    assert launchers[0].wait(timeout=40) == 0, (tmp_path / "node-0").read_text()


ENDING = """
import os, signal, sys, time
if False:  # it only looks like a recipe
    from samestep.train import train
if os.environ["WORLD_SIZE"] == "1":
    open("again", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # at once: a second one would end an interpreter that leaves
open("ready-" + os.environ["RANK"], "w").close()
while True:
    time.sleep(60)
"""


@pytest.mark.parametrize("launchers", [(ENDING, "--no-warm", "--no-report")], indirect=True)
def test_a_machine_that_is_asked_to_stop_when_all_ranks_come_to_their_end_leaves_nothing_to_do(launchers, tmp_path):
    launchers[1].send_signal(signal.SIGTERM)
    assert [launcher.wait(timeout=40) for launcher in launchers] == [0, 0], (tmp_path / "node-0").read_text()
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("signum", "kept", "code"), [("TERM", True, 76), ("TERM", False, 143), ("INT", True, 130)])
def test_who_is_stopped_before_the_head_is_there_leaves_as_from_any_start(
    tmp_path: Path, signum: str, kept: bool, code: int
) -> None:
    (tmp_path / "script.py").write_text(ENDING)
    if kept:
        (tmp_path / "runs" / "script" / "checkpoints" / "step-00000004").mkdir(parents=True)
    words = [str(SAMESTEP), "run", "--nnodes", "2", "--no-warm", "--node-rank", "1", "script.py"]
    launcher = subprocess.Popen(words, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 40
        while not handles(launcher.pid, signal.SIGUSR1):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        launcher.send_signal(signal.Signals[f"SIG{signum}"])
        assert launcher.wait(timeout=40) == code
    finally:
        launcher.kill()
        launcher.wait()


def handles(pid: int, signum: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (signum - 1) & 1)


@pytest.mark.parametrize(("kept", "code"), [(True, 76), (False, 143)])
def test_launchers_that_are_stopped_while_they_wait_for_a_machine_are_to_run_again_where_a_checkpoint_is(
    tmp_path: Path, kept: bool, code: int
) -> None:
    (tmp_path / "script.py").write_text(ENDING)
    checkpoint = tmp_path / "runs" / "script" / "checkpoints" / "step-00000004"
    if kept:
        checkpoint.mkdir(parents=True)
    words = [str(SAMESTEP), "run", "--nnodes", "3", "--no-warm", "--no-report", "--node-rank"]
    started: dict[str, Any] = {"cwd": tmp_path, "text": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    head: Any = subprocess.Popen([*words, "0", "script.py"], **started)
    other: Any = None
    try:
        until(head, "1 of 3 machines are here")
        other = subprocess.Popen([*words, "1", "script.py"], **started)
        deadline = time.monotonic() + 40
        while not connected(other.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        other.terminate()
        assert other.wait(timeout=40) == code, other.stderr.read()
        head.terminate()
        assert head.wait(timeout=40) == code, head.stderr.read()
    finally:
        for launcher in filter(None, (head, other)):
            launcher.kill()
            launcher.wait()
            launcher.stderr.close()


def until(launcher: Any, words: str) -> None:
    """Read what it says up to these words."""
    for line in launcher.stderr:
        if words in line:
            return
    raise AssertionError(f"it never said {words!r}")


def connected(pid: int) -> bool:
    """Whether it has a connection to another launcher."""
    return any(found.status == psutil.CONN_ESTABLISHED for found in psutil.Process(pid).net_connections("tcp"))
