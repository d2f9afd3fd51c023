"""What the last start of a run has left in its run directory, and what the next one does otherwise."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samestep.launcher import manifest
from samestep.launcher.contract import RunDir, UsageError
from samestep.launcher.secret_names import without_secrets
from samestep.train import sources
from samestep.train.config import TrainConfig, plain
from samestep.train.state.resume import is_elsewhere

_COUNTS = ("shards", "threads", "micro_batches")
_TABLES = ("config", "environment", "code")
_LARGEST = (1 << 31) - 1  # torch's own, of threads
# Options that may change between two starts of a run without anybody noticing.
_FREE = frozenset(
    "epochs max_steps log_every eval_every checkpoint_every checkpoint_seconds keep_checkpoints "
    "resume run_dir num_workers config shards threads micro_batches weights best check trackers replay debug "
    "profile".split()
)


def stored_config(run_dir: RunDir, resume: str) -> dict[str, Any]:
    """What an earlier start of this run wrote, or the run and checkpoint that it begins with; empty for a new run.

    Raises:
        UsageError: a setting in config.json is none.
    """
    own = manifest.committed(run_dir.checkpoints)
    if own or not is_elsewhere(run_dir, resume):
        return _facts(own) | settings(run_dir.config)
    path = Path(resume).resolve()
    other = RunDir(path.parent.parent)
    theirs = settings(other.config) if path.parent == other.checkpoints else {}  # else it was copied out of its run
    return {name: theirs[name] for name in _TABLES if name in theirs} | _facts([path])


def settings(file: Path) -> dict[str, Any]:
    """What a file of the run directory tells; empty where it can't be read, and without what is null.

    Raises:
        UsageError: one that a start computes with is neither a number from 1 nor, as it should be, a table.
    """
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_bytes())
        if isinstance(content, dict):
            found = {name: value for name, value in content.items() if value is not None}
    for name in _COUNTS:
        value = found.get(name, 1)
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise _edited(file, name, "a whole number from 1", value)
    for name in _TABLES:
        if not isinstance(found.get(name, {}), dict):
            raise _edited(file, name, "an object", found[name])
    return found


def _edited(file: Path, name: str, expected: str, value: object) -> UsageError:
    return UsageError(
        f"{name} in {file} is expected to be {expected}, but is {json.dumps(value)[:80]}",
        f"put back what it was, or remove {name} from the file",
    )


def changes(
    config: TrainConfig,
    stored: dict[str, Any],
    record: dict[str, Any],
    *,
    follows_evaluations: bool = False,
    elsewhere: bool = False,
) -> list[str]:
    """What of settings and code is not as at the last start and can change bits, but neither order nor shapes.

    `follows_evaluations`: the learning rate does (ReduceLROnPlateau), so when they come matters. `elsewhere`: it begins
    with another run's checkpoint, so that run's settings are meant.
    """
    since = "the run that this one begins with" if elsewhere else "the last start"
    if "config" not in stored:
        return [f"what changed since {since} can't be told: its config.json can't be read"]
    free = _FREE - {"eval_every"} if follows_evaluations else _FREE
    before, after = without_secrets(stored["config"]), plain(config)
    differing = [(f"--{name.replace('_', '-')}", before[name], after[name]) for name in after if name in before]
    differing = [(name, old, new) for name, old, new in differing if name[2:].replace("-", "_") not in free]
    environment = stored.get("environment", {})
    differing += [(name, environment.get(name), record.get(name)) for name in record | environment]
    told = [f"{n} changed from {old} to {new}" for n, old, new in differing if old != new and n != "python"]
    edited = sources.changed(stored.get("code", {}), sources.of_recipe())
    told += [f"the recipe's code changed in {edited}"] if edited else []
    return [f"{what} since {since}" for what in told]


def _facts(checkpoints: Sequence[Path]) -> dict[str, Any]:
    for folder in checkpoints:
        with contextlib.suppress(ValueError):
            facts = manifest.read(folder)
            return {name: facts[name] for name in _COUNTS if name in facts}
    return {}
