"""A scheduler or a person asks a run to stop: it saves the step it is in, and goes on from there in the same bits."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from .conftest import environment

slow = pytest.mark.slow
pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]
FLAGS = (
    "--epochs",
    "3",
    "--max-steps",
    "60",
    "--global-batch-size",
    "32",
    "--shards",
    "2",
    "--log-every",
    "7",
    "--eval-every",
    "20",
)
RECIPE = """
import os, signal, time
from itertools import count
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from samestep.train import Components, finish, supervised, train

RANK, MODE, HERE = os.environ.get("RANK", "0"), os.environ.get("MODE", ""), Path(__file__).parent
PACE = float(os.environ.get("PACE", "0"))
calls = count(1)
if MODE == "closing":
    export = finish.export_weights
    finish.export_weights = lambda *what: (os.kill(os.getpid(), signal.SIGTERM), export(*what))


class Samples(Dataset):
    def __len__(self):
        return 32 * 24

    def __getitem__(self, index):
        time.sleep(PACE / 32)
        x = torch.arange(10.0) + index / 700
        return x.sin(), x.cos()[:1] + torch.randn(1)


def mark(name):
    (HERE / "marks" / f"{name}-{RANK}").touch()


def loss(model, batch):
    call = next(calls) if model.training else 0
    mark(f"step-{call}" if call else "evaluation")
    if MODE == f"hang-{RANK}" and call == 9:
        time.sleep(600)
    if MODE == f"die-{RANK}" and call == 9:
        while not (HERE / "die").exists():
            time.sleep(0.01)
        os._exit(9)
    time.sleep(PACE if model.training else PACE / 4)
    return supervised(nn.MSELoss())(model, batch)


