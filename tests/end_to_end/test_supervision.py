"""What the launcher notices and does on a bad day: ranks and helpers that are killed from outside, an old kernel."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]
RECIPE = """
import os, signal, time
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import TensorDataset
from samestep.train import Components, supervised, train

calls = 0


def wait_for(name):
    Path(f"{name}-{os.environ['RANK']}.tmp").write_text(f"{os.getpid()} {os.getppid()}")
    Path(f"{name}-{os.environ['RANK']}.tmp").rename(f"{name}-{os.environ['RANK']}")
    while not Path(f"go-{name}").exists():
        time.sleep(0.01)


def loss(model, batch):
    global calls
    calls += 1
    wanted = os.environ.get(f"IN_STEP_{calls}", "")
    if wanted == "wait" and os.environ["SAMESTEP_GENERATION"] == "0":
        wait_for(f"step-{calls}")
    if wanted == "wait later" and os.environ["SAMESTEP_GENERATION"] == "1":
        wait_for(f"later-{calls}")
    if wanted == f"fail {os.environ['RANK']}" and os.environ["SAMESTEP_GENERATION"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return supervised(nn.MSELoss())(model, batch)


def build(config):
    model = nn.Linear(10, 1)
    data = TensorDataset(torch.arange(960.0).reshape(96, 10) / 960, torch.ones(96, 1))
    return Components(model=model, loss=loss, optimizer=torch.optim.Adam(model.parameters()), train_data=data)


if __name__ == "__main__":
    train(build)
"""
WITHOUT = """
import fcntl, os, sys
from samestep.launcher import liveness
for module in (os, fcntl):
    for name in {names}:
        vars(module).pop(name, None)
if "prctl" in {names}:
    liveness.prctl = None
from samestep.launcher.cli import main
sys.exit(main())
"""
OLD_KERNEL = ("pidfd_open",)
NOT_LINUX = ("pidfd_open", "waitid", "memfd_create", "sched_getaffinity", "F_SETSIG", "prctl")  # as macOS
RUN = ["run", "--nproc-per-node", "2"]
TRAIN = ["recipe.py", "--run-dir", "run", "--global-batch-size", "16", "--epochs", "2"]


class Running:
    """A launcher that has been started in a folder with the recipe."""

    def __init__(self, folder: Path, *options: str, program: tuple[str, ...] = ("-m", "samestep.launcher"), **steps):
        (folder / "recipe.py").write_text(RECIPE)
        self.folder = folder
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("SAMESTEP_", "PET_"))}
        self.process = subprocess.Popen(
            [sys.executable, *program, *RUN, *options, *TRAIN],
            cwd=folder,
            env=environ | {"ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"} | steps,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def waiting(self, name: str, rank: int) -> int:
        """Process id of a rank that has said that it waits for `go`."""
        end = time.monotonic() + 60
        while not (self.folder / f"{name}-{rank}").exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, f"rank {rank} never got to {name}"
            time.sleep(0.01)
        return int((self.folder / f"{name}-{rank}").read_text().split()[0])

    def go(self, name: str) -> None:
        (self.folder / f"go-{name}").touch()

    def ended(self) -> str:
        said, _ = self.process.communicate(timeout=90)
        return said

    def fork_servers(self) -> list[int]:
        """Children of the launcher that hold its end of the protocol; ranks have another command line or parent."""
        children = psutil.Process(self.process.pid).children()
        ranks = {int(path.read_text().split()[0]) for path in self.folder.glob("*-[01]")}
        return [child.pid for child in children if child.pid not in ranks]


@pytest.fixture
def running(tmp_path):
    started = []

    def start(*options, **more):
        started.append(Running(tmp_path, *options, **more))
        return started[-1]

    yield start
    for run in started:
        with contextlib.suppress(ProcessLookupError):
            run.process.kill()
        run.process.communicate()


@pytest.mark.parametrize("hang_timeout", ["off", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_rank_killed_from_outside_is_placed_by_step_and_phase(hang_timeout, running):
    run = running("--max-restarts", "0", "--hang-timeout", hang_timeout, IN_STEP_7="wait")
    os.kill(run.waiting("step-7", 1), signal.SIGKILL)
    said = run.ended()
    assert "samestep: rank 1 failed: killed by SIGKILL (signal 9)" in said
    assert "\n  step 7, phase forward\n" in said
    assert run.process.returncode == 1


@pytest.mark.slow
def test_ranks_outlive_their_fork_server_and_the_next_start_gets_another_one(running):
    run = running(IN_STEP_3="wait", IN_STEP_5="fail 1", IN_STEP_2="wait later")
    for rank in (0, 1):
        run.waiting("step-3", rank)
    (server,) = run.fork_servers()
    os.kill(server, signal.SIGKILL)
    run.go("step-3")  # steps 3 and 4 are done without it
    for rank in (0, 1):
        run.waiting("later-2", rank)
    (another,) = run.fork_servers()
    assert another != server
    assert psutil.Process(another).status() != psutil.STATUS_ZOMBIE
    run.go("later-2")
    said = run.ended()
    assert run.process.returncode == 0, said
    assert said.count("restart 1 of 3") == 1
    assert "not forked" not in said


@pytest.mark.parametrize(
    "names", [OLD_KERNEL, pytest.param(NOT_LINUX, marks=pytest.mark.slow)], ids=["old kernel", "not Linux"]
)
@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param("orderly", marks=pytest.mark.slow)])
def test_exits_are_seen_where_the_kernel_offers_less(how, names, running, tmp_path):
    (tmp_path / "less.py").write_text(WITHOUT.format(names=names))
    run = running("--max-restarts", "0", program=("less.py",), IN_STEP_2="wait")
    pids = [run.waiting("step-2", rank) for rank in (0, 1)]
    assert not [fd for fd in Path(f"/proc/{run.process.pid}/fd").iterdir() if "pidfd" in str(fd.readlink())]
    if how == "orderly":
        run.go("step-2")
    else:
        os.kill(pids[1], how)
    said = run.ended()
    assert "Traceback" not in said
    assert run.process.returncode == (0 if how == "orderly" else 1), said
    assert ("rank 1 failed: killed by SIGKILL" in said) == (how != "orderly")
