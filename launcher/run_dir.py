"""Make the run directory ready: private, and without the error records and stacks of earlier runs."""

from __future__ import annotations

import contextlib
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
        if (found := obstacle(nearest)) is not None:
            raise _unusable(path, *found, logs=logs)
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
    except OSError as error:  # a name that is too long
        raise _unusable(path, (error.strerror or str(error)).lower(), logs=logs) from None
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unusable(path, f"{nearest} is not writable", logs=logs)


def obstacle(path: Path) -> tuple[str, str] | None:
    """What is at `path` or above it and no folder, and the fix where there is one; None where folders can be made.

    Of a symlink to nothing the system says "File exists", as the link does.
    """
    with contextlib.suppress(OSError):  # a name that is too long: whoever makes the folder hears of it
        return next(filter(None, map(_in_the_way, (path, *path.parents))), None)
    return None


def _in_the_way(part: Path) -> tuple[str, str] | None:
    if part.exists():
        return None if part.is_dir() else (f"{part} is not a directory", "")
    if not part.is_symlink():
        return None
    target = os.path.realpath(part)
    if os.path.islink(target):  # noqa: PTH114 (of a string)
        return f"{part} is a symlink that leads back to itself", "remove it"
    return f"{part} is a symlink to {target}, which does not exist", f"create {target}, remove the symlink"


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


def _unusable(path: Path, reason: str, fix: str = "", *, logs: bool = False) -> UsageError:
    what = "folder for logs" if logs else "run directory"
    other = f"choose another one: {'--log-dir before the recipe' if logs else OTHER_RUN_DIR}"
    return UsageError(
        f"the {what} {path} is expected to be writable, but {reason}", f"{fix}, or {other}" if fix else other
    )
