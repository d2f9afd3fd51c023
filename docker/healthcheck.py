"""Healthy (exit code 0) as long as a run in this container has said something of late; standard library only.

    healthcheck.py [FOLDER]      SAMESTEP_HEALTH_SECONDS: how long a run may be silent, 900 if not set

Looks at the events and logs of the run directory that SAMESTEP_RUN_DIR names, or of those below FOLDER.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def last_sign(folders: list[Path]) -> float | None:
    """Time at which a run last wrote an event or a line, in seconds since the epoch; None if none has begun."""
    signs = [path for folder in folders for path in (folder / "events.jsonl", *folder.glob("logs/rank-*.log"))]
    return max((path.stat().st_mtime for path in signs if path.is_file()), default=None)


def main() -> int:
    """Say how long the run has been silent, and whether that is too long."""
    named, limit = os.environ.get("SAMESTEP_RUN_DIR"), float(os.environ.get("SAMESTEP_HEALTH_SECONDS", "900"))
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    last = last_sign([Path(named)] if named else [path for path in runs.glob("*") if path.is_dir()])
    if last is None:
        print("no run has begun")
        return 1
    silent = time.time() - last
    print(f"last sign of the run: {silent:.0f} s ago, {limit:.0f} s are allowed")
    return int(silent > limit)


if __name__ == "__main__":
    sys.exit(main())
