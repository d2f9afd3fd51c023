"""Runs the benchmarks one after the other and writes what they measure into benchmarks/results.md.

    python benchmarks/table.py [--quick] [--only PART …]

A part is written as soon as it is measured, in place of its former figures; one that fails is named and keeps them, and
the others go on. `--quick` takes fewer rounds and rows, and writes nothing. Every row runs samestep and its peers in
turns, so a machine that slows down slows all of them; run it on a machine that does nothing else all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blocks

HERE = Path(__file__).resolve().parent
LOOPS = ("hand-written DDP", "samestep", "accelerate", "fabric")
PLAIN = "without DDP"
WORKLOADS = ("MLP 0.2 ms", "MLP 1 ms", "MLP 5 ms", "digits CNN", "char LM")
GPU = "On a GPU"  # left out where there is none
GPU_WORKLOADS = ("MLP 0.2 ms", "MLP 5 ms", "digits CNN", "char LM", "transformer 85M")
COSTS = (("small", 2, 2), ("small", 4, 4), ("heavy", 2, 2), ("large", 2, 2), ("large", 4, 4), ("large", 1, 8))
SECONDS = 900  # a row may take
MATRIX_SECONDS = 7200
Lines = list[str]


def script(name: str, *arguments: object) -> dict[str, Any]:
    """The JSON line that a benchmark prints in the end."""
    return _json([sys.executable, str(HERE / f"{name}.py"), *map(str, arguments)])


def ranks(count: int, name: str, *arguments: object) -> dict[str, Any]:
    """The same from `count` ranks below torchrun."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "torchrun"), "--master-port", str(port), f"--nproc-per-node={count}"]
    return _json([*command, str(HERE / f"{name}.py"), *map(str, arguments)])


def _json(command: list[str]) -> dict[str, Any]:
    environ = os.environ | {"PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[-4:])} ended with {done.returncode}: {done.stderr[-400:]}")
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def seed_job(quick: bool) -> Lines:
    row = script("seed_job", 5 if quick else 15)
    lines = [
        "An epoch of the seed's job; ratios to whole-batch indexing by hand.",
        "",
        "| Loop | ms | Ratio |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {value['ms']:g} | {_ratio(value)} |" for name, value in row.items()]
    slow, ours = row["the seed's loop, 4 workers"]["ms"], row["samestep"]["ms"]
    return [*lines, "", f"The seed's loop with its 4 workers takes {slow / ours:.1f}x as long as samestep."]


def loop_overhead(quick: bool) -> Lines:
    lines = [
        "Milliseconds a step and ratio to hand-written DDP, one thread a rank. A script for any number of ranks has",
        "DDP on one rank too, which would not need it; the last column is the same loop without.",
        "",
    ]
    columns = (*LOOPS, PLAIN)
    lines += [f"| Workload | Ranks | {' | '.join(columns)} |", "|" + "---|" * (2 + len(columns))]
    scaling: dict[str, dict[int, dict[str, Any]]] = {}
    for name in WORKLOADS[:1] if quick else WORKLOADS:
        for count in (1, 2):
            row = ranks(count, "loop_overhead", name, 5 if quick else 11)["loops"]
            scaling.setdefault(name, {})[count] = row
            cells = [f"{row[loop]['ms']:g} ms, {_ratio(row[loop])}" if loop in row else "-" for loop in columns]
            lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
    lines += ["", "Scaling: steps a second at 2 ranks over 1 rank, the same global batch.", ""]
    lines += [f"| Workload | {' | '.join(LOOPS)} |", "|" + "---|" * (1 + len(LOOPS))]
    for name, row in scaling.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[1][k]['ms'] / row[2][k]['ms']:.2f}" for k in LOOPS) + " |")
    return lines


