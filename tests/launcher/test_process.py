"""One rank's life, where the moment is unlucky."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from samestep.launcher.plan import Command
from samestep.launcher.supervise.process import Worker

from .conftest import WORKERS, gone


def test_a_rank_that_leads_no_process_group_yet_is_killed_all_the_same():
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # in the group of this process
    try:
        worker = Worker(Command(0, 0, (), {}, (), Path("log"), Path("error")), rank.pid, {})
        worker.kill()
        assert rank.wait(30) == -signal.SIGKILL
    finally:
        rank.kill()
        rank.wait()


@pytest.mark.processes
def test_what_a_shell_had_started_before_it_became_the_launcher_outlives_a_failed_rank(samestep):
    helper = "sh -c 'sleep 3600 & echo $! > below.txt; wait' > helper.log 2>&1 & echo $! > helper.txt; "
    words = [sys.executable, "-m", "samestep.launcher", "run", str(WORKERS / "actor.py"), "0=spawn,detach,exit:3"]
    until = "while [ ! -s below.txt ]; do :; done; "
    script = helper + until + "exec " + shlex.join(words)
    ended = subprocess.run(["sh", "-c", script], cwd=samestep.cwd, env=samestep.environ(), capture_output=True)
    kept = [int((samestep.cwd / name).read_text()) for name in ("below.txt", "helper.txt")]
    try:
        assert ended.returncode == 1, ended.stderr
        assert not any(map(gone, kept))
        assert all(gone(int(path.read_text())) for path in samestep.cwd.glob("*-0.pid"))
    finally:
        for pid in kept:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
