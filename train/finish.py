"""What is done once the last step is: the weights for everybody else, what the time was good for, and the outcome."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samestep.launcher import manifest
from samestep.launcher.contract import ExitCode, RunDir, UsageError
from samestep.launcher.digest import file_digest
from samestep.train import start
from samestep.train.loop import Run
from samestep.train.parallel.join import Membership
from samestep.train.state.export import export_weights

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class Result:
    """Outcome of a run, the same on every rank.

    Attributes:
        digest: sha256 of the final weights, 64 hex characters (see `samestep digest`); with `Components.ema` of those
            that were trained, not of their average, which is what weights.safetensors holds.
        steps: optimizer steps of the whole run.
        metrics: values of the last evaluation; empty without `eval_data`.
        run_dir: where everything of the run lies.
    """

    digest: str
    steps: int
    metrics: dict[str, float]
    run_dir: Path


def close(run: Run, run_dir: RunDir, member: Membership) -> str:
    """Export the weights of a state that could be saved; the digest of its checkpoint, on every rank. A collective."""
    run.progress(run.state.step, "closing")
    digest: str = start.on_rank_zero(lambda: _saved(run, run_dir), member)["digest"]
    start.on_rank_zero(lambda: _export(run, run_dir.path / "weights.safetensors"), member)
    run.reporter.finished(digest, run.state.step, run.state.restarts, _goodput(run))
    member.group.barrier()
    return digest


def already_closed(run: Run, run_dir: RunDir, member: Membership, changed: list[str]) -> str:
    """Tell the digest of a run that ended at an earlier start, and what this one asks besides. A collective."""
    digest: str = manifest.read(run_dir.checkpoint(run.state.step))["digest"]
    run.reporter.already_finished(digest, run.state.step, changed)
    member.group.barrier()
    return digest


def _saved(run: Run, run_dir: RunDir) -> dict[str, Any]:
    try:
        return {"digest": manifest.read(run_dir.checkpoint(run.state.step))["digest"]}
    except ValueError as error:
        problem = run.saver.problem
        raise UsageError(
            f"the run is expected to end with a checkpoint of step {run.state.step}, but it was not saved "
            f"({error if problem is None else problem.strerror or problem})",
            "the warnings above say why; run again to go on from the last good checkpoint",
            _status(problem),
        ) from None


def _export(run: Run, path: Path) -> dict[str, Any]:
    try:
        export_weights(run.evaluated_model, path)
    except OSError as error:
        raise UsageError(
            f"{path} is expected to hold the trained weights, but could not be written ({error.strerror or error})",
            "all else is done and saved: make room and run again",
            _status(error),
        ) from None
    if run.state.ema is not None:
        run.reporter.note(f"{path.name} holds the average of the weights (Components.ema), digest {file_digest(path)}")
    return {}


def _status(problem: OSError | None) -> ExitCode:
    """How ranks tell a launcher that starts would be in vain until somebody makes room: a record has no room either."""
    return ExitCode.NO_PROGRESS if problem is not None and problem.errno in _FULL else ExitCode.FAILED


def _goodput(run: Run) -> float:
    """Seconds in steps that count over seconds since the first start."""
    wall = time.time() - run.state.started_at
    return min(1.0, run.state.useful_seconds / wall) if wall > 0 else 1.0
