"""All that the launcher and its workers agree on: exit codes, environment, run directory, events, error records.

The two sides are different processes, often different hosts, and share no memory: whatever crosses that border is
named here and nowhere else. Standard library only, so the launcher can use it without importing torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Literal, NotRequired, TypedDict


class ExitCode(IntEnum):
    """What the exit status of a run means; README lists the same table."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    BUG = 70
    PREEMPTED_SAVED = 75
    PREEMPTED_KEPT = 76
    NO_PROGRESS = 77
    NO_CHECKPOINT = 78
    INTERRUPTED = 130
    TERMINATED = 143


EXIT_MEANING: Mapping[ExitCode, str] = {
    ExitCode.DONE: "done",
    ExitCode.FAILED: "user code or a worker failed for good",
    ExitCode.USAGE: "usage or configuration, never restarted",
    ExitCode.BUG: "a bug of samestep",
    ExitCode.PREEMPTED_SAVED: "preempted, checkpoint saved, run again",
    ExitCode.PREEMPTED_KEPT: "preempted, last periodic checkpoint kept, run again",
    ExitCode.NO_PROGRESS: "no progress, do not run again",
    ExitCode.NO_CHECKPOINT: "no valid checkpoint left",
    ExitCode.INTERRUPTED: "stopped by the operator without saving",
    ExitCode.TERMINATED: "stopped by the operator without saving",
}


