"""Parts of a markdown file that programs write: between `<!-- NAME: measured -->` and `<!-- end -->`."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import re
from pathlib import Path


def read(path: Path, name: str) -> str:
    """The text of a block.

    Raises:
        SystemExit: the file has no place for it.
    """
    found = _pattern(name).search(path.read_text())
    if found is None:
        raise SystemExit(f"{path.name} is expected to have a line <!-- {name}: measured -->, and <!-- end --> below it")
    return found[2]


def write(path: Path, name: str, text: str) -> None:
    """Put `text`, which ends with a line break, in place of what the block holds; the rest of the file stays."""
    old = read(path, name)
    begin = f"<!-- {name}: measured -->\n"
    path.write_text(path.read_text().replace(f"{begin}{old}<!-- end -->", f"{begin}{text}<!-- end -->"))


def circumstances(command: str, *packages: str) -> str:
    """Command, day, versions, machine and load: what a figure needs to be believed."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "accelerate", *packages))
    return (
        f"`{command}`, {dt.datetime.now(dt.UTC):%Y-%m-%d}: {versions}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[1]:.1f} at the end."
    )


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {re.escape(name)}: measured -->\n)(.*?)(<!-- end -->)", re.DOTALL)
