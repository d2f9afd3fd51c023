"""How each engine is told to run the digits on as many ranks, one command a node."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

BIN = Path(sys.executable).parent
RECIPE = Path(__file__).resolve().parent.parent / "scripts" / "recipes" / "digits_cnn.py"
FLAGS = ["--shards", "2", "--threads", "1", "--epochs", "12", "--checkpoint-every", "10", "--run-dir", "run"]
CONF = "join_timeout=60,last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


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
    if ranks == 1:
        return [[str(BIN / "python"), str(RECIPE), *FLAGS]]
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
    run += ["--multi_gpu", "--num_processes", str(ranks), "--max_restarts", "3"]
    return [[*run, "--main_process_port", str(free_port()), str(RECIPE), *FLAGS]]


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
