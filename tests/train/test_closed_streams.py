"""A recipe that closes its standard streams, or puts something else there, trains like any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]
RECIPE = """\
import sys
from dataclasses import dataclass
import torch
from torch import nn
from torch.utils.data import TensorDataset
from samestep.train import Components, TrainConfig, supervised, train

class Tee:
    def write(self, text): open("teed", "a").write(text)
    def flush(self): pass

{above}

def build(config):
    {inside}
    x = torch.randn(64, 6)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return Components(model=model, loss=supervised(nn.MSELoss()), optimizer=optimizer, train_data=data)

if __name__ == "__main__":
    train(build)
"""
DEEDS = [f"sys.{name}{deed}" for name in ("stdout", "stderr") for deed in (".close()", " = None")]


def _recipe(folder: Path, **parts: str) -> Path:
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(**({"above": "", "inside": ""} | parts)))
    return path


@pytest.mark.parametrize("where", ["above", "inside"])
@pytest.mark.parametrize("deed", [*DEEDS, "sys.stdin = sys.stdout = sys.stderr = None", "import os; os.close(1)"])
def test_a_stream_that_the_recipe_closes_or_takes_away_stops_nothing(
    start: Any, tmp_path: Path, where: str, deed: str
) -> None:
    ended = start(_recipe(tmp_path, **{where: deed}), "--run-dir", "run")
    assert ended.codes == [0], ended.stderrs
    assert ended.events("run_finished")
    assert "Traceback" not in ended.stderrs


def test_an_object_that_only_takes_text_gets_the_lines(start: Any, tmp_path: Path) -> None:
    ended = start(_recipe(tmp_path, above="sys.stdout = Tee()"), "--run-dir", "run")
    assert ended.codes == [0], ended.stderrs
    assert "Finished Training: 2 steps" in (ended.cwd / "teed").read_text()


def test_an_exception_after_stdout_was_closed_is_told_as_ever(start: Any, tmp_path: Path) -> None:
    ended = start(_recipe(tmp_path, inside='sys.stdout.close(); raise ValueError("boom")'), "--run-dir", "run")
    assert ended.codes == [1]
    assert ended.stderr.endswith("ValueError: boom\n")


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_program_that_is_started_without_streams_trains(tmp_path: Path, closed: str) -> None:
    _recipe(tmp_path)
    line = f"{sys.executable} recipe.py --run-dir run {closed}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "run" / "weights.safetensors").exists()
