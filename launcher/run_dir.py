"""Make the run directory ready: private, and without the error records and stacks of earlier runs."""

from __future__ import annotations

import os
from pathlib import Path

from samestep.launcher.contract import RunDir, UsageError
from samestep.launcher.lock import OTHER_RUN_DIR, RunLock


def check(path: Path, *, logs: bool = False) -> None:
    """Judge whether `path` can become a run directory, or a folder for logs, and create nothing.

    Raises:
        UsageError: it is a file, or can't be created or written to.
    """
    nearest = path.absolute()
    try:
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
    except OSError as error:  # a name that is too long
        raise _unusable(path, (error.strerror or str(error)).lower(), logs=logs) from None
    if not nearest.is_dir():
        raise _unusable(path, f"{nearest} is not a directory", logs=logs)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unusable(path, f"{nearest} is not writable", logs=logs)


def own(path: Path) -> tuple[RunDir, RunLock]:
    """Create the directory (0700) with logs/ and errors/, take its lock, drop what earlier runs left in errors/.

    Raises:
        UsageError: the file system refuses, or the directory is in use.
    """
    run_dir = RunDir(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)  # one that exists keeps its mode: it may be a folder of somebody's
        run_dir.logs.mkdir(exist_ok=True)
        run_dir.errors.mkdir(exist_ok=True)
        lock = RunLock(run_dir)
        for pattern in ("rank-*.json", "stacks-*.txt"):
            for stale in run_dir.errors.glob(pattern):
                stale.unlink()
    except OSError as error:
        raise _unusable(path, (error.strerror or str(error)).lower()) from None
    return run_dir, lock


def holds_training(run_dir: RunDir) -> bool:
    """Whether ranks have trained there with us: also those of a program whose text does not tell that it will."""
    return run_dir.config.is_file()


def prepare_logs(path: Path) -> None:
    """Create a log folder outside the run directory.

    Raises:
        UsageError: the file system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(path, (error.strerror or str(error)).lower(), logs=True) from None


def _unusable(path: Path, reason: str, *, logs: bool = False) -> UsageError:
    what = "folder for logs" if logs else "run directory"
    return UsageError(
        f"the {what} {path} is expected to be writable, but {reason}",
        f"choose another one: {'--log-dir before the recipe' if logs else OTHER_RUN_DIR}",
    )
