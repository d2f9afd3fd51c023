"""Three hosts on a bridge: whatever breaks, the run goes on smaller or says "run again", and only one side commits."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.conftest import DIGITS, PYTHON, SAMESTEP, call
from tests.cluster.netns import Host, available, hosts, listening
from tests.end_to_end.conftest import Outcome
from tests.end_to_end.test_hangs import RECIPE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
FLAGS = ["--shards", "3", "--threads", "1", "--epochs", "20", "--checkpoint-every", "15"]
CONF = "join_timeout=60,last_call_timeout=20,keep_alive_interval=2,keep_alive_max_attempt=4"
GOES_AGAIN = {75, 76}


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    outcome = call([PYTHON, DIGITS, *FLAGS, "--run-dir", "run"], tmp_path_factory.mktemp("hosts"), seconds=300)
    assert outcome.returncode == 0, outcome.stderr
    return outcome


@dataclass
class Run:
    """One run on three hosts, which share a file system."""

    hosts: list[Host]
    cwd: Path
    launchers: list[subprocess.Popen[bytes]]

    @property
    def outcome(self) -> Outcome:
        return Outcome(0, self.said(0), "", self.cwd / "run")

    def said(self, number: int) -> str:
        return (self.cwd / f"host-{number}.out").read_text(errors="replace")

    def start(self, number: int, nnodes: str, *options: str) -> None:
        where = options or ("--node-rank", str(number))
        process = self.hosts[number].start(
            [SAMESTEP, "run", "--nnodes", nnodes, *where, "--rdzv-conf", CONF, DIGITS, *FLAGS, "--run-dir", "run"],
            self.cwd,
            self.cwd / f"host-{number}.out",
        )
        self.launchers.append(process)

    def wait_for_checkpoint(self, beyond: int = 0) -> None:
        folder = self.cwd / "run" / "checkpoints"

        def there() -> bool:
            steps = [path.name[5:] for path in folder.glob("step-*")]
            return any(int(step) > beyond for step in steps if step.isdecimal())

        until(there, f"a checkpoint beyond step {beyond}", self)

    def code(self, number: int, seconds: float = 200) -> int:
        try:
            return self.launchers[number].wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"host {number} does not end: {self.said(number)[-3000:]}") from None

    def pid_of(self, rank: int) -> int:
        """In the first generation."""
        return int(self.outcome.of("run_started")[0]["ranks"][rank]["pid"])

    def worlds(self) -> list[int]:
        found = [event for event in self.outcome.events if event["event"] in ("run_started", "restarted")]
        return [event["world_size"] for event in found]

    def check(self, reference: Outcome) -> None:
        """Every step once, in the bits of one process, and each checkpoint published by the head's machine."""
        outcome = self.outcome
        assert outcome.of("run_finished"), self.said(0)[-3000:]
        assert outcome.digest == reference.digest
        assert outcome.losses == reference.losses
        owners = {
            event["ranks"][0]["host"] for event in outcome.events if event["event"] in ("run_started", "restarted")
        }
        assert owners == {self.hosts[0].name}


