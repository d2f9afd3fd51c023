"""Two launchers of one run on this machine, with ranks that need no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def test_a_machine_that_is_asked_to_stop_and_leaves_at_once_is_done_without(tmp_path):
    """The head's rank takes its time to end: the other launcher is gone when the head comes to count."""
    (tmp_path / "script.py").write_text(SCRIPT)
    theirs = ("SAMESTEP_", "PET_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    launchers = []
    for node in (0, 1):
        words = [SAMESTEP, "run", "--nnodes", "1:2", "--node-rank", str(node), "--rdzv-conf", "last_call_timeout=30"]
        with (tmp_path / f"node-{node}").open("w") as output:
            launchers.append(
                subprocess.Popen([*words, "script.py"], cwd=tmp_path, env=environ, stdout=output, stderr=output)
            )
    try:
        until = time.monotonic() + 40
        while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < until, (tmp_path / "node-0").read_text()
            time.sleep(0.02)
        launchers[1].send_signal(signal.SIGTERM)
        launchers[1].send_signal(signal.SIGINT)  # once more: at once
        codes = [launcher.wait(timeout=40) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.wait()
    assert codes[0] == 0, (tmp_path / "node-0").read_text()
    assert "leaves" in (tmp_path / "node-0").read_text()
