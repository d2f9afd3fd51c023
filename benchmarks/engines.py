"""Which engine survives what: run, a rank fails, a node fails, preemption, another size; with digest and seconds.

    python benchmarks/engines.py [engine ...]      prints a table; Slurm needs root, MPI Debian's openmpi-bin

Every cell is a run of the digits at two shards on this machine, from its start to the digest, faults and new starts
included. Where an engine gives up, the same command is given once more, as a person would: `by hand` in the table.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
RECIPE = ROOT / "scripts" / "recipes" / "digits_cnn.py"
FLAGS = ["--shards", "2", "--threads", "1", "--epochs", "12", "--checkpoint-every", "10", "--run-dir", "run"]
LIMIT = 240.0  # seconds until a cell is given up
CONF = "join_timeout=60,last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
SCENARIOS = ("run", "rank fails", "node fails", "preempted", "resumed at another size")


def environment() -> dict[str, str]:
    theirs = ("SAMESTEP_", "PET_", "SLURM_", "OMPI_", "PMI", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(theirs) or name == "SLURM_CONF"}
    return kept | {"ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@dataclass
class Cell:
    """One run in a folder of its own."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, commands: list[list[str]]) -> None:
        with (self.folder / "output").open("ab") as output:
            for command in commands:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=self.folder,
                        env=environment(),
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                )

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):
            lines = (self.folder / "run" / "events.jsonl").read_text().splitlines()
            return [event for event in map(json.loads, lines) if event["event"] in kinds]
        return []

    def wait(self, condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.05)
        return False

    def saved(self) -> bool:
        return any((self.folder / "run" / "checkpoints").glob("step-*"))

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def finished(self) -> str:
        found = self.events("run_finished")
        return str(found[-1]["digest"]) if found else ""

    def rank(self, number: int) -> int:
        ranks = self.events("run_started", "restarted")[-1]["ranks"]
        return int(next(rank["pid"] for rank in ranks if rank["rank"] == number))

    def end_all(self) -> None:
        """Also ranks that outlive their launcher, as they do below some of the engines."""
        pids = [rank["pid"] for event in self.events("run_started", "restarted") for rank in event["ranks"]]
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pid in pids:
            with contextlib.suppress(OSError):
                if (
                    str(RECIPE) in Path(f"/proc/{pid}/cmdline").read_text()
                    or "samestep" in Path(f"/proc/{pid}/cmdline").read_text()
                ):
                    os.kill(pid, signal.SIGKILL)
        self.processes.clear()


Engine = Callable[[int], list[list[str]]]  # number of ranks -> the commands that start them, one a "node"


def samestep_one(ranks: int) -> list[list[str]]:
    return [[str(BIN / "samestep"), "run", "--nproc-per-node", str(ranks), str(RECIPE), *FLAGS]]


def samestep_nodes(ranks: int) -> list[list[str]]:
    nnodes = "1:2" if ranks > 1 else "1"
    where = [["--node-rank", str(node)] for node in range(ranks)]
    run = [str(BIN / "samestep"), "run", "--nnodes", nnodes, "--rdzv-conf", CONF]
    return [[*run, *(place if ranks > 1 else []), str(RECIPE), *FLAGS] for place in where]


def torchrun_static(ranks: int) -> list[list[str]]:
    run = [str(BIN / "torchrun"), "--nnodes", str(ranks), "--nproc-per-node", "1", "--max-restarts", "3"]
    run += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return [[*run, "--node-rank", str(node), str(RECIPE), *FLAGS] for node in range(ranks)]


def torchrun_c10d(ranks: int) -> list[list[str]]:
    run = [str(BIN / "torchrun"), "--nnodes", f"1:{ranks}", "--nproc-per-node", "1", "--max-restarts", "3"]
    run += ["--rdzv-backend", "c10d", "--rdzv-id", "x", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    run += ["--rdzv-conf", "join_timeout=60,last_call_timeout=5"]
    return [[*run, str(RECIPE), *FLAGS] for _ in range(ranks)]


def accelerate(ranks: int) -> list[list[str]]:
    run = [
        str(BIN / "accelerate"),
        "launch",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    run += [
        "--multi_gpu",
        "--num_processes",
        str(ranks),
        "--max_restarts",
        "3",
        "--main_process_port",
        str(free_port()),
    ]
    if ranks == 1:
        return [[str(BIN / "python"), str(RECIPE), *FLAGS]]
    return [[*run, str(RECIPE), *FLAGS]]


def mpirun(ranks: int) -> list[list[str]]:
    run = ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    return [[*run, str(BIN / "python"), str(RECIPE), *FLAGS]]


def srun(ranks: int) -> list[list[str]]:
    return [["srun", f"-N{ranks}", f"-n{ranks}", str(BIN / "python"), str(RECIPE), *FLAGS]]


def srun_torchrun(ranks: int) -> list[list[str]]:
    """What people write by hand."""
    agent = f"{BIN / 'torchrun'} --nnodes {ranks} --node-rank $SLURM_NODEID --nproc-per-node 1 --max-restarts 3"
    shell = f'exec {agent} --master-addr 127.0.0.1 --master-port {free_port()} "$@"'
    return [["srun", f"-N{ranks}", f"-n{ranks}", "sh", "-c", shell, "sh", str(RECIPE), *FLAGS]]


def slurm(ranks: int) -> list[list[str]]:
    nodes = "1-2" if ranks > 1 else "1"
    submit = [str(BIN / "samestep"), "submit", "slurm", "--nodes", nodes, "--follow", str(RECIPE), "--"]
    return [[*submit, *FLAGS]]


ENGINES: dict[str, Engine] = {
    "samestep run": samestep_one,
    "samestep run, 2 nodes": samestep_nodes,
    "samestep submit slurm": slurm,
    "mpirun python": mpirun,
    "srun python": srun,
    "srun torchrun": srun_torchrun,
    "torchrun, static": torchrun_static,
    "torchrun, c10d": torchrun_c10d,
    "accelerate launch": accelerate,
}


def queue(cell: Cell) -> str:
    return re.search(r"job (\d+)", (cell.folder / "output").read_text())[1]  # type: ignore[index]


def start_now(job: str) -> None:
    for _ in range(100):
        shown = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True).stdout
        if "JobState=PENDING" in shown:
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)
            return
        time.sleep(0.2)