def until(condition: Callable[[], bool], what: str, run: Run, seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not condition():
        late = time.monotonic() > end or run.launchers[0].poll() not in (None, 0)
        assert not late, f"waited for {what}: {run.said(0)[-3000:]}"
        time.sleep(0.05)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2")
    problem = available()
    if problem:
        pytest.skip(problem)
    with hosts(3) as made:
        yield Run(made, tmp_path, [])


def start_all(run: Run, nnodes: str) -> None:
    for number in range(3):
        run.start(number, nnodes)


def test_three_hosts_end_in_the_bits_of_one_process_and_listen_on_the_bridge_alone(run, reference):
    start_all(run, "3")
    run.wait_for_checkpoint()
    heard = [listening(host) for host in run.hosts]
    assert [run.code(number) for number in range(3)] == [0, 0, 0]
    run.check(reference)
    assert run.worlds() == [3]
    ranks = run.outcome.of("run_started")[0]["ranks"]
    assert [(rank["host"], rank["local_rank"]) for rank in ranks] == [(host.name, 0) for host in run.hosts]
    for host, addresses in zip(run.hosts, heard, strict=True):
        assert {address.rpartition(":")[0] for address in addresses} <= {host.address, f"[::ffff:{host.address}]"}


def test_a_rendezvous_endpoint_numbers_hosts_as_they_come(run, reference):
    endpoint = f"{run.hosts[0].address}:29400"
    for number in range(3):
        run.start(number, "1:3", "--rdzv-endpoint", endpoint)
    assert [run.code(number) for number in range(3)] == [0, 0, 0]
    run.check(reference)


def test_a_rank_that_dies_on_another_host_is_named_and_costs_no_bit(run, reference):
    start_all(run, "3")
    run.wait_for_checkpoint()
    os.kill(run.pid_of(2), signal.SIGKILL)
    assert [run.code(number) for number in range(3)] == [0, 0, 0]
    run.check(reference)
    assert [event["rank"] for event in run.outcome.of("worker_failed")] == [2]
    assert "rank 2 failed: killed by SIGKILL" in run.said(0)


def test_a_rank_that_is_stopped_on_another_host_is_named_and_costs_no_bit(run, reference):
    start_all(run, "3")
    run.wait_for_checkpoint()
    os.kill(run.pid_of(1), signal.SIGSTOP)
    assert [run.code(number) for number in range(3)] == [0, 0, 0], run.said(0)
    run.check(reference)
    (failed,) = run.outcome.of("worker_failed")
    assert failed["rank"] == 1, failed
    assert re.match(r"hang: \d+ s in .*: stopped by a signal", failed["cause"])
    assert re.search(r"rank 1 failed: hang: .*; restart 1 of 3", run.said(0))
    assert run.worlds() == [3, 3]
    for rank in (1, 2):  # each machine has looked at its own
        text = (run.cwd / "run" / "errors" / f"stacks-0-from-rank-{rank}.txt").read_text()
        assert re.findall(r"^rank (\d), pid \d+", text, re.MULTILINE) == [str(rank)]


def test_a_rank_that_sleeps_in_its_recipe_is_named_with_its_line_from_the_head(run, tmp_path):
    recipe = tmp_path / "sleeps.py"
    recipe.write_text(RECIPE.format(fault="sleep", rank=2, call=7, slow={}, always=False))
    flags = ["--max-steps", "12", "--checkpoint-every", "4", "--global-batch-size", "64", "--shards", "3"]
    for number in range(3):
        words = [SAMESTEP, "run", "--nnodes", "3", "--node-rank", number, "--rdzv-conf", CONF, recipe, *flags]
        output = run.cwd / f"host-{number}.out"
        run.launchers.append(run.hosts[number].start([*words, "--run-dir", "run"], run.cwd, output))
    assert [run.code(number) for number in range(3)] == [0, 0, 0], run.said(0)
    (failed,) = run.outcome.of("worker_failed")
    line = recipe.read_text().splitlines().index("    time.sleep(3600)") + 1
    assert (failed["rank"], failed["step"]) == (2, 6), failed
    assert f"sleeps.py:{line} in never_returns" in failed["cause"]
    alone = call([PYTHON, recipe, *flags, "--run-dir", "alone"], run.cwd)
    finished = [json.loads(text) for text in (run.cwd / "alone" / "events.jsonl").read_text().splitlines()][-1]
    assert alone.returncode == 0, alone.stderr
    assert run.outcome.digest == finished["digest"]


def test_a_host_that_is_switched_off_is_done_without(run, reference):
    start_all(run, "1:3")
    run.wait_for_checkpoint()
    run.hosts[2].power_off()
    assert [run.code(number) for number in range(2)] == [0, 0]
    run.check(reference)
    assert (run.worlds()[0], run.worlds()[-1]) == (3, 2)
    assert f"its machine {run.hosts[2].name} (node 2) is gone" in run.said(0)


def test_a_host_that_comes_back_joins_at_a_checkpoint(run, reference):
    start_all(run, "1:3")
    run.wait_for_checkpoint()
    run.hosts[2].power_off()
    until(lambda: 2 in run.worlds(), "a smaller world", run)
    run.hosts[2].plug()
    run.start(2, "1:3")
    assert [run.code(number) for number in (0, 1, 3)] == [0, 0, 0]
    run.check(reference)
    assert run.worlds()[-1] == 3


def test_the_others_say_run_again_when_the_head_is_switched_off(run, reference):
    start_all(run, "1:3")
    run.wait_for_checkpoint()
    run.hosts[0].power_off()
    assert {run.code(1), run.code(2)} <= GOES_AGAIN
    assert "the head of the run is gone" in run.said(1)
    run.hosts[0].plug()
    run.launchers.clear()
    start_all(run, "1:3")  # what the engine does with such exit codes
    assert [run.code(number) for number in range(3)] == [0, 0, 0]
    run.check(reference)


def test_a_cable_that_is_out_for_three_seconds_is_no_failure(run, reference):
    start_all(run, "3")
    run.wait_for_checkpoint()
    run.hosts[1].unplug()
    time.sleep(3)  # the fault itself
    run.hosts[1].plug()
    assert [run.code(number) for number in range(3)] == [0, 0, 0]
    run.check(reference)
    assert run.worlds() == [3]


def test_when_a_cable_is_cut_one_side_goes_on_and_the_other_says_run_again(run, reference):
    start_all(run, "1:3")
    run.wait_for_checkpoint()
    run.hosts[1].unplug()
    assert run.code(1) in GOES_AGAIN
    assert [run.code(number) for number in (0, 2)] == [0, 0]
    run.check(reference)
    assert run.worlds()[-1] == 2


def test_a_slow_cable_changes_no_bit_and_is_no_hang(run, reference):
    try:
        run.hosts[1].slow_down(megabits=40)
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("needs tc and the kernel's tbf")
    start_all(run, "3")
    assert [run.code(number, 300) for number in range(3)] == [0, 0, 0]
    run.check(reference)
    assert (run.worlds(), run.outcome.of("worker_failed")) == ([3], [])


def test_a_cable_that_becomes_slow_in_the_middle_is_no_hang(run, reference):
    """Steps take many times as long from one moment to the next, and so does what is said of ranks."""
    start_all(run, "3")
    run.wait_for_checkpoint()
    try:
        run.hosts[1].slow_down(megabits=0.5)
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("needs tc and the kernel's tbf")
    time.sleep(20)  # the fault itself
    run.hosts[1].speed_up()
    assert [run.code(number) for number in range(3)] == [0, 0, 0]
    run.check(reference)
    assert (run.worlds(), run.outcome.of("worker_failed")) == ([3], [])
    seconds = [
        sum(event["seconds"][phase]["max"] for phase in ("backward", "sync")) for event in run.outcome.of("step")
    ]
    assert max(seconds) > 10 * sorted(seconds)[len(seconds) // 2], "the cable was never slow"


def test_hosts_that_do_not_share_the_run_directory_are_told_so(run):
    run.start(0, "2", "--node-rank", "0", "--master-addr", run.hosts[0].address)
    (run.cwd / "elsewhere").mkdir()
    other = run.hosts[1].start(
        [
            *[SAMESTEP, "run", "--nnodes", 2, "--node-rank", 1, "--master-addr", run.hosts[0].address],
            *["--rdzv-conf", CONF, DIGITS, *FLAGS, "--run-dir", "run"],
        ],
        run.cwd / "elsewhere",
        run.cwd / "host-1.out",
    )
    assert other.wait(timeout=60) == 2
    assert "is expected to be the head's" in run.said(1)
    assert json.dumps("on a file system that they share")[1:-1] in run.said(1)
