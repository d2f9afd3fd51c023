"""Pure: from the environment that a launcher gives to a process, to the rank that the process is.

torchrun's names lead, because launchers nest: `mpirun` or `srun` may start one launcher a machine, which starts the
ranks. Then come the tasks of Open MPI, MVAPICH, MPICH and Intel MPI (both Hydra), Slurm, and the pods of an Indexed
Job. Names that a shell inherits without being a task (`SLURM_NTASKS` of sbatch and salloc) start nothing. Where two
of them describe the same process, they have to agree.

Sources: torch/distributed/elastic/agent/server/local_elastic_agent.py; docs.open-mpi.org, "Environment variables set
by mpirun"; srun(1), "OUTPUT ENVIRONMENT VARIABLES"; kubernetes.io, "Indexed Job". Recorded environments of real
starts are in tests/launcher/environments.json.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from samestep.launcher.contract import ENV_LAUNCHED, ENV_STORE_PORT, UsageError, WorkerEnv
from samestep.launcher.environment_numbers import integer

_BY_HAND = "let a launcher set them: samestep run, torchrun, accelerate launch, mpirun or srun"
_NESTED = ("TORCHELASTIC_RUN_ID", ENV_LAUNCHED)  # set by launchers that number the ranks themselves


@dataclass(frozen=True, slots=True)
class _Names:
    """How one kind of launcher calls what it gives to its tasks."""

    by: str
    rank: str
    size: str
    local_rank: str
    local_size: str = ""
    job: tuple[str, ...] = ()


_MPI = (
    _Names(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",  # OMPI_COMM_WORLD_NODE_RANK counts processes of a node too, not nodes
        ("PMIX_NAMESPACE",),
    ),
    _Names(
        "MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    _Names("MPICH or Intel MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("PMI_JOBID",)),
)
_SLURM = _Names(
    "Slurm",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    job=("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
)


def worker(environ: Mapping[str, str]) -> WorkerEnv:
    """The rank that a process with this environment is; a world of one where nobody started it as a rank.

    Raises:
        UsageError: variables are missing, are no integers, or contradict each other.
    """
    torch, task = _torch(environ), _task(environ)
    if torch is None:
        return task or _pod(environ) or WorkerEnv()
    if task is not None:
        _agree(torch, task, environ)
    if not torch.master_addr and not environ.get(ENV_STORE_PORT):
        if task is None:
            raise _half_set("RANK", "MASTER_ADDR" if not environ.get("MASTER_ADDR") else "MASTER_PORT")
        return replace(torch, started_by=f"{task.started_by}, RANK agrees", job=task.job)
    return torch


def node_rank(environ: Mapping[str, str]) -> tuple[int, int, str] | None:
    """(node rank, nodes or 0 if unknown, by whom) of a launcher that an engine started once a node; None if none did.

    Raises:
        UsageError: variables are no integers, or contradict each other.
    """
    pod, given = environ.get("JOB_COMPLETION_INDEX"), environ.get("PET_NODE_RANK")
    if pod:
        index = integer(environ, "JOB_COMPLETION_INDEX")
        if given and given.isdecimal() and int(given) != index:
            raise _contradiction("JOB_COMPLETION_INDEX", index, "PET_NODE_RANK", given, "unset PET_NODE_RANK")
        return index, 0, "an Indexed Job (JOB_COMPLETION_INDEX)"
    if environ.get("SLURM_STEP_ID") and environ.get("SLURM_PROCID"):
        nodes, tasks = integer(environ, "SLURM_STEP_NUM_NODES", 1), integer(environ, "SLURM_STEP_NUM_TASKS", 1)
        if nodes > 1 and nodes == tasks:
            return integer(environ, "SLURM_NODEID"), nodes, "Slurm (SLURM_NODEID)"
    return None


def describe(env: WorkerEnv) -> str:
    """A line for people, empty for a process that nobody started as a rank."""
    if not env.distributed:
        return ""
    machines = f" on {env.nnodes} machines" if env.nnodes > 1 else ""
    ranks = f"{env.world_size} rank{'s' if env.world_size > 1 else ''}"
    return f"samestep: {ranks}{machines}, as told by {env.started_by}\n"


def exported(env: WorkerEnv, master_addr: str, master_port: int) -> dict[str, str]:
    """Torchrun's names for a rank that another launcher started: libraries and recipes look for these."""
    return {
        "RANK": str(env.rank),
        "WORLD_SIZE": str(env.world_size),
        "LOCAL_RANK": str(env.local_rank),
        "LOCAL_WORLD_SIZE": str(env.local_world_size),
        "GROUP_RANK": str(env.node_rank),
        "GROUP_WORLD_SIZE": str(env.nnodes),
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
    }


def _torch(environ: Mapping[str, str]) -> WorkerEnv | None:
    present = [name for name in ("RANK", "WORLD_SIZE") if environ.get(name)]
    if "RANK" not in present and environ.get("JOB_COMPLETION_INDEX"):
        return None
    if not present:
        stray = [name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if environ.get(name)]
        if stray and _task(environ) is None:
            raise _half_set(stray[0], "RANK")
        return None
    for name in ("RANK", "WORLD_SIZE"):
        if name not in present:
            raise _half_set(present[0], name)
    rank, world_size = integer(environ, "RANK"), integer(environ, "WORLD_SIZE")
    local_size = integer(environ, "LOCAL_WORLD_SIZE", world_size)
    master_addr, port = environ.get("MASTER_ADDR", ""), integer(environ, "MASTER_PORT", 0)
    env = WorkerEnv(
        rank=rank,
        world_size=world_size,
        local_rank=integer(environ, "LOCAL_RANK", rank % max(local_size, 1)),
        local_world_size=local_size,
        node_rank=integer(environ, "GROUP_RANK", 0),
        nnodes=integer(environ, "GROUP_WORLD_SIZE", 1),
        master_addr=master_addr if port or environ.get(ENV_STORE_PORT) else "",
        master_port=port,
        distributed=True,
        started_by="samestep run" if environ.get(ENV_LAUNCHED) else "torchrun's variables (RANK)",
    )
    _within("RANK", rank, "WORLD_SIZE", world_size)
    _within("LOCAL_RANK", env.local_rank, "LOCAL_WORLD_SIZE", local_size)
    _within("GROUP_RANK", env.node_rank, "GROUP_WORLD_SIZE", env.nnodes)
    return env


