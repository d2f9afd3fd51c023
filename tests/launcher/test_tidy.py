"""A command that starts runs takes them with it when it is asked to end."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from samestep.launcher.chaos.trial import left_in

from .conftest import wait_until

RECIPE = """
import os, time
from pathlib import Path

def late():
    from samestep.train import train

part = Path(f"part-{os.environ['RANK']}")
part.write_text(str(os.getpid()))
part.rename(f"waiting-{os.environ['RANK']}.pid")
time.sleep(3600)
"""


VERIFY, CHAOS = ["verify", "--world-sizes", "2"], ["chaos", "--nproc-per-node", "2"]


def of(temporary):
    """Processes that were told where to put temporary files, as the command and all below it are."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR", "").startswith(str(temporary)):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.processes
@pytest.mark.parametrize(
    ("words", "signum"),
    [
        (VERIFY, signal.SIGTERM),
        pytest.param(VERIFY, signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(CHAOS, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(CHAOS, signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_all_runs_and_leaves_no_temporary_file(words, signum, samestep):
    (samestep.cwd / "recipe.py").write_text(RECIPE)
    temporary = samestep.cwd / "temporary"
    temporary.mkdir()
    command = samestep.start(*words, "recipe.py", env={"TMPDIR": str(temporary)})
    wait_until(lambda: len(list(samestep.cwd.glob("waiting-*.pid"))) == 2, "both ranks wait")
    os.kill(command.pid, signum)
    ended = samestep.finish(command, time.monotonic())
    assert (ended.code, ended.stdout) == (143, "")
    wait_until(lambda: not of(temporary), "nothing of the run lives", 2.0)
    assert left_in(temporary) == set()
    assert "Traceback" not in ended.stderr
