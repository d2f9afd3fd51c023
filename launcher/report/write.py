"""Writes the page: whole or not at all, with plotly's script taken from the installed package."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from samestep.launcher.contract import ExitCode, RunDir, UsageError
from samestep.launcher.report.history import History, read
from samestep.launcher.report.page import render


def write(run_dirs: Sequence[RunDir], output: Path) -> None:
    """Make the page of one or several runs at `output`, readable for its owner only.

    Raises:
        UsageError: a folder holds no run, or `output` can't be written.
    """
    histories = told_apart([read(run_dir) for run_dir in run_dirs], run_dirs)
    script = plotly_script()
    stays = output.exists() and not output.is_file()  # a device or a pipe is written to, never replaced
    target = Path(os.path.realpath(output)) if output.is_file() else output  # and what a link leads to, not the link
    temporary = output if stays else target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        opened = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(opened, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(render(histories, script))
        if not stays:
            temporary.replace(target)
    except OSError as error:
        raise UsageError(
            f"the report is expected to be written to {output}, but: {error.strerror}",
            "choose another file with --output",
        ) from None
    finally:
        if not stays:
            with contextlib.suppress(OSError):  # a file system that can only be read has none
                temporary.unlink()


def told_apart(histories: Sequence[History], run_dirs: Sequence[RunDir]) -> list[History]:
    """Runs whose folders have the same name are named by their paths."""
    times = Counter(history.name for history in histories)
    pairs = zip(histories, run_dirs, strict=True)
    return [replace(history, name=str(d.path)) if times[history.name] > 1 else history for history, d in pairs]


def plotly_script() -> str:
    """plotly.min.js as it was installed; the package itself takes long to import and is not needed.

    Raises:
        UsageError: plotly is not installed.
    """
    found = importlib.util.find_spec("plotly")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "package_data" / "plotly.min.js"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise UsageError(
        "plotly is expected to be installed with its script, but is not", "pip install plotly", ExitCode.USAGE
    )
