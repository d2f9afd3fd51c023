"""A run directory -> the figures that `plan` starts from. Reads events and sizes of files, no weights."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samestep.launcher import manifest
from samestep.launcher.contract import OPTIMIZER, WEIGHTS, RunDir, UsageError

Step = Mapping[str, Any]
_OWN = ("data", "forward", "backward", "optimizer")  # phases in which a rank does not wait for others
_WARM_UP = 0.1  # share of the first steps, which allocate and choose kernels


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run says of itself; None where it does not. Times in seconds, of the slowest rank; sizes in bytes.

    `share` of a batch is what that rank computes: shards may divide unevenly, and surplus ranks idle. `optimizer`
    includes what the loop does between two steps. `samples` are those of the whole run, also of one that
    has not come to its end.
    """

    batch: int
    ranks: int
    share: float
    data: float
    forward: float
    backward: float
    optimizer: float
    gradients: float | None
    weights: float | None
    state: float | None
    samples: int
    save: float | None
    restart: float | None


def measured(run_dir: RunDir) -> Measured:
    """Read a run.

    Raises:
        UsageError: it has no events, or no steps.
    """
    try:
        text = run_dir.events.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(
            f"{run_dir.path} is expected to be a run directory, but {run_dir.events.name}: {error.strerror}",
            "give the run's figures instead: samestep plan --help",
        ) from None
    events = list(_parsed(text))
    steps = [event for event in events if event.get("event") == "step" and isinstance(event.get("seconds"), dict)]
    if not steps:
        raise UsageError(f"{run_dir.path} is expected to have steps, but has none", "let it train for some steps first")
    ranks, shards, alike = _newest_size(run_dir, events)
    warm = alike[int(len(alike) * _WARM_UP) :]
    weights, state = _sizes(run_dir)
    worst, slow, between = _slowest(warm)
    batch = round(statistics.median(step["samples"] for step in warm))
    return Measured(
        batch=batch,
        ranks=ranks,
        share=_share(worst, ranks, shards),
        data=_phase(warm, "data") * slow["data"],
        forward=_phase(warm, "forward") * slow["forward"],
        backward=_phase(warm, "backward") * slow["backward"],
        optimizer=_phase(warm, "optimizer") * slow["optimizer"] + between,
        gradients=_gradients(events),
        weights=weights,
        state=state,
        samples=sum(step["samples"] for step in steps) + batch * _left(run_dir, steps[-1]),
        save=_median([float(e["seconds"]) for e in events if e.get("event") == "checkpoint" and "seconds" in e]),
        restart=_median(list(_restarts(events))),
    )


def _newest_size(run_dir: RunDir, events: Sequence[Step]) -> tuple[int, int, list[Step]]:
    """The last steps that were made on one and the same number of ranks; before them that number, and of shards."""
    found: int | None = None
    started: int | None = None
    shards = 0
    alike: list[Step] = []
    for event in events:
        if event.get("event") in ("run_started", "restarted"):
            size = event.get("world_size")
            started = size if isinstance(size, int) and size > 0 else started
            cut = event.get("shards")
            shards = cut if isinstance(cut, int) else shards
        elif event.get("event") == "step" and isinstance(event.get("seconds"), dict):
            alike, found = alike if started == found else [], started
            alike.append(event)
    if found is None:
        raise UsageError(f"{run_dir.path} is expected to tell its number of ranks, but does not", "let it train anew")
    return found, shards or found, alike


def _share(rank: int | None, ranks: int, shards: int) -> float:
    """Of the batch, as the span of shards that a rank owns has it; the largest one where the rank is not known."""
    if rank is None:
        return math.ceil(shards / ranks) / shards
    return ((rank + 1) * shards // ranks - rank * shards // ranks) / shards


def _left(run_dir: RunDir, last: Step) -> int:
    """Steps that the run has still to make; 0 where it does not tell."""
    try:
        total = json.loads(run_dir.config.read_bytes()).get("total_steps")
        return max(0, int(total) - int(last["step"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return 0


def _gradients(events: Sequence[Step]) -> float | None:
    """Bytes of the gradients that are summed, as the newest start tells; frozen weights have none."""
    told = [rank for event in events if isinstance(event.get("ranks"), list) for rank in event["ranks"]]
    sizes = [rank["gradient_bytes"] for rank in told if isinstance(rank, dict) and "gradient_bytes" in rank]
    return float(sizes[-1]) if sizes else None


def _parsed(text: str) -> Iterator[Step]:
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the last line of a run that goes on
        if isinstance(event, dict):
            yield event


def _phase(steps: Sequence[Step], name: str) -> float:
    return statistics.median(float(step["seconds"].get(name, {}).get("mean", 0.0)) for step in steps)


def _slowest(steps: Sequence[Step]) -> tuple[int | None, dict[str, float], float]:
    """The rank that is slowest in all; by phase its time over the ranks' mean; and its seconds between steps."""
    told = [step["rank_seconds"] for step in steps if isinstance(step.get("rank_seconds"), dict)]
    if not told:
        return None, dict.fromkeys(_OWN, 1.0), 0.0
    ranks = {phase: [sum(of_rank) for of_rank in zip(*(each[phase] for each in told), strict=True)] for phase in _OWN}
    whole = [sum(of_rank) for of_rank in zip(*ranks.values(), strict=True)]
    worst = whole.index(max(whole))
    ratios = {phase: sums[worst] * len(sums) / sum(sums) if sum(sums) else 1.0 for phase, sums in ranks.items()}
    return worst, ratios, statistics.median(each["between"][worst] if "between" in each else 0.0 for each in told)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _restarts(events: Sequence[Step]) -> Iterator[float]:
    """Seconds from a failure to the first step after it."""
    failed: float | None = None
    for event in events:
        if event.get("event") == "worker_failed":
            failed = event.get("seen", event["time"])
        elif event.get("event") == "step" and failed is not None:
            yield max(0.0, event["time"] - failed)
            failed = None


def _sizes(run_dir: RunDir) -> tuple[float | None, float | None]:
    """Bytes of the newest checkpoint's weights and optimizer state."""
    try:
        newest = manifest.committed(run_dir.checkpoints)
        sizes = [_size(newest[0] / name) for name in (WEIGHTS, OPTIMIZER)] if newest else [None, None]
    except OSError:  # they are somebody else's
        return None, None
    return sizes[0], sizes[1]


def _size(path: Path) -> float | None:
    return float(path.stat().st_size) if path.is_file() else None
