"""Ctrl-C before the first step: a person changed their mind, which is no error of the recipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]
RECIPE = """\
import os, time
from pathlib import Path
from samestep.train import train

def build(config):
    Path(f"builds-{os.environ.get('RANK', 0)}").touch()
    time.sleep(600)

if __name__ == "__main__":
    train(build)
"""
BIN = Path(sys.executable).parent
TWO = {
    "torchrun": ["torchrun", "--nproc-per-node", "2"],
    "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2"],
}


def _interrupted(folder: Path, words: list[str], ranks: int) -> tuple[int, str]:
    """Exit status and stderr of a program that gets what a terminal sends to all of its processes while they build."""
    (folder / "recipe.py").write_text(RECIPE)
    command = [str(BIN / words[0]), *words[1:], "recipe.py", "--run-dir", "run"]
    theirs = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SAMESTEP_", "TORCHELASTIC_", "ACCELERATE_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    program = subprocess.Popen(
        command, cwd=folder, env=environ, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 120
    while len(list(folder.glob("builds-*"))) < ranks:
        assert time.monotonic() < end
        assert program.poll() is None
        time.sleep(0.02)
    os.killpg(program.pid, signal.SIGINT)
    said = program.communicate(timeout=60)[1]
    with pytest.raises(ProcessLookupError):
        os.killpg(program.pid, 0)  # nobody is left
    return program.returncode, said


def test_ctrl_c_in_build_is_one_line_and_130(tmp_path: Path) -> None:
    code, said = _interrupted(tmp_path, ["python"], 1)
    assert (code, said) == (130, "samestep: stopped by the operator without saving; exit code 130\n")
    assert not list((tmp_path / "run" / "errors").iterdir())


@pytest.mark.parametrize("launcher", TWO)
def test_ranks_below_another_launcher_say_it_once_and_leave_no_traceback(tmp_path: Path, launcher: str) -> None:
    code, said = _interrupted(tmp_path, TWO[launcher], 2)
    assert code == 1  # whatever a rank's own is: SignalException, with the launcher's traceback
    assert said.count("samestep: stopped by the operator without saving; exit code 130") == 1
    assert "in build" not in said
    assert "KeyboardInterrupt" not in said
