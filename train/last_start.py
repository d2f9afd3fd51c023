"""What the last start of a run has left in its run directory, for the next one: files that people edit by hand."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samestep.launcher import manifest
from samestep.launcher.contract import RunDir, UsageError
from samestep.train.state.resume import is_elsewhere

_COUNTS = ("shards", "threads", "micro_batches")
_TABLES = ("config", "environment", "code")
_LARGEST = (1 << 31) - 1  # torch's own, of threads


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


def _facts(checkpoints: Sequence[Path]) -> dict[str, Any]:
    for folder in checkpoints:
        with contextlib.suppress(ValueError):
            facts = manifest.read(folder)
            return {name: facts[name] for name in _COUNTS if name in facts}
    return {}
