"""`samestep report RUN_DIR [RUN_DIR ...]`, and the page that `samestep run` leaves at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from samestep.launcher.command_line.argv import interleaved
from samestep.launcher.command_line.options import Option, load
from samestep.launcher.contract import RunDir, UsageError


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Options of `samestep report`."""

    output: Annotated[
        str | None,
        Option("Where to write the page; default: report.html in the run directory, or here for several runs", "file"),
    ] = None


def command(argv: Sequence[str]) -> Path:
    """Make the page and return where it is.

    Raises:
        UsageError: a folder holds no run, or the page can't be written.
    """
    own, words = interleaved(argv, ReportConfig, "samestep report")
    config = load(ReportConfig, own, {}, program="samestep report", operands="RUN_DIR...")
    if not words:
        raise UsageError("report is expected to be followed by run directories, but is not", "samestep report RUN_DIR")
    run_dirs = [RunDir(Path(word)) for word in words]
    output = Path(config.output) if config.output else run_dirs[0].report if len(run_dirs) == 1 else Path("report.html")

    from samestep.launcher.report.write import write

    write(run_dirs, output)
    return output


def at_the_end(run_dir: RunDir) -> str:
    """Make the page of a run that has just ended, unless it is up to date; a sentence if that fails, else empty.

    A run that is done stays done whatever happens here, so nothing is raised.
    """
    try:
        if not run_dir.events.exists() or _is_newer(run_dir.report, run_dir.events):
            return ""
        from samestep.launcher.report.write import write

        write([run_dir], run_dir.report)
    except KeyboardInterrupt:
        return f"interrupted; samestep report {run_dir.path} makes it"
    except UsageError as error:
        return error.message
    except Exception as error:  # noqa: BLE001 (see above)
        return f"{type(error).__name__}: {error}"
    return ""


def _is_newer(path: Path, other: Path) -> bool:
    return path.exists() and path.stat().st_mtime_ns > other.stat().st_mtime_ns
