"""Every option of a recipe, defined once: flag, environment name, TOML key, help and README table come from here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from samestep.launcher.command_line.options import Option
from samestep.launcher.contract import UsageError
from samestep.launcher.secret_names import without_secrets

DEFAULT_CHECKPOINT_SECONDS = 60.0


@dataclass(kw_only=True)
class TrainConfig:
    """What a run is asked to do. Subclass it to add a recipe's own options or change a default.

    Raises:
        UsageError: a value outside its range; names the option, the range and the value.
    """

    epochs: Annotated[int, Option("total epochs of the run, not additional ones", "epochs")] = 1
    max_steps: Annotated[int | None, Option("stop after so many optimizer steps in total", "steps")] = None
    global_batch_size: Annotated[int, Option("samples of one optimizer step, over all ranks", "samples")] = 32
    seed: Annotated[int, Option("key of order, initialisation, dropout and augmentation")] = 0
    shards: Annotated[
        int | None, Option("logical shards of a global batch; default: world size of the first launch", "shards")
    ] = None
    micro_batches: Annotated[
        int | Literal["auto"],
        Option("parts of a shard that run one after the other; auto: 1, doubled when CUDA runs out of memory", "parts"),
    ] = "auto"
    reduction: Annotated[
        Literal["exact", "fast"], Option("exact: same bits on any world size; fast: the backend's all-reduce")
    ] = "exact"
    comm_hook: Annotated[
        Literal["fp16", "bf16", "powersgd"] | None,
        Option("with --reduction fast: torch's hook that compresses gradients; outside the bit promises"),
    ] = None
    precision: Annotated[Literal["no", "fp16", "bf16"], Option("autocast of forward and loss")] = "no"
    device: Annotated[str, Option("auto, cpu, cuda or cuda:N")] = "auto"
    threads: Annotated[
        int | None, Option("CPU threads of a rank; default: physical cores // shards, at least 1", "threads")
    ] = None
    clip_grad_norm: Annotated[float | None, Option("largest norm of the reduced gradient", "norm")] = None
    nan_policy: Annotated[
        Literal["stop", "skip", "rewind"],
        Option(
            "a loss or gradient that is NaN or infinite: end the run, leave the batch out, or that from a checkpoint on"
            "; with fp16 always left out, until its loss scale is used up"
        ),
    ] = "stop"
    num_workers: Annotated[
        int | Literal["auto"], Option("loader workers of a rank; auto measures; never changes the bits", "processes")
    ] = "auto"
    log_every: Annotated[int, Option("steps between log lines; losses are read from the device only then", "steps")] = (
        100
    )
    eval_every: Annotated[int | None, Option("steps between evaluations; default: after each epoch", "steps")] = None
    checkpoint_every: Annotated[int | None, Option("steps between checkpoints; always one at the end", "steps")] = None
    checkpoint_seconds: Annotated[
        float | None,
        Option("time between checkpoints; default: 60, none by time where --checkpoint-every is given", "seconds"),
    ] = None
    keep_checkpoints: Annotated[int, Option("newest checkpoints that are kept", "checkpoints")] = 2
    resume: Annotated[str, Option("auto: go on from the newest valid checkpoint; never; or a checkpoint's PATH")] = (
        "auto"
    )
    weights: Annotated[Path | None, Option("plain state_dict in safetensors that a new run starts from", "file")] = None
    best: Annotated[
        str | None, Option("max:METRIC or min:METRIC, an evaluation metric whose best checkpoint is kept besides")
    ] = None
    run_dir: Annotated[Path | None, Option("where everything of the run is kept; default: runs/<recipe>", "folder")] = (
        None
    )
    compile: Annotated[
        bool, Option("torch.compile the model: one graph a shard size; other bits than without, on any world size")
    ] = False
    trackers: Annotated[
        str, Option("curves for other tools: tensorboard, wandb, mlflow or whatever accelerate knows, by commas")
    ] = ""
    check: Annotated[
        Literal["first", "always", "never"],
        Option("look for state that leaks between steps or ranks: in the first 3 steps of each start, or in all"),
    ] = "first"
    replay: Annotated[
        int | None, Option("run this step of an earlier run again, on one process, and compare its bits", "step")
    ] = None
    debug: Annotated[bool, Option("with --replay: stop in the debugger before that step")] = False
    profile: Annotated[
        int | None, Option("trace so many steps after the first 3, all ranks in one file for Perfetto", "steps")
    ] = None
    allow_nondeterministic: Annotated[
        bool, Option("go on where torch has no deterministic kernel; outside the bit promises")
    ] = False
    config: Annotated[Path | None, Option("TOML file with options; flags and environment win", "file")] = None

    @property
    def seconds_between_checkpoints(self) -> float | None:
        """What a stop without a moment to save can cost at most, unless somebody chose steps instead."""
        if self.checkpoint_seconds is None and self.checkpoint_every is None:
            return DEFAULT_CHECKPOINT_SECONDS
        return self.checkpoint_seconds

    def __post_init__(self) -> None:
        """Judge each value by itself; what depends on world size or data is judged where these are known."""
        least: dict[str, float] = {
            "epochs": 0,
            "max_steps": 0,
            "global_batch_size": 1,
            "shards": 1,
            "micro_batches": 1,
            "threads": 1,
            "num_workers": 0,
            "log_every": 1,
            "eval_every": 1,
            "checkpoint_every": 1,
            "keep_checkpoints": 1,
            "replay": 1,
            "profile": 1,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if isinstance(value, int) and value < bound:
                raise UsageError(f"--{name.replace('_', '-')} is expected to be at least {bound}, but is {value}")
        for name in ("clip_grad_norm", "checkpoint_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name.replace('_', '-')} is expected to be above 0, but is {value}")
        if self.debug and self.replay is None:
            raise UsageError("--debug is expected to go with --replay STEP", "or write breakpoint() where to stop")
        if self.profile is not None and self.replay is not None:
            raise UsageError("--profile is expected without --replay", "a replay is one step, and none is left out")
        if self.comm_hook is not None and self.reduction != "fast":
            raise UsageError(
                f"--comm-hook {self.comm_hook} is expected to go with --reduction fast, but it is {self.reduction}",
                "a compressed gradient can't have the exact sum's bits; add --reduction fast, or leave the hook out",
            )
        if self.best is not None and self.best.partition(":")[0] not in ("max", "min"):
            raise UsageError(f"--best is expected to be max:METRIC or min:METRIC, but is {self.best}")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed is expected to be at least 0 and below 2**63, but is {self.seed}")


def plain(config: TrainConfig) -> dict[str, Any]:
    """The options as JSON values, for files and pages: what a secret one is set to is left out."""
    values = without_secrets(asdict(config))
    return {n: v if isinstance(v, bool | int | float | str | list | dict | None) else str(v) for n, v in values.items()}
