"""One run of an engine in a folder of its own: started, struck, waited for, ended with all that belongs to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from engine_commands import RECIPE

LIMIT = 400.0  # seconds until a cell is given up
SILENCE = 90.0  # seconds without a step, after which a person would look


def environment() -> dict[str, str]:
    theirs = ("SAMESTEP_", "PET_", "SLURM_", "OMPI_", "PMI", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(theirs) or name == "SLURM_CONF"}
    return kept | {"ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


@dataclass
class Cell:
    folder: Path
    in_slurm: bool
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
        """False after LIMIT, or SILENCE without a line of the run."""
        began = heard = time.monotonic()
        size = -1
        while not condition():
            now = time.monotonic()
            with contextlib.suppress(OSError):
                if size != (size := (self.folder / "run" / "events.jsonl").stat().st_size):
                    heard = now
            if now - began > LIMIT or now - heard > SILENCE:
                return False
            time.sleep(0.05)
        return True

    def saved(self) -> bool:
        return any((self.folder / "run" / "checkpoints").glob("step-*"))

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def codes(self) -> str:
        """Exit codes, each once."""
        return ", ".join(sorted({str(process.poll()) for process in self.processes}))

    def finished(self) -> str:
        found = self.events("run_finished")
        return str(found[-1]["digest"]) if found else ""

    def rank(self, number: int) -> int:
        ranks = self.events("run_started", "restarted")[-1]["ranks"]
        return int(next(rank["pid"] for rank in ranks if rank["rank"] == number))

    def power_off(self, number: int) -> None:
        """What one of the commands has started, all at once."""
        parent = psutil.Process(self.processes[number].pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def end_all(self) -> None:
        """Also ranks that outlive their launcher, as they do below some of the engines, and jobs in the queue."""
        pids = [rank["pid"] for event in self.events("run_started", "restarted") for rank in event["ranks"]]
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self.in_slurm:
            clear_queue()
        for pid in pids:
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_text()
                if str(RECIPE) in command or "samestep" in command:
                    os.kill(pid, signal.SIGKILL)
        self.processes.clear()


def slurm(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout


def clear_queue() -> None:
    slurm("scancel", "--user=root")
    end = time.monotonic() + 60
    while slurm("squeue", "-h") and time.monotonic() < end:
        time.sleep(0.2)
    slurm("scontrol", "update", "NodeName=n2", "State=RESUME")


def start_now(job: str) -> None:
    """A requeued job has to wait for two minutes, unless somebody says otherwise.

    Within the second of its end it must not begin again: it would go with what was ended (a revoked credential).
    """
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if "JobState=PENDING" in slurm("scontrol", "-o", "show", "job", job):
            slurm("scontrol", "update", f"JobId={job}", "StartTime=now+2")
            return
        time.sleep(0.2)


def strike(scenario: str, cell: Cell) -> None:
    job = slurm("squeue", "-h", "-o", "%i").strip() if cell.in_slurm else ""
    batch = "submit" in " ".join(map(str, cell.processes[0].args))  # type: ignore[arg-type]
    if scenario == "rank fails":
        os.kill(cell.rank(1), signal.SIGKILL)
    elif scenario == "node fails" and job:
        slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    elif scenario == "node fails":
        cell.power_off(1)
    elif job:
        slurm("scancel", *(["--batch", "--signal=USR1"] if batch else ["--signal=TERM"]), job)
    else:
        for process in cell.processes:
            os.kill(process.pid, signal.SIGTERM)
    if job and batch and scenario != "rank fails":
        start_now(job)
