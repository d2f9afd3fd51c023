"""P3: a rank dies, the others are restarted with it, and the run ends in the bits of the undisturbed one."""

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]
FLAGS = ("--max-steps", "12", "--checkpoint-every", "4", "--shards", "2", "--global-batch-size", "64")
RECIPE = """
import os, signal
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import TensorDataset
from samestep.launcher import lock
from samestep.train import Components, supervised, train

FAULT, RANK, MARK = "{fault}", os.environ.get("RANK", "0"), Path("{mark}")
calls = 0


def strike():
    if RANK == "{rank}" and (FAULT == "always" or not MARK.exists()):
        MARK.touch()
        if FAULT in ("raise", "always"):
            raise ValueError("struck")
        os.kill(os.getpid(), signal.SIGKILL)


def loss(model, batch):
    global calls
    calls += 1
    if "{step}" == str(calls):
        strike()
    return supervised(nn.MSELoss())(model, batch)


def build(config):
    if "{step}" == "save":
        lock.check = lambda *_: strike()
    x = torch.arange(640.0).reshape(64, 10) / 640
    model = nn.Linear(10, 1)
    return Components(
        model=model, loss=loss, optimizer=torch.optim.Adam(model.parameters()),
        train_data=TensorDataset(x.repeat(12, 1), torch.ones(64 * 12, 1)),
    )


if __name__ == "__main__":
    train(build)
"""


@pytest.fixture
def struck(start, tmp_path):
    """A run in which one rank is struck at a step, or `save`; of `fault` none nothing happens."""

    def run(fault, step="", rank=1, *, status=0, launcher="samestep", flags=(), world_size=2):
        name = f"{launcher}-{fault}-{step}"
        recipe = tmp_path / f"{name}.py"
        recipe.write_text(RECIPE.format(fault=fault, step=step, rank=rank, mark=tmp_path / f"{name}.mark"))
        return start(launcher, world_size, str(recipe), *FLAGS, *flags, run_dir=name, status=status)

    return run


@pytest.mark.slow
def test_every_way_to_start_ranks_gives_the_same_bits(struck, monkeypatch):
    outcomes = [struck("none"), struck("none", launcher="torchrun"), struck("none", launcher="python", world_size=1)]
    monkeypatch.setenv("PET_NO_WARM", "1")
    outcomes.append(struck("none", "programs"))
    assert len({outcome.digest for outcome in outcomes}) == 1
    assert len({tuple(outcome.losses) for outcome in outcomes}) == 1
    shared, alone = (outcomes[position].of("run_started")[0]["ranks"][1] for position in (0, -1))
    assert shared["resident_bytes"] > 0
    # forked ranks share what torch has loaded; programs of their own share its files alone
    assert shared["proportional_bytes"] < alone["proportional_bytes"]


@pytest.mark.parametrize(
    ("fault", "step", "rank"),
    [
        pytest.param("kill", 1, 1, marks=pytest.mark.slow),
        ("kill", 6, 0),
        pytest.param("kill", 12, 1, marks=pytest.mark.slow),
        pytest.param("kill", "save", 0, marks=pytest.mark.slow),
        pytest.param("raise", 6, 1, marks=pytest.mark.slow),
    ],
)
def test_struck_once_it_ends_in_the_bits_of_the_undisturbed_run(struck, fault, step, rank):
    reference, outcome = struck("none"), struck(fault, step, rank)
    assert outcome.digest == reference.digest
    assert outcome.losses == reference.losses
    assert [number for number, _ in outcome.losses] == list(range(1, 13))
    assert [event["generation"] for event in outcome.of("restarted")] == [1]
    assert outcome.of("run_finished")[-1]["restarts"] == 1
    (failed,) = outcome.of("worker_failed")
    assert failed["rank"] == rank
    assert "restart 1 of 3" in outcome.stderr


def test_struck_at_the_same_place_again_it_is_given_up(struck):
    outcome = struck("always", 2, status=77)
    assert outcome.stderr.count("; restart ") == 1
    assert "; no checkpoint was saved yet, so that its steps are trained again" in outcome.stderr
    assert "rank 1 failed: ValueError: struck" in outcome.stderr
    assert "exit code 77: no progress, do not run again" in outcome.stderr
    assert "same failure twice" in outcome.stderr


UNEQUAL = """
import torch
from torch import nn
from samestep.train import Components, supervised, train

class Unequal(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.zeros(2 + index), torch.zeros(1)

def build(config):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Components(model=model, loss=supervised(nn.MSELoss()), optimizer=optimizer, train_data=Unequal())

train(build)
"""


@pytest.mark.slow
def test_an_exception_that_passes_no_line_of_the_users_is_given_up_when_it_comes_again(start, tmp_path):
    (tmp_path / "unequal.py").write_text(UNEQUAL)
    words = ("--num-workers", "0", "--global-batch-size", "4", "--check", "never")
    outcome = start("samestep", 1, str(tmp_path / "unequal.py"), *words, status=77)
    assert outcome.stderr.count("; restart ") == 1
    assert "same failure twice" in outcome.stderr


@pytest.mark.parametrize("text", ["import no_such_module\n", pytest.param("def broken(:\n", marks=pytest.mark.slow)])
def test_what_can_not_be_imported_is_not_started_again(start, tmp_path, text):
    (tmp_path / "bad.py").write_text(f"from samestep.train import train\n{text}")
    outcome = start("samestep", 2, str(tmp_path / "bad.py"), status=1)
    assert "; restart " not in outcome.stderr
    assert "samestep/train" not in outcome.stderr
    assert "as_main" not in outcome.stderr