def disturb(engine: str, scenario: str, cell: Cell) -> None:
    in_slurm = engine == "samestep submit slurm"
    if scenario == "rank fails":
        os.kill(cell.rank(1), signal.SIGKILL)
    elif scenario == "node fails" and in_slurm:
        subprocess.run(["scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test"], check=True)
        start_now(queue(cell))
    elif scenario == "node fails":
        os.killpg(cell.processes[1].pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(cell.rank(1), signal.SIGKILL)  # a node takes its ranks with it
    elif in_slurm:
        subprocess.run(["scancel", "--batch", "--signal=USR1", queue(cell)], check=True)
        start_now(queue(cell))
    else:
        for process in cell.processes:
            os.kill(process.pid, signal.SIGTERM)


def measure(name: str, scenario: str) -> str:
    engine = ENGINES[name]
    if scenario == "node fails" and len(engine(2)) == 1 and name != "samestep submit slurm":
        return "one node"
    with tempfile.TemporaryDirectory() as folder:
        cell, began, note = Cell(Path(folder)), time.monotonic(), ""
        try:
            cell.start(engine(2))
            if scenario != "run":
                if not cell.wait(lambda: cell.saved() or cell.ended()):
                    return f"no checkpoint in {LIMIT:.0f} s"
                if scenario == "resumed at another size":
                    cell.end_all()
                    if name == "samestep submit slurm":
                        subprocess.run(["scancel", "--user=root"], check=True)
                        cell.wait(lambda: not subprocess.run(["squeue", "-h"], capture_output=True).stdout.strip())
                    cell.start(engine(1))
                else:
                    disturb(name, scenario, cell)
            ended = cell.wait(cell.ended)
            if not cell.finished():
                note = ", by hand" + ("" if ended else f" after {LIMIT:.0f} s of nothing")
                codes = [process.poll() for process in cell.processes]
                note += f" (ended with {codes})" if ended else ""
                cell.end_all()
                cell.start(engine(2))
                cell.wait(cell.ended)
            seconds = time.monotonic() - began
            digest = cell.finished()
            same = "no digest" if not digest else "same" if digest == reference() else "OTHER BITS"
            return f"{same}, {seconds:.1f} s{note}"
        finally:
            cell.end_all()


_REFERENCE: list[str] = []


def reference() -> str:
    if not _REFERENCE:
        with tempfile.TemporaryDirectory() as folder:
            cell = Cell(Path(folder))
            cell.start([[str(BIN / "python"), str(RECIPE), *FLAGS]])
            cell.wait(cell.ended)
            _REFERENCE.append(cell.finished())
    return _REFERENCE[0]


def main(names: list[str]) -> None:
    chosen = [name for name in ENGINES if not names or name in names]
    needs_slurm = [name for name in chosen if "slurm" in name or "srun" in name]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        script = ROOT / "scripts" / "slurm-test-cluster"
        if needs_slurm and os.geteuid() == 0:
            subprocess.run([script, "start", folder], check=True, stdout=subprocess.DEVNULL)
            stack.callback(subprocess.call, [str(script), "stop", folder])
            os.environ["SLURM_CONF"] = f"{folder}/slurm.conf"
        print(f"digest of one process: {reference()}\n", flush=True)
        print("| Engine | " + " | ".join(SCENARIOS) + " |\n|" + "---|" * (len(SCENARIOS) + 1), flush=True)
        for name in chosen:
            missing = shutil.which(ENGINES[name](1)[0][0]) is None or (name in needs_slurm and os.geteuid() != 0)
            cells = ["not installed" if missing else measure(name, scenario) for scenario in SCENARIOS]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