def exact_and_fast(quick: bool) -> Lines:
    lines = [
        "Exact and fast reduction beside hand-written DDP. Ranks of one host share memory, and exact adds up there; on",
        "several hosts it goes through gloo as the others do. With 1 rank and 8 shards a step is 8 small batches.",
        "",
    ]
    lines += [
        "| Model | Ranks | Shards | Hand-written DDP | exact | exact, through gloo | fast |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, count, shards in COSTS[:1] if quick else COSTS:
        row = ranks(count, "cost_of_sameness", size, shards)
        ways = ("exact", "apart", "fast")
        cells = [f"{row[key]['ms']:g} ms, {_ratio(row[key])}" if key in row else "-" for key in ways]
        lines.append(f"| {size} | {count} | {shards} | {row['hand-written']['ms']:g} ms | {' | '.join(cells)} |")
    return lines


def starts(quick: bool) -> Lines:
    lines = ["Seconds: median (least to most). `lost`: restarts that took no step within a minute.", ""]
    lines += ["| Launcher | Ranks | Command to first step | Killed rank to next step | lost |", "|---|---|---|---|---|"]
    for count in (2,) if quick else (2, 4):
        row = script("starts", count, 1 if quick else 5)
        for name in ("samestep", "torchrun", "accelerate"):
            value = row[name]
            again = _seconds(value["again"]) if value["again"] else "never"
            lines.append(f"| {name} | {count} | {_seconds(value['first'])} | {again} | {value['lost']} |")
    return lines


def worker_choice(quick: bool) -> Lines:
    kinds = ("waiting",) if quick else ("computing", "waiting", "digits")
    lines = [
        "Seconds of a run and ratio to the best fixed number of loader workers: samples of 5 ms, and the digits.",
        "",
    ]
    return [*lines, *_choices(kinds, 1 if quick else 3, 100 if quick else 500)]


def _choices(kinds: tuple[str, ...], rounds: int, steps: int, device: str = "cpu") -> Lines:
    numbers = ("auto", "0", "1", "2", "4")
    lines = [f"| Samples | {' | '.join(numbers)} |", "|" + "---|" * (1 + len(numbers))]
    for kind in kinds:
        row = script("worker_choice", kind, rounds, steps, device)
        lines.append(f"| {kind} | " + " | ".join(f"{row[n]['s']:g} s, {_ratio(row[n])}" for n in numbers) + " |")
    return lines


def checkpoint_stall(_quick: bool, device: str = "cpu") -> Lines:
    with tempfile.TemporaryDirectory() as folder:
        row = script("save_stall", folder, device)
    flips = row["flips"]
    noticed = {"samestep": flips["samestep"], "torch.save": flips["torch.load"]}
    lines = ["A checkpoint of 100 million float32 parameters: median (range) of 5.", ""]
    lines += ["| Saved by | Training stands still | Flipped bits noticed at loading |", "|---|---|---|"]
    for name in ("samestep", "torch.save", "dcp.async_save"):
        low, high = row[name]["range"]
        told = f"{noticed[name]} of {flips['of']}" if name in noticed else "not measured"
        lines.append(f"| {name} | {row[name]['ms']} ms ({low} to {high}) | {told} |")
    return lines


def on_a_gpu(quick: bool) -> Lines:
    lines = [
        "Milliseconds a step and ratio to a hand-written loop that copies from pinned memory; one rank, no DDP.",
        "",
    ]
    columns = ("hand-written", *LOOPS[1:])
    lines += [f"| Workload | {' | '.join(columns)} |", "|" + "---|" * (1 + len(columns))]
    device = ""
    for name in GPU_WORKLOADS[:1] if quick else GPU_WORKLOADS:
        row = script("loop_overhead", name, 5 if quick else 7, "cuda")
        device, loops = row["device"], row["loops"]
        cells = [f"{loops[loop]['ms']:g} ms, {_ratio(loops[loop])}" for loop in (PLAIN, *LOOPS[1:])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    workers = "Seconds of 500 steps of the digits and ratio to the best fixed number of loader workers; above it is 0."
    lines += ["", workers, "", *_choices(("digits",), 3, 500, "cuda")]
    lines += ["", *checkpoint_stall(quick, "cuda")]
    return [f"One {device}.", "", *lines]


def deaths(_quick: bool) -> Lines:
    lines = ["Seconds from the end of a rank: median (most). `Seen`: by the launcher; `gone`: all other ranks too.", ""]
    lines += ["| A rank | Came back | Seen | All ranks gone | Next step |", "|---|---|---|---|---|"]
    ways = {"is killed": (), "is killed, all ignore SIGTERM": ("--ignore-term",), "exits": ("--by", "exit")}
    for name, options in ways.items():
        row = script("recovery", "--launchers", "samestep", "--rounds", 50, *options)
        cells = [f"{row[key]['median']} ({row[key]['max']})" for key in ("seen", "gone", "step")]
        lines.append(f"| {name} | {row['came back']} of {row['tried']} | {' | '.join(cells)} |")
    return lines


def faults(_quick: bool) -> Lines:
    command = [sys.executable, str(HERE / "fault_matrix.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=MATRIX_SECONDS)
    about = "One fault a run at each of six moments, two ranks: ended in its own undisturbed digest, median recovery."
    return [about, "", *done.stdout.splitlines()]


PARTS: dict[str, Callable[[bool], Lines]] = {
    "Seed job": seed_job,
    "Loop overhead": loop_overhead,
    "Exact and fast": exact_and_fast,
    "Launch and recovery": starts,
    "A rank's end": deaths,
    "Faults": faults,
    "Loader workers": worker_choice,
    "Checkpoint": checkpoint_stall,
    GPU: on_a_gpu,
}

_RATIOS = "Ratios are taken round by round: median (lowest to highest)."
_HOST = f"gloo on loopback. {_RATIOS}"
LONG = ("A rank's end", "Faults")  # not among the quick ones


def _has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def _ratio(value: dict[str, Any], digits: int = 2) -> str:
    low, high = value["spread"]
    return f"{value['ratio']:.{digits}f}x ({low:.{digits}f} to {high:.{digits}f})"


def _seconds(spread: list[float]) -> str:
    return f"{spread[0]:g} ({spread[1]:g} to {spread[2]:g})"


def main(only: list[str], *, quick: bool) -> int:
    failed = 0
    for title, part in PARTS.items():
        if (only and title not in only) or (quick and title in LONG) or (title == GPU and not _has_gpu()):
            continue
        try:
            made = part(quick)
        except (RuntimeError, ValueError, LookupError, subprocess.SubprocessError) as error:
            failed += 1
            print(f"\n## {title}\n\nnot measured: {' '.join(str(error).split())[:300]}", flush=True)
            continue
        option = "--quick" if quick else f"--only '{title}'"
        about = blocks.circumstances(f"./scripts/bench {option}", "lightning-fabric")
        text = "\n".join([f"{about} {_RATIOS if title == GPU else _HOST}", "", *made]) + "\n"
        print(f"\n## {title}\n\n{text}", end="", flush=True)
        if not quick:
            blocks.write(HERE / "results.md", title, text)
    return min(failed, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and rows; writes nothing")
    parser.add_argument(
        "--only", action="append", default=[], choices=list(PARTS), help="this part alone; again for more"
    )
    given = parser.parse_args()
    sys.exit(main(given.only, quick=given.quick))