def _task(environ: Mapping[str, str]) -> WorkerEnv | None:
    """The task of an MPI or Slurm start; MPI's daemons are Slurm tasks themselves, so MPI goes first."""
    step = bool(environ.get("SLURM_STEP_ID") and environ.get("SLURM_PROCID"))
    mpi = [names for names in _MPI if environ.get(names.rank) and environ.get(names.size)]
    if step:  # srun --mpi=pmi2 speaks PMI too, and leaves the place on the node to its own names
        mpi = [names for names in mpi if environ.get(names.local_rank)]
    for other in mpi[1:]:
        if integer(environ, other.rank) != integer(environ, mpi[0].rank):
            raise _contradiction(
                mpi[0].rank, environ[mpi[0].rank], other.rank, environ[other.rank], "start with one of the two alone"
            )
    if mpi:
        return _as_rank(mpi[0], environ)
    return _as_rank(_SLURM, environ) if step else None


def _as_rank(names: _Names, environ: Mapping[str, str]) -> WorkerEnv | None:
    size = integer(environ, names.size)
    if size == 1:
        return None  # one task alone needs nobody
    rank = integer(environ, names.rank)
    _within(names.rank, rank, names.size, size)
    node, nodes = integer(environ, "SLURM_NODEID", 0), 0
    if names is _SLURM:
        nodes = integer(environ, "SLURM_STEP_NUM_NODES", 1)
        local_size = _tasks_on(node, environ.get("SLURM_STEP_TASKS_PER_NODE", ""), size, nodes)
    else:
        local_size = integer(environ, names.local_size, size)
        nodes, node = -(-size // max(1, local_size)), rank // max(1, local_size)  # as placed by slot, the default
    local_rank = integer(environ, names.local_rank, rank % max(1, local_size))
    _within(names.local_rank, local_rank, names.local_size or "SLURM_STEP_TASKS_PER_NODE", local_size)
    port = integer(environ, "MASTER_PORT", 0)
    parts = [environ[name] for name in names.job if environ.get(name)]
    return WorkerEnv(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_world_size=local_size,
        node_rank=node,
        nnodes=nodes,
        master_addr=environ.get("MASTER_ADDR", "") if port else "",
        master_port=port,
        distributed=True,
        started_by=f"{names.by} ({names.rank})",
        job=re.sub(r"[^\w.-]", "_", "-".join([names.by.split()[0].lower(), *parts])),
    )


def _pod(environ: Mapping[str, str]) -> WorkerEnv | None:
    """One rank a pod: the index is its rank, the rest has to be said by the manifest."""
    if not environ.get("JOB_COMPLETION_INDEX") or not environ.get("WORLD_SIZE"):
        return None
    rank, size = integer(environ, "JOB_COMPLETION_INDEX"), integer(environ, "WORLD_SIZE")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environ.get(name):
            raise _half_set("JOB_COMPLETION_INDEX", name)
    _within("JOB_COMPLETION_INDEX", rank, "WORLD_SIZE", size)
    return WorkerEnv(
        rank=rank,
        world_size=size,
        node_rank=rank,
        nnodes=size,
        master_addr=environ["MASTER_ADDR"],
        master_port=integer(environ, "MASTER_PORT"),
        distributed=True,
        started_by="an Indexed Job (JOB_COMPLETION_INDEX)",
    )


def _agree(torch: WorkerEnv, task: WorkerEnv, environ: Mapping[str, str]) -> None:
    """Torchrun's names beside a task's: of a launcher inside the task, or of the task itself, set by hand."""
    if any(environ.get(name) for name in _NESTED) or torch.local_world_size * task.world_size == torch.world_size:
        return
    names = next(names for names in (*_MPI, _SLURM) if f"({names.rank})" in task.started_by)
    for ours, mine, theirs, its in (
        ("WORLD_SIZE", torch.world_size, names.size, task.world_size),
        ("RANK", torch.rank, names.rank, task.rank),
    ):
        if mine != its:
            raise _contradiction(ours, mine, theirs, its, f"unset RANK and WORLD_SIZE: {names.rank} is enough")


def _tasks_on(node: int, text: str, tasks: int, nodes: int) -> int:
    """Tasks of one node in Slurm's short form: `2(x3),1` is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UsageError(f"SLURM_STEP_TASKS_PER_NODE is expected to be like 2(x3),1, but is {text!r}", _BY_HAND)
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else -(-tasks // max(1, nodes))


def _within(name: str, value: int, limit_name: str, limit: int) -> None:
    if not 0 <= value < limit:
        raise UsageError(
            f"{name} is expected to be at least 0 and below {limit_name}, but {name} is {value} and "
            f"{limit_name} is {limit}",
            _BY_HAND,
        )


def _contradiction(one: str, value: object, other: str, its: object, hint: str) -> UsageError:
    return UsageError(f"{one} and {other} are expected to agree, but {one} is {value} and {other} is {its}", hint)


def _half_set(present: str, missing: str) -> UsageError:
    return UsageError(
        f"{present} and {missing} are expected to be set together, but {missing} is not set",
        f"unset {present} for a single process, or start the script with samestep run, torchrun or accelerate launch",
    )
