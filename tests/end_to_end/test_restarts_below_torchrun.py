"""torchrun starts killed ranks again in one store: they meet each time, and end in the bits of the undisturbed run."""

import subprocess

import pytest

from .conftest import command, environment

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(240)]
RESTARTS = 4
RECIPE = """
import os, signal
import torch
from torch import nn
from torch.utils.data import TensorDataset
from samestep.train import Components, supervised, train

def build(config):
    x = torch.randn(640, 4)
    model = nn.Linear(4, 1)
    error, steps = supervised(nn.MSELoss()), []

    def loss(model, batch):
        steps.append(0)
        if len(steps) == 4 and "FAULTS" in os.environ and os.environ["RANK"] == "1":
            if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < int(os.environ["FAULTS"]):
                os.kill(os.getpid(), signal.SIGKILL)
        return error(model, batch)

    return Components(model=model, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                      train_data=TensorDataset(x, x.sum(1, keepdim=True)))

train(build)
"""


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_rank_killed_in_every_start_costs_as_many_restarts_and_no_bit(launcher, start, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    flags = ("--shards", "2", "--checkpoint-every", "2")
    undisturbed = start("python", 1, str(recipe), *flags)
    argv = command(launcher, 2, recipe)
    argv.insert(argv.index(str(recipe)), f"--max_restarts={RESTARTS}")
    path = tmp_path / "killed"
    done = subprocess.run(
        [*argv, *flags, "--run-dir", str(path)],
        env=environment() | {"FAULTS": str(RESTARTS)},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert type(undisturbed)(0, "", "", path).digest == undisturbed.digest
    assert type(undisturbed)(0, "", "", path).of("run_finished")[-1]["restarts"] == RESTARTS
