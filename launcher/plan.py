"""Pure: what was asked and where the ranks meet -> one Command a rank. Creates, opens and asks nothing.

The environment is what torchrun gives (torch/distributed/elastic/agent/server/local_elastic_agent.py), so that a script
can't tell the two launchers apart, plus the names in contract.py. `TORCHELASTIC_USE_AGENT_STORE` is False: True means
that an agent runs the store, and rank zero would wait for it in vain.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from samestep.launcher.command_line.argv import Kind, Recipe
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import (
    DEFAULT_GRACE_SECONDS,
    ENV_FENCE,
    ENV_GENERATION,
    ENV_GRACE,
    ENV_HEARTBEAT_FD,
    ENV_JOIN_TIMEOUT,
    ENV_LAUNCHED,
    ENV_PDB,
    ENV_RUN_DIR,
    ENV_STARTED_IN,
    ENV_STORE_ADDR,
    ENV_STORE_FD,
    ENV_STORE_PORT,
    ENV_TOKEN,
    HANDED_DOWN,
    RunDir,
)

# Set only where the user has not: each is a default, not a decision.
_DEFAULTS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
}


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ranks of one generation find each other; `store_port` 0 means that no store socket is handed over."""

    master_addr: str
    master_port: int
    store_port: int = 0
    store_fd: int = -1
    store_addr: str = ""  # empty: loopback
    interface: str = "lo"  # on which ranks talk; empty: gloo asks the resolver for the host's own name


@dataclass(frozen=True, slots=True)
class Facts:
    """What the plan depends on besides the configuration."""

    world_size: int
    run_id: str
    python: str
    generation: int = 0
    fence: int = 0  # generation in the run directory's lock, which counts the starts of all launchers
    environ: Mapping[str, str] = field(default_factory=dict)
    resumes: bool = False  # a recipe of ours, which goes on where it was
    forks: bool = False  # ranks come from a fork server
    first_rank: int = 0  # of this machine
    local_world_size: int | None = None  # ranks of this machine, None: all
    node_rank: int = 0
    nnodes: int = 1
    heartbeat_fd: int = -1  # of a recipe's ranks
    max_restarts: int = 0
    devices: str = ""  # CUDA devices that are left, once one is gone
    grace: float = DEFAULT_GRACE_SECONDS


