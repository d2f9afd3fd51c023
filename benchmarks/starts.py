"""From the command to the first step, and from a killed rank to the next first step, under three launchers.

    python benchmarks/starts.py RANKS ROUNDS

The same recipe is started by samestep run, torchrun and accelerate launch in turns; its last rank kills itself once.
Prints one JSON line: median seconds and range; `lost` counts restarts that took no step within a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

PATIENCE = 60.0  # seconds
RECIPE = """
import os, signal, time
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import TensorDataset
from samestep.train import Components, supervised, train

calls, marks = 0, Path(__file__).parent / "marks"


def mark(what):
    with marks.open("a") as file:
        file.write(f"{what} {time.time()}\\n")


def loss(model, batch):
    global calls
    calls += 1
    if calls == 2 and os.environ["RANK"] == "0":
        mark("step")  # the first one is done
    if calls == 6 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 and "kill" not in marks.read_text():
        mark("kill")
        os.kill(os.getpid(), signal.SIGKILL)
    return supervised(nn.MSELoss())(model, batch)


def build(config):
    torch.manual_seed(0)
    model = nn.Linear(10, 1)
    return Components(model=model, loss=loss, optimizer=torch.optim.Adam(model.parameters()),
                      train_data=TensorDataset(torch.randn(640, 10), torch.randn(640, 1)))


if __name__ == "__main__":
    train(build)
"""


def commands(ranks: int, recipe: str) -> dict[str, list[str]]:
    programs = Path(sys.executable).parent
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    return {
        "samestep": [str(programs / "samestep"), "run", "--nproc-per-node", str(ranks), "--max-restarts", "1", recipe],
        "torchrun": [
            *(str(programs / "torchrun"), "--master-port", port, "--nproc-per-node", str(ranks)),
            *("--max-restarts", "1", recipe),
        ],
        "accelerate": [
            *(str(programs / "accelerate"), "launch", "--multi_gpu", "--num_processes", str(ranks)),
            *("--main_process_port", port, "--max_restarts", "1", recipe),
        ],
    }


def once(name: str, ranks: int) -> tuple[float, float | None]:
    """Seconds to the first step, and from the kill to the next one (None: it never came)."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, marks = Path(folder) / "recipe.py", Path(folder) / "marks"
        recipe.write_text(RECIPE)
        marks.touch()
        command = [
            *commands(ranks, str(recipe))[name],
            "--max-steps",
            "20",
            "--checkpoint-every",
            "2",
            "--device",
            "cpu",
        ]
        environ = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
        begin = time.time()
        started = psutil.Popen(command, cwd=folder, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            started.wait(PATIENCE)
        except psutil.TimeoutExpired:
            family = [*started.children(recursive=True), started]  # torchrun's ranks outlive a kill of torchrun alone
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family)
        told = [line.split() for line in marks.read_text().splitlines()]
    steps = [float(moment) for what, moment in told if what == "step"]
    kill = next(float(moment) for what, moment in told if what == "kill")
    after = next((moment for moment in steps if moment > kill), None)
    return steps[0] - begin, None if after is None else after - kill


def main(ranks: int, rounds: int) -> None:
    found: dict[str, list[tuple[float, float | None]]] = {}
    for _ in range(rounds):
        for name in commands(ranks, ""):
            found.setdefault(name, []).append(once(name, ranks))
    row: dict[str, Any] = {"W": ranks}
    for name, times in found.items():
        again = [seconds for _, seconds in times if seconds is not None]
        row[name] = {
            "first": _spread([seconds for seconds, _ in times]),
            "again": _spread(again) if again else None,
            "lost": len(times) - len(again),
        }
    print(json.dumps(row), flush=True)


def _spread(values: list[float]) -> list[float]:
    """Median, least, most."""
    return [round(value, 2) for value in (statistics.median(values), min(values), max(values))]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