def build(config):
    mark("build")
    if MODE == "build":
        time.sleep(600)
    model = nn.Sequential(nn.Linear(10, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    return Components(
        model=model, loss=loss, optimizer=torch.optim.Adam(model.parameters()), train_data=Samples(),
        eval_data=TensorDataset(torch.ones(64, 10), torch.ones(64, 1)),
    )


if __name__ == "__main__":
    train(build)
"""


class Job:
    """A recipe whose ranks leave marks."""

    def __init__(self, cwd, start_command, rank_server):
        self.cwd, self.start_command, self.rank_server = cwd, start_command, rank_server
        self.recipe = cwd / "marking.py"
        self.recipe.write_text(RECIPE)
        (cwd / "marks").mkdir()
        self.begun = []

    def begin(self, launcher="samestep", world_size=2, *flags, mode="", pace=0.02, options=()):
        """Start it, and return at once."""
        words = self.start_command(launcher, world_size, self.recipe, *FLAGS, *flags, "--run-dir", "run")
        words[2:2] = options
        process = subprocess.Popen(
            words, cwd=self.cwd, env={**environment(), "MODE": mode, "PACE": str(pace)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.begun.append(process)
        return process

    def until(self, mark, process):
        """Return once a rank has been there."""
        end = time.monotonic() + 90
        while not (self.cwd / "marks" / mark).exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end, f"no {mark}"
            time.sleep(0.005)

    def end(self, process, status):
        """All that it said, once it has ended with `status`."""
        out, err = process.communicate(timeout=90)
        assert process.returncode == status, f"{process.returncode}\n{out}\n{err}"
        if Path(process.args[0]).name not in ("torchrun", "accelerate"):  # they end with a traceback of their own
            assert "Traceback" not in err, err
        return out + err

    def again(self, ranks=2):
        """Go on to the end."""
        ended = self.rank_server(self.cwd, self.recipe, *FLAGS, "--run-dir", "run", ranks=ranks)
        assert not any(ended.codes), ended.stderrs
        return ended

    def close(self):
        for process in self.begun:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()
            process.stdout.close()
            process.stderr.close()


@pytest.fixture
def job(start_command, rank_server, tmp_path):
    job = Job(tmp_path, start_command, rank_server)
    yield job
    job.close()


@pytest.fixture(scope="module")
def reference(rank_server, tmp_path_factory):
    return Job(tmp_path_factory.mktemp("reference"), None, rank_server).again(1)


def assert_no_step_lost(outcome, reference):
    assert outcome.bits == reference.bits
    assert [event["step"] for event in outcome.events("step")] == list(range(1, 61))
    assert [event["step"] for event in outcome.events("eval")] == [20, 40, 60]


@pytest.mark.parametrize(
    ("launcher", "world_size", "signum", "status"),
    [
        ("samestep", 2, signal.SIGTERM, 75),
        pytest.param("samestep", 2, signal.SIGUSR1, 75, marks=slow),
        pytest.param("samestep", 2, signal.SIGINT, 75, marks=slow),
        pytest.param("python", 1, signal.SIGTERM, 75, marks=slow),
        pytest.param("python", 1, signal.SIGINT, 75, marks=slow),
        pytest.param("torchrun", 2, signal.SIGTERM, 1, marks=slow),
        pytest.param("accelerate", 2, signal.SIGTERM, 1, marks=slow),
    ],
)
def test_stopped_in_mid_epoch_it_saves_the_step_and_goes_on_in_the_same_bits(
    job, reference, launcher, world_size, signum, status
):
    process = job.begin(launcher, world_size, "--num-workers", "2")
    job.until("step-9-0", process)
    process.send_signal(signum)
    said = job.end(process, status)
    outcome = job.again(world_size)
    (stopped,) = outcome.events("preempted")
    assert stopped["step"] == stopped["checkpoint"] >= 9 * world_size // 2  # one call a shard
    assert f"Stopped by {stopped['signal']} after step {stopped['step']}: saved" in said
    if launcher == "samestep":
        assert "finishing the step and saving (once more: at once)" in said
        assert f"preempted, checkpoint saved, run again (step {stopped['step']}); exit code 75" in said
    assert_no_step_lost(outcome, reference)


def test_signals_to_the_whole_process_group_leave_data_workers_alone(job, reference):
    process = job.begin("python", 1, "--num-workers", "2")
    job.until("step-9-0", process)
    for _ in range(3):
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGUSR1)
    assert "DataLoader worker" not in job.end(process, 75)
    assert_no_step_lost(job.again(), reference)


@pytest.mark.slow
def test_asked_at_its_last_step_it_is_done(job, reference):
    process = job.begin("samestep", 2)
    job.until("step-60-0", process)
    process.terminate()
    process.wait(90)
    assert process.returncode in (0, 75)
    assert_no_step_lost(job.again(), reference)


@pytest.mark.slow
def test_asked_to_stop_while_the_weights_are_exported_a_run_comes_to_its_end(job, reference):
    job.end(job.begin("python", 1, mode="closing", pace=0), 0)
    assert (job.cwd / "run" / "weights.safetensors").exists()
    assert_no_step_lost(job.again(), reference)


@pytest.mark.slow
def test_asked_during_an_evaluation_it_finishes_that_too(job, reference):
    process = job.begin("samestep", 2)
    job.until("evaluation-0", process)
    process.terminate()
    job.end(process, 75)
    assert_no_step_lost(job.again(), reference)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=slow)])
def test_before_the_first_step_there_is_nothing_to_save(job, signum, status):
    process = job.begin("samestep", 2, mode="build")
    job.until("build-1", process)
    since = time.monotonic()
    process.send_signal(signum)
    assert f"stopped by the operator without saving; exit code {status}" in job.end(process, status)
    assert time.monotonic() - since < 20  # far below the grace time


def test_preempted_while_it_starts_a_resumed_run_is_to_be_run_again(job, reference):
    process = job.begin("samestep", 2)
    job.until("step-3-0", process)
    process.terminate()
    job.end(process, 75)
    (job.cwd / "marks" / "build-1").unlink()
    process = job.begin("samestep", 2, mode="build")
    job.until("build-1", process)
    process.terminate()
    assert "last periodic checkpoint kept, run again" in job.end(process, 76)
    assert_no_step_lost(job.again(), reference)


@pytest.mark.parametrize(
    ("rank", "flags", "status"),
    [
        (1, ("--checkpoint-every", "4"), 76),
        pytest.param(0, ("--checkpoint-every", "4"), 76, marks=slow),
        pytest.param(1, (), 143, marks=slow),
    ],
)
def test_a_rank_that_hangs_holds_nobody_beyond_the_grace_time(job, reference, rank, flags, status):
    process = job.begin("samestep", 2, *flags, mode=f"hang-{rank}", options=("--grace-seconds", "1.5"))
    job.until(f"step-9-{rank}", process)
    process.terminate()
    said = job.end(process, status)
    assert "last periodic checkpoint kept, run again (step 8)" in said or status == 143
    assert_no_step_lost(job.again(), reference)


@pytest.mark.slow
def test_a_rank_that_dies_meanwhile_leaves_the_last_checkpoint(job, reference):
    process = job.begin("samestep", 2, "--checkpoint-every", "4", mode="die-1")
    job.until("step-9-1", process)
    process.terminate()
    assert "finishing" in process.stderr.readline()
    (job.cwd / "die").touch()
    assert "last periodic checkpoint kept, run again (step 8); exit code 76" in job.end(process, 76)
    assert_no_step_lost(job.again(), reference)


def test_asked_twice_it_is_gone_at_once(job):
    process = job.begin("samestep", 2, "--checkpoint-every", "4", mode="hang-1")
    job.until("step-9-1", process)
    process.send_signal(signal.SIGINT)
    assert "once more: at once" in process.stderr.readline()
    since = time.monotonic()
    process.send_signal(signal.SIGINT)
    job.end(process, 130)
    assert time.monotonic() - since < 10  # of 25 s; a second on a quiet machine


@pytest.mark.slow
def test_without_a_launcher_the_second_ctrl_c_ends_it_too(job):
    process = job.begin("python", 1, mode="hang-0")
    job.until("step-9-0", process)
    process.send_signal(signal.SIGINT)
    assert "once more: at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    job.end(process, -signal.SIGINT)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(int(os.environ.get("SAMESTEP_PREEMPTIONS", "20"))))
def test_stopped_at_random_moments_no_step_is_ever_lost(job, reference, seed):
    """SAMESTEP_PREEMPTIONS says how many."""
    draw = random.Random(seed)
    process = job.begin("samestep", 2, "--num-workers", "2", pace=draw.choice([0.005, 0.02]))
    job.until(f"step-{draw.randint(1, 40)}-{draw.randint(0, 1)}", process)
    time.sleep(draw.uniform(0, 0.05))
    process.send_signal(draw.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]))
    job.end(process, 75)
    assert_no_step_lost(job.again(draw.choice([1, 2])), reference)
