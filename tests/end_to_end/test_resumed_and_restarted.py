"""A launcher restarts ranks with the flags that they had: where the run began is not where it goes on."""

from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]
FLAGS = ("--checkpoint-every", "2", "--shards", "2", "--keep-checkpoints", "9", "--global-batch-size", "16")
RECIPE = """
import os, signal
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import TensorDataset
from samestep.train import Components, supervised, train

RUN_DIR = Path("{run_dir}")


def loss(model, batch):
    if (RUN_DIR / "checkpoints" / "step-00000008").exists() and not Path("{mark}").exists():
        Path("{mark}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return supervised(nn.MSELoss())(model, batch)


def build(config):
    x = torch.arange(1600.0).reshape(160, 10) / 1600
    model = nn.Linear(10, 1)
    return Components(
        model=model, loss=loss, optimizer=torch.optim.Adam(model.parameters()),
        train_data=TensorDataset(x.repeat(2, 1), torch.ones(320, 1)),
    )


if __name__ == "__main__":
    train(build)
"""


@pytest.mark.parametrize(
    ("launcher", "begins"),
    [
        pytest.param("samestep", "older", marks=pytest.mark.slow),
        pytest.param("samestep", "never", marks=pytest.mark.slow),
        pytest.param("torchrun", "elsewhere", marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_costs_no_checkpoint_that_was_made_since(start, tmp_path, launcher, begins, monkeypatch):
    monkeypatch.setenv("PET_MAX_RESTARTS", "1")
    recipe, mark, run_dir = tmp_path / "recipe.py", tmp_path / "mark", tmp_path / "run"
    recipe.write_text(RECIPE.format(run_dir=run_dir, mark=mark))
    mark.touch()
    whole = start("python", 1, str(recipe), *FLAGS, run_dir="whole")
    first = whole.run_dir / "checkpoints" / "step-00000004"
    flags: tuple[object, ...] = ("--resume", "never")
    if begins == "older":
        start("python", 1, str(recipe), *FLAGS, "--max-steps", "6", run_dir="run")
        flags = ("--resume", Path("run") / "checkpoints" / "step-00000004")
    elif begins == "elsewhere":
        flags = ("--resume", first)
    mark.unlink()
    ended = start(launcher, 1, str(recipe), *FLAGS, *map(str, flags))
    assert ended.digest == whole.digest
    assert mark.exists()
    came_back = ended.of("resumed")[-1]
    assert came_back["step"] >= 8
    assert not list((run_dir / "checkpoints").glob("step-00000008.superseded"))
