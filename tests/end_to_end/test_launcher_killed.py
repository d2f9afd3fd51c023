"""P5: `kill -9` of the launcher at any moment leaves no process, no port, and a run that goes on."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from samestep.launcher.chaos.trial import left_in

pytestmark = [pytest.mark.processes, pytest.mark.alone]
FLAGS = ("--epochs", "1000", "--checkpoint-every", "20", "--num-workers", "1", "--log-every", "10")


def moments(count):
    """Seconds after the start, from 0 to 6."""
    choose = random.Random(count)
    return [6 * (index + choose.random()) / count for index in range(count)]


def lives(pid):
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def of_the_run(run_dir):
    """Processes that were started with the run's directory in their arguments or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join([*process.cmdline(), *process.environ().values()])
        except psutil.Error:
            continue
        if str(run_dir) in words and process.pid != os.getpid() and lives(process.pid):
            found.append(process.pid)
    return found


def listening(pids):
    ports = set()
    for pid in pids:
        try:
            connections = psutil.Process(pid).net_connections("tcp")
        except psutil.Error:
            continue
        ports |= {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}
    return ports


def taken():
    connections = psutil.net_connections("tcp")
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN and c.laddr}


def in_shared_memory():
    return {path.name for path in Path("/dev/shm").iterdir()}  # noqa: S108 (only listed)


def shared(pids, before):
    """Names in shared memory that tell of a process of the run, and not of one that had its number before."""
    own = {str(pid) for pid in pids}
    return [name for name in in_shared_memory() - before if own & set(re.findall(r"\d+", name))]


def wait_until_gone(pids, ports, run_dir, before):
    end = time.monotonic() + 2
    while any(map(lives, pids)) or of_the_run(run_dir) or ports & taken() or shared(pids, before):
        left = [pid for pid in pids if lives(pid)], of_the_run(run_dir), ports & taken(), shared(pids, before)
        assert time.monotonic() < end, f"still there: {left}"
        psutil.wait_procs([process for process in psutil.process_iter() if process.pid in pids], timeout=0.05)


def kill_at(command, moment, run_dir, temporary):
    environ, before = os.environ | {"TMPDIR": str(temporary)}, in_shared_memory()
    launcher = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            launcher.wait(moment)
        below = [process.pid for process in psutil.Process(launcher.pid).children(recursive=True)]
        ports = listening(below)
    finally:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
    assert launcher.stderr is not None
    launcher.stderr.close()
    wait_until_gone(below, ports, run_dir, before)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "count", [3, pytest.param(int(os.environ.get("SAMESTEP_KILLS", "100")), marks=pytest.mark.slow)]
)
def test_nothing_outlives_a_launcher_killed_at_any_moment(count, start, start_command, tmp_path, monkeypatch):
    """SAMESTEP_KILLS says how many."""
    run_dir = tmp_path / "run"
    flags = [*FLAGS, "--run-dir", str(run_dir)]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for moment in moments(count):
        kill_at([*start_command("samestep", 2, "seed_linear.py"), *flags], moment, run_dir, temporary)
    reached = max([0, *(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-????????"))])
    assert reached, "some of them got so far as to save"
    monkeypatch.setenv("TMPDIR", str(temporary))
    after = start("samestep", 2, "seed_linear.py", *FLAGS, "--max-steps", str(reached + 5))
    assert [step for step, _ in after.losses] == list(range(1, reached + 6))
    # of a killed rank's data loading processes, a folder stays until the next start
    assert left_in(temporary) == set()
    assert not list(Path(after.run_dir).rglob("*.tmp*"))
    assert not list(Path(after.run_dir).rglob(".probe*"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shell", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_ranks_do_not_outlive_a_launcher_of_others_and_leave_the_folder_free(launcher, shell, start_command, tmp_path):
    run_dir = tmp_path / "run"
    command = [*start_command(launcher, 2, "seed_linear.py"), *FLAGS, "--run-dir", str(run_dir)]
    if shell:  # two processes between a rank and its launcher
        recipe = next(index for index, word in enumerate(command) if word.endswith("seed_linear.py"))
        inner = f"({shlex.join([sys.executable, *command[recipe:]])}; true); true"
        command[recipe:] = ["--no_python", "bash", "-c", inner]
    before = in_shared_memory()
    agent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 40
        while not list(run_dir.glob("checkpoints/step-????????")):
            assert time.monotonic() < end
            with pytest.raises(subprocess.TimeoutExpired):
                agent.wait(0.05)
        below = [process.pid for process in psutil.Process(agent.pid).children(recursive=True)]
    finally:
        agent.kill()
        agent.wait()
    wait_until_gone(below, listening(below), run_dir, before)
