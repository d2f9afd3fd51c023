"""Which engine survives what: run, a rank fails, a node fails, preemption, another size; with digest and seconds.

    python benchmarks/engines.py [--write] [engine ...]

Every cell is a run of the digits at two shards on this machine, from its start to the digest, faults and new starts
included. Where an engine ends without one, the same command is given once more: `again after` its exit code, or after
so many seconds without a step. `--write` puts the rows into README.md and results.md. Slurm and Open MPI are taken from
Debian's packages, which needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import blocks
from engine_cell import SILENCE, Cell, strike
from engine_commands import BIN, ENGINES, FLAGS, RECIPE

ROOT = Path(__file__).resolve().parent.parent
SCENARIOS = ("run", "rank fails", "node fails", "preempted", "resumed at another size")
SLURM = {name for name in ENGINES if "slurm" in name or "srun" in name}
ONE_NODE = {"samestep run", "mpirun python", "accelerate launch"}


def measure(name: str, scenario: str) -> str:
    engine = ENGINES[name]
    if scenario == "node fails" and name in ONE_NODE:
        return "one node"
    with tempfile.TemporaryDirectory() as folder:
        cell, began = Cell(Path(folder), name in SLURM), time.monotonic()
        try:
            cell.start(engine(2))
            if scenario != "run":
                if not cell.wait(lambda: cell.saved() or cell.ended()):
                    return "no checkpoint"
                if scenario == "resumed at another size":
                    cell.end_all()
                    cell.start(engine(1))
                else:
                    strike(scenario, cell)
            ended, note = cell.wait(cell.ended), ""
            if not cell.finished():
                note = f", again after {cell.codes() if ended else f'{SILENCE:.0f} s of nothing'}"
                print(f"--- {name}, {scenario}{note}\n{(cell.folder / 'output').read_text()[-1500:]}", file=sys.stderr)
                cell.end_all()
                cell.start(engine(2))
                cell.wait(cell.ended)
            seconds, digest = time.monotonic() - began, cell.finished()
            same = "no digest" if not digest else "same" if digest == reference() else "OTHER BITS"
            return f"{same}, {seconds:.0f} s{note}"
        finally:
            cell.end_all()


_REFERENCE: list[str] = []


def reference() -> str:
    if not _REFERENCE:
        with tempfile.TemporaryDirectory() as folder:
            cell = Cell(Path(folder), in_slurm=False)
            cell.start([[str(BIN / "python"), str(RECIPE), *FLAGS]])
            cell.wait(cell.ended)
            _REFERENCE.append(cell.finished())
    return _REFERENCE[0]


def row(name: str) -> str:
    needed = {*(["slurmctld"] if name in SLURM else []), ENGINES[name](1)[0][0]}
    missing = [tool for tool in needed if shutil.which(tool) is None]
    cells = ["not installed" if missing else measure(name, scenario) for scenario in SCENARIOS]
    return f"| {name} | " + " | ".join(cells) + " |"


def table(rows: dict[str, str]) -> str:
    head = [f"| Engine | {' | '.join(SCENARIOS)} |", "|" + "---|" * (len(SCENARIOS) + 1)]
    return "\n".join([*head, *(rows[name] for name in ENGINES if name in rows)]) + "\n"


def write(rows: dict[str, str]) -> None:
    """Rows of engines that were not measured this time stay as they are."""
    about = (
        f"{blocks.circumstances('python benchmarks/engines.py --write')}\nDigest of one process: `{reference()}`.\n\n"
    )
    for path, first in ((ROOT / "README.md", ""), (ROOT / "benchmarks" / "results.md", about)):
        old = blocks.read(path, "engines")
        known = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("| ")}
        blocks.write(path, "engines", first + table(known | rows))


def main(words: list[str]) -> None:
    names = [word for word in words if word != "--write"]
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise SystemExit(f"one of {', '.join(ENGINES)} is expected, but got {unknown[0]}")
    chosen = [name for name in ENGINES if not names or name in names]
    tools = ["mpirun.openmpi"] if "mpirun python" in chosen else []
    tools += ["slurmctld", "slurmd", "sbatch", "munged"] if SLURM & {*chosen} else []
    if tools:
        subprocess.call([ROOT / "scripts" / "install-system", *tools])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as stack:
        if SLURM & {*chosen} and os.geteuid() == 0:
            script = ROOT / "scripts" / "slurm-test-cluster"
            subprocess.run([script, "start", folder], check=True, stdout=subprocess.DEVNULL)
            stack.callback(subprocess.call, [str(script), "stop", folder])
            os.environ["SLURM_CONF"] = f"{folder}/slurm.conf"
        print(f"digest of one process: {reference()}", flush=True)
        rows = {}
        for name in chosen:
            rows[name] = row(name)
            print(rows[name], flush=True)
            if "--write" in words:
                write({name: rows[name]})


if __name__ == "__main__":
    main(sys.argv[1:])