class UsageError(Exception):
    """A mistake of the person who typed: `message` says setting, expectation and actual value, `hint` the fix."""

    def __init__(self, message: str, hint: str = "", exit_code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        """The text as it is printed: one sentence, and on a second line the hint."""
        return f"error: {self.message}" + (f"\nhint: {self.hint}" if self.hint else "")


class RefusedStepError(UsageError):
    """A step that no rank may take, today or at another start; `consequence`: another rank is the reason."""

    def __init__(self, message: str, hint: str, *, consequence: bool) -> None:
        super().__init__(message, hint, ExitCode.FAILED)
        self.consequence = consequence


# Names of environment variables that the launcher sets and a worker reads, besides torchrun's own.
ENV_RUN_DIR = "SAMESTEP_RUN_DIR"
ENV_CONFIG = "SAMESTEP_CONFIG"  # the TOML file, as --config
ENV_GENERATION = "SAMESTEP_GENERATION"  # counts the starts of one run, from 0
ENV_STORE_FD = "SAMESTEP_STORE_FD"  # rank zero only: listening socket for the TCPStore
ENV_STORE_PORT = "SAMESTEP_STORE_PORT"
ENV_STORE_ADDR = "SAMESTEP_STORE_ADDR"  # where rank zero's socket is, if not on loopback
ENV_TOKEN = "SAMESTEP_TOKEN"  # launchers of one run know it besides the run directory; never handed to a rank
ENV_HEARTBEAT_FD = "SAMESTEP_HEARTBEAT_FD"  # shared memory in which a recipe's ranks say where they are
HANDED_DOWN = (ENV_STORE_FD, ENV_HEARTBEAT_FD)  # descriptors, whose numbers a fork changes
ENV_STARTED_IN = "SAMESTEP_STARTED_IN"  # the folder in which the command was typed, from where its paths count
ENV_LAUNCHED = "SAMESTEP_LAUNCHED"  # "1" below `samestep run`
ENV_FENCE = "SAMESTEP_FENCE"  # generation in the run directory's lock that a checkpoint needs to be published
ENV_PDB = "SAMESTEP_PDB"  # the rank that has the terminal; the others wait for it as long as it takes
ENV_JOIN_TIMEOUT = "SAMESTEP_JOIN_TIMEOUT"  # seconds that a rank waits for the others before training can begin

ENV_GRACE = "SAMESTEP_GRACE_SECONDS"  # between the first request to stop and the end by force

# Names that say something else than the value of a recipe's option, which may be called so.
NOT_OPTIONS = frozenset(
    {
        *(ENV_GENERATION, ENV_STORE_FD, ENV_STORE_PORT, ENV_STORE_ADDR, ENV_TOKEN, ENV_HEARTBEAT_FD),
        *(ENV_LAUNCHED, ENV_FENCE, ENV_PDB, ENV_JOIN_TIMEOUT, ENV_GRACE, ENV_STARTED_IN),
    }
)

DEFAULT_GRACE_SECONDS = 25.0  # below the 30 seconds of torchrun, Kubernetes and most schedulers


@dataclass(frozen=True, slots=True)
class WorkerEnv:
    """Where a worker stands. `rank` and `world_size` count processes over all nodes, `local_*` on this node.

    who_started.py makes it from the environment.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    nnodes: int = 1
    master_addr: str = ""
    master_port: int = 0
    distributed: bool = False  # False: nobody started us as a rank, there is no process group
    started_by: str = ""  # for people, such as "Slurm (SLURM_PROCID)"
    job: str = ""  # the same on all ranks of a start whose launcher gives no address: they meet in the run directory


@dataclass(frozen=True, slots=True)
class RunDir:
    """Names of what lies in a run directory (mode 0700); README documents them as an interface."""

    path: Path

    @property
    def config(self) -> Path:
        """Resolved configuration, versions, seed, shards, threads, fingerprints of dataset and code."""
        return self.path / "config.json"

    @property
    def events(self) -> Path:
        """One JSON object a line; see the Event types below."""
        return self.path / "events.jsonl"

    @property
    def micro_batches(self) -> Path:
        """Parts of a shard from the next start on, and why: a device ran out of memory."""
        return self.path / "micro_batches.json"

    @property
    def lock(self) -> Path:
        """Owner of the run directory, and the generation that may publish checkpoints."""
        return self.path / "lock"

    @property
    def logs(self) -> Path:
        """Output of every rank."""
        return self.path / "logs"

    @property
    def report(self) -> Path:
        """Page made by `samestep report`."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """Committed checkpoints and nothing else that `step-*` matches."""
        return self.path / "checkpoints"

    @property
    def errors(self) -> Path:
        """Error records of ranks that failed."""
        return self.path / "errors"

    def log(self, rank: int) -> Path:
        """Log of one rank, all generations one after another."""
        return self.logs / f"rank-{rank}.log"

    def error(self, rank: int) -> Path:
        """ErrorRecord of one rank's newest failure."""
        return self.errors / f"rank-{rank}.json"

    def stacks(self, generation: int) -> Path:
        """Stacks of all ranks, taken when one of them hung."""
        return self.errors / f"stacks-{generation}.txt"

    def not_finite(self, step: int) -> Path:
        """Ranks and sample ids of a step, counted from 1, whose loss or gradient was NaN or infinite."""
        return self.errors / f"not-finite-step-{step:08d}.json"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint taken after `step` optimizer steps."""
        return self.checkpoints / f"step-{step:08d}"


MANIFEST = "MANIFEST.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


def default_run_dir(recipe: str) -> Path:
    """`runs/<recipe stem>` below the working directory, for the path of a script or notebook, or a module's name."""
    stem = Path(recipe).stem if recipe.endswith((".py", ".ipynb")) else recipe.rsplit(".", 1)[-1]
    return Path("runs") / (stem or "run")


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRecord:
    """What a failing worker leaves in `errors/rank-N.json`; `time_ns` is the wall clock, for ordering on one host."""

    rank: int
    host: str
    pid: int
    generation: int
    step: int  # optimizer steps completed
    phase: str  # joining, build, loading, data, forward, backward, sync, optimizer, evaluation, checkpoint, closing
    kind: str  # exception class name
    message: str
    frame: str  # user frame, "file:line in function"
    traceback: str
    exit_code: int
    time_ns: int
    consequence: bool = False  # a connection to another rank broke: that rank is the culprit, not this one
    hint: str = ""
    accused: int | None = None  # the rank that this one waited for in vain
    final: bool = False  # another start would come to the same end
    remedied: bool = False  # another start will not, as `hint` says: it is no sign of being stuck

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ErrorRecord:
        """Inverse of `to_json`; unknown keys are dropped, so a newer worker can talk to an older launcher.

        Raises:
            ValueError: `text` is not such a record.
        """
        try:
            data = json.loads(text)
            return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not an error record: {error}") from error


class RankMemory(TypedDict):
    """What is known of a rank's memory when training begins."""

    gradient_bytes: NotRequired[int]  # of all parameters, once
    gradient_copies: NotRequired[int]  # so often, at most, while shards are summed
    resident_bytes: NotRequired[int]  # mapped in
    proportional_bytes: NotRequired[int]  # of which this is its share: ranks share what the fork server has loaded


class RankInfo(RankMemory):
    """One rank as `run_started` lists it."""

    rank: int
    local_rank: int
    host: str
    pid: int


class Started(TypedDict):
    """`run_started` (generation 0) and `restarted` (later ones)."""

    event: Literal["run_started", "restarted"]
    time: float
    generation: int
    world_size: int
    shards: int
    ranks: list[RankInfo]


class Spread(TypedDict):
    """One duration over all ranks, in seconds."""

    mean: float
    max: float
    slowest_rank: int


class Step(TypedDict):
    """One optimizer step; none is missing or repeated over restarts."""

    event: Literal["step"]
    time: float  # when it was done
    step: int
    epoch: int
    loss: float | None  # None: it was not finite (`loss_hex` tells), or the step had no weight
    weightless: NotRequired[bool]  # true: it had none
    loss_hex: str  # float.hex() of the objective, for comparing bits
    samples: int
    samples_per_s: float
    seconds: dict[str, Spread]  # data, forward, backward, sync, optimizer; `rank_seconds` also has `between` steps
    extra: NotRequired[dict[str, float]]
    rank_seconds: NotRequired[dict[str, list[float]]]  # at log intervals: means since the last one, by rank
    memory: NotRequired[dict[str, list[int]]]  # at log intervals: peak bytes on host and device, by rank


class Epoch(TypedDict):
    """A finished epoch; `loss` is weighted by samples (or tokens), `seconds` are those in steps and between them."""

    event: Literal["epoch"]
    time: float
    epoch: int
    loss: float | None
    loss_hex: str
    samples: int
    seconds: float


class Eval(TypedDict):
    """One evaluation over the whole of `eval_data`."""

    event: Literal["eval"]
    time: float
    step: int
    epoch: int
    metrics: dict[str, float | None]  # None: not finite
    metrics_hex: dict[str, str]
    samples: int
    seconds: float
    rank_seconds: NotRequired[list[float]]  # own work of each rank, before it waits for the others


class Checkpoint(TypedDict):
    """A checkpoint that can be gone on from; `seconds` is how long training stood still for it, on rank zero."""

    event: Literal["checkpoint"]
    time: float
    step: int
    path: str  # below checkpoints/
    seconds: float
    bytes: dict[str, int]  # by file


class Resumed(TypedDict):
    """Training goes on after `step`, in `epoch`."""

    event: Literal["resumed"]
    time: float
    step: int
    epoch: int
    checkpoint: str


class LoaderChosen(TypedDict):
    """How many loader workers a rank has from now on, and why."""

    event: Literal["loader"]
    time: float
    workers: int
    prefetch: int
    reason: str


class Told(TypedDict):
    """A sentence that was printed; a warning of one rank's slowness names `rank` and `phase`."""

    event: Literal["note", "warning"]
    time: float
    text: str
    rank: NotRequired[int]
    phase: NotRequired[str]


class Finished(TypedDict):
    """The last event of a run that trained to its end."""

    event: Literal["run_finished"]
    time: float
    digest: str
    steps: int
    restarts: int
    goodput: float  # useful step seconds / wall seconds over all generations


class Preempted(TypedDict):
    """Training was stopped after `step`; `checkpoint` is the newest committed step, None without any."""

    event: Literal["preempted"]
    time: float
    step: int
    signal: str
    checkpoint: int | None


class WorkerFailed(TypedDict):
    """Written by the launcher once all ranks have ended; `rank` is the culprit, `seen` when its end was noticed."""

    event: Literal["worker_failed"]
    time: float
    seen: float
    rank: int
    step: int | None  # optimizer steps completed
    phase: str
    cause: str
    exit_code: int


Event = Started | Step | Epoch | Eval | Checkpoint | Resumed | LoaderChosen | Told | Finished | Preempted | WorkerFailed
