"""Whole runs on a GPU as users see them: launchers, restarts, lack of memory, mistakes, profiles."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import SHARING

BIN = Path(sys.executable).parent
HERE = Path(__file__).resolve().parent
DIGITS = HERE.parents[1] / "scripts" / "recipes" / "digits_cnn.py"
FLAGS = ("--epochs", "1", "--shards", "2", "--device", "cuda", "--run-dir", "run")
COMMANDS = {
    "samestep": ("samestep", "run", "--nproc-per-node", "gpu"),
    "torchrun": ("torchrun", "--standalone", "--nproc-per-node=1"),
    "accelerate": (
        *("accelerate", "launch", "--num_processes", "1", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ),
}


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines() if (run_dir / "events.jsonl").exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def run(cwd: Path, *words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    cwd.mkdir(exist_ok=True)
    argv = [str(BIN / str(words[0])), *map(str, words[1:])]
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == status, f"{argv}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def test_every_launcher_ends_in_the_bits_of_plain_python(trained: Any, tmp_path: Path) -> None:
    digest = trained("digits_cnn", *FLAGS[:4]).digest
    for name, words in COMMANDS.items():
        run(tmp_path / name, *words, DIGITS, *FLAGS)
        assert json.loads((tmp_path / name / "run" / "config.json").read_text())["environment"]["device"] != "cpu"
        assert events(tmp_path / name / "run", "run_finished")[-1]["digest"] == digest


def test_a_killed_rank_comes_back_in_the_same_bits(trained: Any, tmp_path: Path) -> None:
    """The second rank is a fork of a process that has imported torch and left CUDA alone."""
    flags = ("--epochs", "6", *FLAGS[2:])
    digest = trained("digits_cnn", *flags[:4]).digest
    words = [str(BIN / "samestep"), "run", str(DIGITS), *flags, "--checkpoint-every", "20"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        end = time.monotonic() + 120
        while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
            assert time.monotonic() < end
            assert launcher.poll() is None
            time.sleep(0.02)
        killed = time.time()
        os.kill(events(tmp_path / "run", "run_started")[0]["ranks"][0]["pid"], signal.SIGKILL)
        said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 0, said
    assert events(tmp_path / "run", "run_finished")[-1]["digest"] == digest
    (again,) = events(tmp_path / "run", "restarted")
    step = next(event for event in events(tmp_path / "run", "step") if event["time"] > killed + 0.5)
    print(f"next step {step['time'] - killed:.2f} s after the kill; {again}")


def test_a_full_gpu_costs_restarts_in_smaller_parts(trained: Any, tmp_path: Path) -> None:
    recipe = HERE / "recipes" / "full_memory.py"
    done = run(tmp_path, "samestep", "run", recipe, "--shards", "1", "--megabytes", "300", "--run-dir", "run")
    parts = json.loads((tmp_path / "run" / "config.json").read_text())["micro_batches"]
    assert parts in (2, 4)
    assert f"the next start cuts each shard's batch into {parts}" in done.stderr
    assert events(tmp_path / "run", "worker_failed")[0]["cause"].startswith("OutOfMemoryError")
    fitting = trained("full_memory", "--shards", 1, "--micro-batches", parts, cwd="fits")
    assert events(tmp_path / "run", "run_finished")[-1]["digest"] == fitting.digest
    peaks = [max(event["memory"]["device"]) for event in fitting.events("step") if "memory" in event]
    assert peaks
    assert all(2**20 < peak < 300 * 2**20 for peak in peaks)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("kill", "rank 1 failed: killed by SIGKILL"),
        ("raise", "rank 1 failed: ValueError: of rank 1"),
        ("host", "rank 1 failed: hang: "),
        ("device", "rank 1 failed: hang: "),
    ],
)
def test_a_rank_that_fails_is_named_and_costs_no_bit(trained: Any, tmp_path: Path, fault: str, named: str) -> None:
    """Two machines of one rank each; in "device" both hosts wait for their devices, and one of these for the other."""
    recipe = HERE / "recipes" / "failing.py"
    flags = ("--shards", "2", "--max-steps", "50", "--device", "cuda")
    digest = trained("failing", *flags[:4]).digest
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    where = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port)
    launchers = []
    for number in range(2):
        words = [str(BIN / "samestep"), "run", *where, "--node-rank", str(number), str(recipe), *flags]
        environ = os.environ | SHARING | {"NCCL_HOSTID": f"machine-{number}", "FAULT": fault}
        with (tmp_path / f"{number}.out").open("w") as out:
            more: dict[str, Any] = {"stdout": out, "stderr": subprocess.STDOUT, "cwd": tmp_path, "env": environ}
            launchers.append(subprocess.Popen([*words, "--checkpoint-every", "10", "--run-dir", "run"], **more))
    codes = [launcher.wait(timeout=120) for launcher in launchers]
    said = (tmp_path / "0.out").read_text()
    assert codes == [0, 0], said
    assert named in said
    assert events(tmp_path / "run", "run_finished")[-1]["digest"] == digest
    (failed,) = events(tmp_path / "run", "worker_failed")
    assert (failed["rank"], failed["phase"]) == (1, "forward")
    if fault == "device":
        assert failed["step"] == 29
        assert "its GPU does not come to an end" in failed["cause"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("nondeterministic", "has no deterministic form here"),
        ("device", "found at least two devices, cuda:0 and cpu"),
        ("infinite", "is not finite"),
        ("label", "device-side assert"),
    ],
)
def test_a_mistake_is_a_sentence(start: Any, wrong: str, said: str) -> None:
    ended = start("wrong_on_gpu", env={"WRONG": wrong})
    assert ended.codes != [0]
    assert said in ended.stderr
    if wrong not in ("label", "device"):
        assert "Traceback" not in ended.stderr


def test_a_meeting_makes_the_hosts_wait(trained: Any) -> None:
    """NCCL by itself makes the devices wait alone."""
    trained("barrier", ranks=2)


def test_a_profile_shows_the_kernels_of_every_rank(trained: Any) -> None:
    ended = trained("digits_cnn", "--max-steps", 10, "--shards", 2, "--profile", 3, ranks=2)
    trace = json.loads(gzip.decompress((ended.run_dir / "profile.json.gz").read_bytes()))["traceEvents"]
    kernels = [event for event in trace if event.get("cat") == "kernel"]
    assert len({event["pid"] for event in kernels}) == 2
    assert any("nccl" in event["name"].lower() for event in kernels)
