"""Checkpoints that are complete and verified, or do not exist.

A folder is written beside its final name, each file is synced, MANIFEST.json with sizes and sha256 comes last, and a
rename publishes it; only then older ones go. Tensors are safetensors, the rest is JSON: loading runs no code. The
newest valid folder wins; what is damaged is set aside and named.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from samestep.launcher import lock, manifest
from samestep.launcher.contract import MANIFEST, OPTIMIZER, STATE, WEIGHTS, ExitCode, RunDir, UsageError
from samestep.launcher.digest import file_digest, state_digest
from samestep.train.state.codec import not_finite
from samestep.train.state.files import sync, write_tensors


@dataclass(slots=True)
class Snapshot:
    """All of a run's state between two steps.

    Attributes:
        step: optimizer steps completed.
        weights: parameters and persistent buffers, a tied one once.
        tensors: every other tensor of the state.
        state: JSON: counters, trees of optimizer, scheduler and scaler, alias names.
        facts: for the manifest: seed, shards, versions.
        never_finite: by a buffer's name, a bool of its shape: where it was not finite when training began.
    """

    step: int
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    facts: dict[str, Any]
    never_finite: dict[str, Tensor] = field(default_factory=dict)


class NotFiniteError(ValueError):
    """The state holds NaN or infinity; saving it would replace something good."""


def commit(
    snapshot: Snapshot,
    run_dir: RunDir,
    generation: int,
    keep: int,
    protected: Collection[int] = frozenset(),
    fence: int | None = None,
) -> Path:
    """Write a checkpoint, publish it, then remove all but the newest `keep` and those of `protected` steps.

    Another state of the same step that is there is set aside; the same state is left as it is.

    Raises:
        SupersededError: `fence` is not the run directory's newest generation; nothing is published.
        NotFiniteError: a weight is NaN or infinite, or a buffer where it was not before; nothing is written.
        OSError: it could not be written; the ones that were there still are, and nothing half-written is left.
    """
    bad = not_finite(snapshot.weights, snapshot.never_finite)
    if bad:
        raise NotFiniteError(f"{bad} holds NaN or infinity")
    final = run_dir.checkpoint(snapshot.step)
    # also apart from an earlier call of this process, whose thread may write still: a restart has another number
    start = generation if fence is None else f"{generation}-{fence}"
    temporary = final.with_name(f"{final.name}.tmp-{start}")
    _remove(temporary)
    try:
        temporary.mkdir(mode=0o700, parents=True)
        _write(snapshot, temporary)
        sync(temporary)
        lock.check(run_dir, fence)
        if final.exists():
            damaged = manifest.verify(final)
            if not damaged and state_digest(final) == state_digest(temporary):
                _remove(temporary)
                return final
            set_aside(final, "corrupt" if damaged else "superseded")
        temporary.rename(final)
    except BaseException:
        _remove(temporary)
        raise
    sync(final.parent)
    for old in manifest.committed(run_dir.checkpoints)[keep:]:
        if manifest.step_of(old) not in protected:
            _remove(old)
    return final


def _write(snapshot: Snapshot, folder: Path) -> None:
    write_tensors(_storable(snapshot.weights), folder / WEIGHTS)
    write_tensors(_storable(snapshot.tensors), folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(snapshot.state, sort_keys=True, indent=1))
    sync(folder / STATE)
    files = {}
    for name in (WEIGHTS, OPTIMIZER, STATE):
        files[name] = {"size": (folder / name).stat().st_size, "sha256": manifest.file_sha256(folder / name)}
    content = {
        "format": manifest.FORMAT,
        "step": snapshot.step,
        "files": files,
        "digest": file_digest(folder / WEIGHTS),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **snapshot.facts,
    }
    (folder / MANIFEST).write_bytes(manifest.encode(content))
    sync(folder / MANIFEST)


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the host, contiguous, and each with memory of its own: safetensors refuses views of one storage."""
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        result[name] = plain.clone() if place in storages else plain
        storages.add(place)
    return result


def load(folder: Path) -> Snapshot:
    """Read a folder that `manifest.verify` found valid."""
    content = manifest.read(folder)
    facts = {key: value for key, value in content.items() if key not in ("format", "step", "files")}
    return Snapshot(
        step=content["step"],
        weights=load_file(folder / WEIGHTS),
        tensors=load_file(folder / OPTIMIZER),
        state=load_state(folder),
        facts=facts,
    )


def load_state(folder: Path) -> dict[str, Any]:
    """The part of a checkpoint that is not tensors."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def find(run_dir: RunDir, resume: str) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The checkpoint that `--resume` means, and damaged newer ones with the reason.

    Raises:
        UsageError: `never` although there are checkpoints; a path that is not a valid checkpoint; or (exit code 78)
            checkpoints exist, but none is valid.
    """
    existing = manifest.committed(run_dir.checkpoints)
    if resume == "never":
        if existing:
            raise UsageError(
                f"--resume never is expected to start in a run directory without checkpoints, but {run_dir.path} "
                f"has {len(existing)}",
                "pass another --run-dir, or remove the old one",
            )
        return None, []
    if resume != "auto":
        folder = Path(resume)
        problem = manifest.verify(folder)
        if problem:
            raise UsageError(
                f"--resume {resume} is expected to be a valid checkpoint folder, but {problem}", _instead_of(folder)
            )
        return folder, []
    newest, damaged = manifest.newest_valid(run_dir.checkpoints)
    if newest is None and damaged:
        listed = "; ".join(f"{folder.name}: {problem}" for folder, problem in damaged)
        raise UsageError(
            f"no checkpoint in {run_dir.checkpoints} is valid ({listed})",
            "restore one from a backup, or start over with another --run-dir",
            ExitCode.NO_CHECKPOINT,
        )
    return newest, damaged


def _instead_of(folder: Path) -> str:
    """What may be meant by a path that is no checkpoint: often it is the folder of the run."""
    inside = manifest.committed(RunDir(folder).checkpoints) or manifest.committed(folder)
    if inside:
        return f"name one of its checkpoints: --resume {inside[0]}"
    return "--resume takes auto (the newest valid checkpoint), never, or the path of a checkpoint's folder"


def set_aside(folder: Path, reason: str = "corrupt") -> Path:
    """Rename a checkpoint so that nobody takes it for one, and keep it for inspection, as those before.

    Raises:
        OSError: it can't be renamed.
    """
    names = chain([f"{folder.name}.{reason}"], (f"{folder.name}.{reason}-{number}" for number in count(2)))
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    folder.rename(aside)
    sync(folder.parent)
    return aside


def remove_unfinished(run_dir: RunDir) -> None:
    """Remove what an earlier process began to write and never published."""
    if run_dir.checkpoints.is_dir():
        for leftover in run_dir.checkpoints.glob("*.tmp-*"):
            _remove(leftover)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