@dataclass(frozen=True, slots=True)
class Command:
    """One rank: `env` is added to the launcher's own environment and `unset` taken out of it."""

    rank: int
    local_rank: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    unset: tuple[str, ...]
    log: Path
    elastic_error: Path
    pass_fds: tuple[int, ...] = ()
    recipe: Recipe | None = None  # what a fork server may run in place of argv
    reads_stdin: bool = False  # ours, which only one rank can
    has_terminal: bool = False  # its streams are ours, no pipes
    signal_group: bool = False  # a shell passes no signal on, so its children must be told themselves

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Whole environment of the rank."""
        return {name: value for name, value in base.items() if name not in self.unset} | dict(self.env)


def plan(config: LaunchConfig, recipe: Recipe, run_dir: RunDir, meeting: Meeting, facts: Facts) -> tuple[Command, ...]:
    """One command for every rank of a generation on this machine."""
    count = facts.world_size if facts.local_world_size is None else facts.local_world_size
    ranks = range(facts.first_rank, facts.first_rank + count)
    return tuple(_command(config, recipe, run_dir, meeting, facts, rank) for rank in ranks)


def _command(
    config: LaunchConfig, recipe: Recipe, run_dir: RunDir, meeting: Meeting, facts: Facts, rank: int
) -> Command:
    elastic_error = (run_dir.errors / f"rank-{rank}.torchelastic-{facts.generation}.json").absolute()
    has_store_socket = bool(meeting.store_port) and rank == 0
    local_rank = rank - facts.first_rank
    env = {
        **_defaults(facts, meeting.interface),
        **_torchrun(config, meeting, facts, rank),
        "TORCHELASTIC_ERROR_FILE": str(elastic_error),
        ENV_LAUNCHED: "1",
        ENV_STARTED_IN: str(Path.cwd()),
        ENV_RUN_DIR: str(run_dir.path.absolute()),
        ENV_GENERATION: str(facts.generation),
        ENV_FENCE: str(facts.fence),
        ENV_JOIN_TIMEOUT: str(config.join_timeout),
        ENV_GRACE: str(facts.grace),
    }
    if meeting.store_port:
        env[ENV_STORE_PORT] = str(meeting.store_port)
    if meeting.store_addr:
        env[ENV_STORE_ADDR] = meeting.store_addr
    if has_store_socket:
        env[ENV_STORE_FD] = str(meeting.store_fd)
    if facts.heartbeat_fd >= 0:
        env[ENV_HEARTBEAT_FD] = str(facts.heartbeat_fd)
    if config.pdb is not None:
        env[ENV_PDB] = str(config.pdb)
    if config.cpu:
        env["ACCELERATE_USE_CPU"] = "true"
    if facts.devices:
        env["CUDA_VISIBLE_DEVICES"] = facts.devices
    if config.virtual_local_rank:
        env |= {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": _own_gpu({**facts.environ, **env}, local_rank)}
    # torchrun replaces this one macro in the arguments
    words = tuple(word.replace("${local_rank}", str(local_rank)) for word in recipe.arguments)
    mine = Recipe(recipe.target, words, recipe.kind)
    logs = Path(config.log_dir) if config.log_dir else run_dir.logs
    return Command(
        rank=rank,
        local_rank=local_rank,
        argv=_argv(mine, facts.python),
        env=env,
        unset=(ENV_TOKEN, *(name for name in (*HANDED_DOWN, ENV_STORE_PORT, ENV_STORE_ADDR) if name not in env)),
        log=logs / f"rank-{rank}.log",
        elastic_error=elastic_error,
        pass_fds=tuple(int(env[name]) for name in HANDED_DOWN if name in env),
        reads_stdin=rank == (0 if config.pdb is None else config.pdb),
        has_terminal=rank == config.pdb,
        signal_group=recipe.kind is Kind.COMMAND,
        recipe=mine if facts.forks else None,
    )


def _torchrun(config: LaunchConfig, meeting: Meeting, facts: Facts, rank: int) -> dict[str, str]:
    world_size = str(facts.world_size)
    local_size = world_size if facts.local_world_size is None else str(facts.local_world_size)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank - facts.first_rank),
        "ROLE_RANK": str(rank),
        "GROUP_RANK": str(facts.node_rank),
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": local_size,
        "ROLE_WORLD_SIZE": world_size,
        "GROUP_WORLD_SIZE": str(facts.nnodes),
        "ROLE_NAME": config.role,
        "MASTER_ADDR": meeting.master_addr,
        "MASTER_PORT": str(meeting.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(facts.generation),
        "TORCHELASTIC_MAX_RESTARTS": str(facts.max_restarts),
        "TORCHELASTIC_RUN_ID": config.rdzv_id or facts.run_id,
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }


def _defaults(facts: Facts, interface: str = "lo") -> dict[str, str]:
    wanted = dict(_DEFAULTS)  # gloo otherwise asks the resolver for the host's own name, and may listen to the world
    if interface:
        wanted["GLOO_SOCKET_IFNAME"] = interface
    if facts.world_size > 1:
        wanted["OMP_NUM_THREADS"] = "1"
    return {name: value for name, value in wanted.items() if name not in facts.environ}


def fork_server_environment(facts: Facts) -> dict[str, str]:
    """What all ranks have in common: torch and the interpreter read some of it while they start."""
    common = _defaults(facts)
    if facts.local_world_size is not None or facts.nnodes > 1:
        common.pop("GLOO_SOCKET_IFNAME", None)  # each generation chooses
    return {name: value for name, value in facts.environ.items() if name != ENV_TOKEN} | common


def _own_gpu(environ: Mapping[str, str], local_rank: int) -> str:
    visible = [entry.strip() for entry in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    return visible[local_rank] if local_rank < len(visible) else str(local_rank)


def _argv(recipe: Recipe, python: str) -> tuple[str, ...]:
    start = {Kind.SCRIPT: (python,), Kind.MODULE: (python, "-m"), Kind.COMMAND: ()}[recipe.kind]
    return (*start, recipe.target, *recipe.arguments)


def render(commands: tuple[Command, ...]) -> str:
    """The plan as shell commands, a line a rank, ready to be pasted into as many terminals."""
    lines = []
    for command in commands:
        words = [f"{name}={shlex.quote(value)}" for name, value in sorted(command.env.items())]
        lines.append(" ".join(["env", *words, shlex.join(command.argv)]))
    return os.linesep.join(lines)
