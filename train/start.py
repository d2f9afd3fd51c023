"""From an empty or used run directory to the point where training begins or goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from samestep.launcher.contract import ENV_FENCE, ENV_RUN_DIR, ExitCode, RunDir, UsageError
from samestep.launcher.lock import RunLock
from samestep.launcher.run_dir import obstacle
from samestep.train.config import TrainConfig
from samestep.train.observe.guards.check import listed
from samestep.train.parallel.group import gather_json
from samestep.train.parallel.join import Membership
from samestep.train.state import checkpoint
from samestep.train.state.resume import look
from samestep.train.state.train_state import TrainState

# What people edit; other entries of a group may be an optimizer's own counters.
_BESIDE_A_SCHEDULER = frozenset(
    "alpha amsgrad centered dampening eps initial_lr maximize nesterov weight_decay".split()
)
_OF_AN_OPTIMIZER = (_BESIDE_A_SCHEDULER - {"initial_lr"}) | {"betas", "lr", "momentum"}


def make(run_dir: RunDir) -> None:
    """Create the run directory and see that it can be written.

    Raises:
        UsageError: it can't.
        OSError: this process is out of descriptors, which says nothing about the folder.
    """
    try:
        for folder in (run_dir.path, run_dir.logs, run_dir.checkpoints, run_dir.errors):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = run_dir.path / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        reason, fix = obstacle(run_dir.path) or ((error.strerror or str(error)).lower(), "")
        raise UsageError(
            f"--run-dir {run_dir.path} is expected to be a folder that can be written, but {reason}",
            f"{fix}, or pass --run-dir with another folder" if fix else "pass --run-dir with another folder",
        ) from None


def choose_shards(config: TrainConfig, stored: dict[str, Any], world_size: int) -> int:
    """V: as at the first launch; by default the world size of that launch.

    Raises:
        UsageError: `--shards` says another number than the first launch.
    """
    known = stored.get("shards")
    if known is not None and config.shards not in (None, known):
        raise UsageError(
            f"--shards is expected to stay {known}, as at the first launch of this run, but is {config.shards}",
            "leave --shards out, or start a new run with another --run-dir",
        )
    return int(known or config.shards or world_size)


@dataclass(frozen=True, slots=True)
class Found:
    """Where training goes on: nothing for a new run."""

    snapshot: checkpoint.Snapshot | None = None
    source: str = ""  # name of the folder
    warnings: tuple[str, ...] = ()
    ended: bool = False  # the run got to its last event with just this state
    note: str = ""  # where --resume does not come to what it says
    begun: dict[str, str] = field(default_factory=dict)  # how, for config.json
    elsewhere: bool = False  # it is another run's
    starts: tuple[float, ...] = ()  # times of those before this one, seconds since 1970


def find_state(run_dir: RunDir, config: TrainConfig, member: Membership) -> Found:
    """The state to go on from; rank zero looks, all ranks load. A collective.

    Raises:
        UsageError: see `resume.look`; on every rank.
    """
    seen = on_rank_zero(lambda: look(run_dir, config.resume, os.environ), member)
    found = Found(warnings=tuple(seen["warnings"]), ended=seen["ended"], note=seen["note"], begun=seen["begun"])
    found = replace(found, elsewhere=seen["elsewhere"], starts=tuple(seen["starts"]))
    if not seen["path"]:
        return found
    folder = Path(seen["path"])
    return replace(found, snapshot=checkpoint.load(folder), source=folder.name)


def on_rank_zero(look: Callable[[], dict[str, Any]], member: Membership) -> dict[str, Any]:
    """What rank zero finds, on every rank. A collective.

    Args:
        look: called on rank zero alone; what it returns has to be such that JSON can write it.
        member: all ranks of the run.

    Raises:
        UsageError: `look` raised it on rank zero; all ranks raise the same one, so that none waits for the others.
    """
    seen: dict[str, Any] = {}
    if member.group.rank == 0:
        try:
            seen = look()
        except UsageError as error:
            seen = {"error": [error.message, error.hint, int(error.exit_code)]}
    seen = gather_json(member.group, seen)[0]
    if "error" in seen:
        message, hint, code = seen["error"]
        raise UsageError(message, hint, ExitCode(code))
    return seen


@contextlib.contextmanager
def owned(run_dir: RunDir, member: Membership, environ: Mapping[str, str] = os.environ) -> Iterator[int]:
    """Own the run directory, through the launcher or, where none of ours is above, by oneself. A collective.

    Gives the generation of its lock, without which no checkpoint is published.

    Raises:
        UsageError: another run uses the directory, or its lock can't be written; on every rank.
    """
    held: list[RunLock] = []

    def take() -> dict[str, Any]:
        if environ.get(ENV_FENCE) and Path(environ.get(ENV_RUN_DIR, "")).absolute() == run_dir.path.absolute():
            return {"fence": int(environ[ENV_FENCE])}
        try:
            held.append(RunLock(run_dir))
        except OSError as error:
            raise UsageError(
                f"{run_dir.lock} is expected to be writable, but: {error.strerror or error}",
                "make room, or pass --run-dir with another folder",
            ) from None
        return {"fence": held[0].generation}

    try:
        yield int(on_rank_zero(take, member)["fence"])
    finally:
        for lock in held:
            lock.release()


def restore(state: TrainState, snapshot: checkpoint.Snapshot, source: str) -> list[str]:
    """Load a snapshot into the parts of a run; a sentence where `build` has given the optimizer other numbers.

    Raises:
        UsageError: seed, order, dataset or shards are not the snapshot's, or the model has other names or shapes.
    """
    for name in ("seed", "order", "dataset", "shards"):
        before, now = snapshot.facts.get(name), state.facts[name]
        if before != now:
            harm = "the bits would be others" if name == "shards" else "samples would be repeated and left out"
            raise UsageError(
                f"{name} is expected to be as in {source}, but changed from {before} to {now}",
                f"{harm}: restore it, or start a new run with another --run-dir",
            )
    optimizer = state.components.optimizer
    scheduled = state.components.scheduler is not None or getattr(optimizer, "scheduled", False)
    built = [dict(group) for group in getattr(optimizer, "param_groups", [])]
    try:
        state.restore(snapshot)
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        first = " ".join(str(error).split())[:300]
        raise UsageError(
            f"model and optimizer are expected to fit {source}, but do not: {first}",
            "restore the code of the first launch, or start a new run with another --run-dir",
        ) from error
    return _overridden(built, getattr(optimizer, "param_groups", []), source, scheduled=scheduled)


def _overridden(
    built: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]], source: str, *, scheduled: bool
) -> list[str]:
    """What torch takes from the checkpoint although the code was edited, but for what a scheduler moves."""
    names = _BESIDE_A_SCHEDULER if scheduled else _OF_AN_OPTIMIZER
    found = []
    for number, (here, there) in enumerate(zip(built, saved, strict=False)):
        where = f" of group {number}" if len(saved) > 1 else ""
        for name in sorted(names & here.keys() & there.keys()):
            new, old = (v.tolist() if isinstance(v, torch.Tensor) else v for v in (here[name], there[name]))
            if new != old:
                found.append(f"{name}{where} is {old} there and {new} in build")
    if not found:
        return []
    begin = "to begin with the new values, pass another --run-dir and --weights"
    return [f"the optimizer goes on as it was saved in {source}: {listed(found)} ({begin})"]


def count(state: TrainState, found: Found, generation: int) -> None:
    """Restarts and time of this run directory: also of starts that no checkpoint knows, and of no other run."""
    if found.elsewhere:
        state.restarts, state.useful_seconds, state.started_at = 0, 0.0, time.time()
    state.restarts = max(state.restarts, generation, len(found.starts))
    state.started_at = min(state.started_at, *found.starts, time.time())


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Start from a plain state_dict in safetensors; nothing else is accepted, since only it can't run code.

    Raises:
        UsageError: not such a file, or other names and shapes than the model's.
    """
    try:
        weights = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(
            f"--weights is expected to be a safetensors file, but {path} is not one ({error})",
            "convert a trusted pickle once: safetensors.torch.save_file(state_dict, path)",
        ) from None
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UsageError(
            f"--weights is expected to fit the model, but {path} does not: {' '.join(str(error).split())[:300]}"
        ) from None
