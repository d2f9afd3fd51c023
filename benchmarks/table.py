"""Runs the benchmarks one after the other and writes their table to benchmarks/results.md.

    python benchmarks/table.py [--quick]

`--quick` leaves out the slow rows and writes nothing.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

HERE = Path(__file__).resolve().parent
ROWS = (
    ("small", 1, 1),
    ("small", 2, 2),
    ("small", 4, 4),
    ("heavy", 2, 2),
    ("heavy", 4, 4),
    ("large", 2, 2),
    ("large", 4, 4),
    ("large", 1, 8),
)
QUICK = (("small", 1, 1), ("small", 2, 2), ("large", 2, 2))


def cost(size: str, ranks: int, shards: int) -> dict[str, Any]:
    """One row of cost_of_sameness.py."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "torchrun"), "--master-port", str(port), f"--nproc-per-node={ranks}"]
    command += [str(HERE / "cost_of_sameness.py"), size, str(shards)]
    return _json(command)


def stall() -> dict[str, Any]:
    """The row of save_stall.py."""
    with tempfile.TemporaryDirectory() as folder:
        return _json([sys.executable, str(HERE / "save_stall.py"), folder])


def _json(command: list[str]) -> dict[str, Any]:
    environ = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def _cell(value: dict[str, Any]) -> str:
    low, high = value["spread"]
    return f"{value['ms']:g} ms, {value['ratio']:.2f}x ({low:.2f} to {high:.2f})"


def cost_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines."""
    lines = [
        "| Model | Ranks | Shards | Hand-written DDP | samestep exact | samestep fast |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["size"], row["W"], row["V"], f"{row['hand-written']['ms']:g} ms", _cell(row["exact"])]
        lines.append("| " + " | ".join(map(str, [*cells, _cell(row["fast"])])) + " |")
    return lines


def stall_table(row: dict[str, Any]) -> list[str]:
    """Markdown lines."""
    flips = row["flips"]
    noticed = {"samestep": flips["samestep"], "torch.save": flips["torch.load"]}
    lines = ["| Saved by | Training stands still | Flipped bits noticed at loading |", "|---|---|---|"]
    for name in ("samestep", "torch.save", "dcp.async_save"):
        low, high = row[name]["range"]
        told = f"{noticed[name]} of {flips['of']}" if name in noticed else "not measured"
        lines.append(f"| {name} | {row[name]['ms']} ms ({low} to {high}) | {told} |")
    return lines


def main(*, quick: bool) -> None:
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, {psutil.cpu_count(logical=False)} cores "
        f"({platform.machine()}), gloo on loopback; `./scripts/bench`",
        "",
        "Milliseconds a step, and ratio to the hand-written loop of the same round: median (lowest to highest of 9).",
        "",
        *cost_table([cost(*row) for row in (QUICK if quick else ROWS)]),
        "",
        "A checkpoint of 100 million float32 parameters: median (range) of 5.",
        "",
        *stall_table(stall()),
    ]
    print("\n".join(lines))
    if not quick:
        (HERE / "results.md").write_text("# Measured\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
