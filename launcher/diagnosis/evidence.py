"""Gather what ended ranks left behind, for `diagnose` to judge, and note the verdict in the run's events."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from samestep.launcher.contract import ErrorRecord, RunDir, WorkerFailed
from samestep.launcher.diagnosis.diagnose import Evidence, Failure
from samestep.launcher.plan import Command
from samestep.launcher.supervise.outcome import Generation, RankEnd


def gather(generation: Generation, commands: Sequence[Command], run_dir: RunDir) -> list[Evidence]:
    """One Evidence a rank, in the order of their deaths."""
    by_rank = {command.rank: command for command in commands}
    return [of_rank(end, by_rank[end.rank], run_dir, generation.number) for end in generation.ends]


def of_rank(end: RankEnd, command: Command, run_dir: RunDir, generation: int) -> Evidence:
    """What one rank left behind."""
    message, time_ns = _elastic(command.elastic_error)
    return Evidence(end, str(command.log), _record(run_dir.error(end.rank), generation), message, time_ns)


def _record(path: Path, generation: int) -> ErrorRecord | None:
    try:
        record = ErrorRecord.from_json(path.read_text())
    except (OSError, ValueError):
        return None
    return record if record.generation == generation else None  # an older one has been dealt with


def _elastic(path: Path) -> tuple[str, int]:
    """Message and time that torch's @record wrote; older forms of the file hold a bare string."""
    try:
        message = json.loads(path.read_text())["message"]
        if isinstance(message, str):
            return message, 0
        return str(message["message"]), int(message["extraInfo"]["timestamp"]) * 1_000_000_000
    except (OSError, ValueError, KeyError, TypeError):
        return "", 0


def note_failure(failure: Failure, exit_code: int, run_dir: RunDir) -> None:
    """Append `worker_failed` to events.jsonl, which exists only where a recipe ran."""
    event = WorkerFailed(
        event="worker_failed",
        time=time.time(),
        seen=failure.seen_ns / 1e9 or time.time(),
        rank=failure.rank,
        step=failure.step,
        phase=failure.phase,
        cause=failure.cause,
        exit_code=exit_code,
    )
    try:
        events = os.open(run_dir.events, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.write(events, (json.dumps(event) + "\n").encode())  # one write: no other writer gets into the line
    except OSError:
        pass  # a full disk hides no failure: it is printed too
    finally:
        os.close(events)
