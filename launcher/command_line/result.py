"""How a run ended, as one line of JSON for programs."""

from __future__ import annotations

import json
from typing import Any

from samestep.launcher.contract import RunDir
from samestep.launcher.generations import LaunchResult


def as_json(result: LaunchResult) -> str:
    """Exit code, place and failure of a run, and what its own events say about its end.

    `digest`, `steps`, `restarts` and `goodput` are null unless the run trained to its end; `metrics` are those of the
    last evaluation.
    """
    ended, metrics = _end(RunDir(result.run_dir))
    about: dict[str, Any] = {
        "exit_code": int(result.exit_code),
        "run_dir": str(result.run_dir),
        "generations": result.generations,
        "failure": result.failure.to_dict() if result.failure else None,
    }
    return json.dumps(about | {name: ended.get(name) for name in _END} | {"metrics": metrics})


_END = ("digest", "steps", "restarts", "goodput")


def _end(run_dir: RunDir) -> tuple[dict[str, Any], dict[str, Any]]:
    ended: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    try:
        lines = run_dir.events.read_bytes().splitlines()
    except OSError:
        return ended, metrics
    for line in lines:
        if b'"eval"' in line or b'"run_finished"' in line:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            ended = event if event.get("event") == "run_finished" else ended
            metrics = event.get("metrics", {}) if event.get("event") == "eval" else metrics
        elif b'"step"' in line:
            ended = {}  # it went on after that end
    return ended, metrics
