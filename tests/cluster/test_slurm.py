"""A real Slurm of two nodes: every way a job can end there ends in the reference digest or a documented code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.conftest import DIGITS, PYTHON, ROOT, SAMESTEP, call, environment
from tests.end_to_end.conftest import Outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LONG = ["--shards", "2", "--threads", "1", "--epochs", "40", "--checkpoint-every", "20"]
SCRIPT = ROOT / "scripts" / "slurm-test-cluster"


@dataclass(frozen=True)
class Slurm:
    folder: Path

    def __call__(self, *words: object) -> str:
        env = environment(SLURM_CONF=str(self.folder / "slurm.conf"))
        return subprocess.run(
            list(map(str, words)), env=env, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def submit(self, cwd: Path, *options: object, flags: list[str] = LONG) -> str:
        ended = call(
            [SAMESTEP, "submit", "slurm", DIGITS, *options, "--", *flags, "--run-dir", "run"],
            cwd,
            SLURM_CONF=str(self.folder / "slurm.conf"),
        )
        assert ended.returncode == 0, ended.stderr
        return re.search(r"job (\d+)", ended.stdout)[1]  # type: ignore[index]

    def about(self, job: str, name: str) -> str:
        return re.search(rf"\b{name}=(\S+)", self("scontrol", "--oneliner", "show", "job", job))[1]  # type: ignore[index]

    def wait(self, job: str, *states: str, seconds: float = 300) -> str:
        until(lambda: self.about(job, "JobState") in states, f"job {job} to be {states}", seconds)
        return self.about(job, "JobState")

    def start_now(self, job: str) -> None:
        """A requeued job has to wait for two minutes, unless somebody says otherwise."""
        until(lambda: self.about(job, "JobState") == "PENDING", f"job {job} to be queued again")
        self("scontrol", "update", f"JobId={job}", "StartTime=now+2")


def until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if os.geteuid() != 0:
        pytest.skip("a Slurm of our own needs root")
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, timeout=600)
    if started.returncode == 2:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    yield Slurm(folder)
    subprocess.run([SCRIPT, "stop", folder], timeout=60, check=True)


@pytest.fixture(scope="session")
def long_reference(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    outcome = call([PYTHON, DIGITS, *LONG, "--run-dir", "run"], tmp_path_factory.mktemp("long"), seconds=300)
    assert outcome.returncode == 0, outcome.stderr
    return outcome


def run_of(cwd: Path) -> Outcome:
    logs = sorted((cwd / "run" / "logs").glob("slurm-*.log"))
    return Outcome(0, "".join(log.read_text() for log in logs), "", cwd / "run")


def has_checkpoint(cwd: Path, beyond: int = 0) -> Callable[[], bool]:
    folder = cwd / "run" / "checkpoints"
    return lambda: any(int(path.name[5:]) > beyond for path in folder.glob("step-*") if path.name[5:].isdecimal())


def check_whole(outcome: Outcome, reference: Outcome) -> None:
    assert outcome.of("run_finished"), outcome.stdout[-3000:]
    assert outcome.digest == reference.digest, outcome.stdout[-3000:]
    assert outcome.losses == reference.losses


def test_srun_of_the_recipe_alone_finds_its_ranks(slurm, reference, tmp_path):
    flags = ["--shards", "2", "--epochs", "1", "--threads", "1", "--run-dir", "run"]
    conf = str(slurm.folder / "slurm.conf")
    ended = call(["srun", "-N2", "-n2", PYTHON, DIGITS, *flags], tmp_path, SLURM_CONF=conf)
    assert ended.returncode == 0, ended.stderr
    assert ended.digest == reference.digest
    assert {rank["local_rank"] for rank in ended.of("run_started")[0]["ranks"]} == {0}
    assert "2 ranks on 2 machines, as told by Slurm (SLURM_PROCID)" in ended.stderr


def test_a_job_on_two_nodes_finishes_and_is_followed(slurm, long_reference, tmp_path):
    ended = call(
        [SAMESTEP, "submit", "slurm", DIGITS, "--nodes", 2, "--follow", "--", *LONG, "--run-dir", "run"],
        tmp_path,
        seconds=300,
        SLURM_CONF=str(slurm.folder / "slurm.conf"),
    )
    assert ended.returncode == 0, ended.stderr
    assert "completed" in ended.stderr
    assert ended.of("run_started")[0]["world_size"] == 2
    check_whole(ended, long_reference)


def test_a_requeued_job_goes_on_where_it_was(slurm, long_reference, tmp_path):
    job = slurm.submit(tmp_path, "--nodes", 2)
    until(has_checkpoint(tmp_path), "a checkpoint")
    slurm("scontrol", "requeue", job)
    slurm.start_now(job)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    outcome = run_of(tmp_path)
    assert len(outcome.of("resumed")) == 1
    check_whole(outcome, long_reference)


def test_a_node_that_goes_down_is_done_without(slurm, long_reference, tmp_path):
    job = slurm.submit(tmp_path, "--nodes", "1-2")
    until(has_checkpoint(tmp_path), "a checkpoint")
    os.kill(int((slurm.folder / "slurmd-n2.pid").read_text()), signal.SIGKILL)  # it would report itself well again
    slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    try:
        slurm.start_now(job)
        assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    finally:
        subprocess.run([SCRIPT, "node", slurm.folder, "n2"], check=True, timeout=60)
        until(lambda: "n2" in slurm("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split(), "n2 to come back")
    outcome = run_of(tmp_path)
    worlds = [event["world_size"] for event in outcome.events if event["event"] in ("run_started", "restarted")]
    assert (worlds[0], worlds[-1]) == (2, 1)
    check_whole(outcome, long_reference)


def test_a_cancelled_job_leaves_a_run_that_goes_on(slurm, long_reference, tmp_path):
    job = slurm.submit(tmp_path, "--nodes", 2)
    until(has_checkpoint(tmp_path), "a checkpoint")
    slurm("scancel", job)
    slurm.wait(job, "CANCELLED")
    until(lambda: not subprocess.run(["pgrep", "-f", f"{tmp_path}/"], capture_output=True).stdout, "all ranks to end")
    again = slurm.submit(tmp_path, "--nodes", 1)
    assert slurm.wait(again, "COMPLETED", "FAILED") == "COMPLETED"
    check_whole(run_of(tmp_path), long_reference)


def test_a_job_at_its_time_limit_saves_is_requeued_and_ends_in_the_same_bits(slurm, tmp_path):
    """Limits have a resolution of a minute: the signal comes early, and the job ends long before the limit."""
    flags = [word if word != "40" else "100000" for word in LONG] + ["--max-steps", "1000000"]
    job = slurm.submit(tmp_path, "--nodes", 2, "--time", 3, "--signal-seconds", 120, flags=flags)
    until(lambda: slurm.about(job, "Restarts") == "1", "the job to be requeued", 240)
    log = run_of(tmp_path).stdout
    slurm("scancel", job)
    slurm.wait(job, "CANCELLED")
    assert re.search(r"exit code 7[56], asked to save: job \d+ is started again", log), log[-3000:]
    outcome = run_of(tmp_path)
    last = outcome.losses[-1][0]
    assert [step for step, _ in outcome.losses] == list(range(1, last + 1))
    (tmp_path / "alone").mkdir()
    alone = call([PYTHON, DIGITS, *flags[:-1], last, "--run-dir", "run"], tmp_path / "alone", seconds=300)
    assert alone.losses == outcome.losses
