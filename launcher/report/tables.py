"""Pure: histories of runs -> the words of the page: facts, the verdict on sameness, settings, what happened."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samestep.launcher.diagnosis.memory_signs import size
from samestep.launcher.report.history import STEP_COLUMNS, History, first_difference, steps_in_common

_ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table of settings."""

    name: str
    values: tuple[str, ...]  # a run each
    differs: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether runs are the same; `good` colours it."""

    text: str
    good: bool


def facts(history: History) -> dict[str, str]:
    """What one wants to know of a run first, as labels and values; a value's first comma begins what explains it."""
    finished, total = history.finished or {}, history.config.get("total_steps")
    found = {
        "Status": history.status,
        "Steps": f"{history.last.step:,}" + (f" of {total:,}" if isinstance(total, int) else ""),
        "Loss, last steps": number(_recent_loss(history)),
    }
    found |= {f"Evaluation: {name}": number(value) for name, value in history.evaluated.items()}
    found["Time"] = duration(history.last.seconds)
    found["Samples/s"] = number(_rate(history))
    started = history.generations[-1] if history.generations else {}
    found["Ranks / shards"] = f"{started.get('world_size', _ABSENT)} / {started.get('shards', _ABSENT)}"
    found["Restarts"] = str(history.restarts)
    if "goodput" in finished:
        found["Time in steps that count"] = f"{100 * float(finished['goodput']):.0f}%"
    for kind in ("host", "device"):
        held = _most(history, f"{kind} memory")
        if held:
            found[f"Peak {kind} memory of a rank"] = f"{held / 2**30:.2f} GiB"
    return found | _memory_at_start(started.get("ranks", []))


def _memory_at_start(ranks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of the rank that has most; empty where a run is older than these figures."""
    found = {}
    mapped = [int(rank["resident_bytes"]) for rank in ranks if "resident_bytes" in rank]
    if mapped:
        own = max(int(rank["proportional_bytes"]) for rank in ranks if "proportional_bytes" in rank)
        found["Memory of a rank at the start"] = f"{size(max(mapped))}, {size(own)} by its share of pages"
    if ranks and "gradient_copies" in ranks[0]:
        copies = max(int(rank["gradient_copies"]) for rank in ranks)
        found["Gradients"] = f"{size(int(ranks[0]['gradient_bytes']))}, at most {copies} copies on a rank"
    return found


def _most(history: History, group: str) -> float:
    """The highest value of a group of series, 0 without any."""
    series = [found for (name, _), found in history.series.items() if name == group]
    return max((bucket.columns[0].high for each in series for bucket in each.buckets()), default=0.0)


def digest(history: History) -> str:
    """sha256 of the final weights, empty while there are none."""
    return str((history.finished or {}).get("digest", ""))


def verdicts(histories: Sequence[History]) -> list[Verdict]:
    """What several runs have in common: final weights, and with the first run the losses on the way."""
    ends: dict[str, list[str]] = {}
    for history in histories:
        ends.setdefault(digest(history), []).append(history.name)
    ends.pop("", None)  # of a run without an end
    found = []
    if sum(map(len, ends.values())) > 1:
        groups = " ≠ ".join(" = ".join(names) for names in ends.values())
        text = f"The same bits at the end: {groups}" if len(ends) == 1 else f"The weights at the end differ: {groups}"
        found.append(Verdict(text, good=len(ends) == 1))
    first, *others = histories
    for other in others:
        if other.losses and first.losses and not (digest(first) and digest(first) == digest(other)):
            step, common = first_difference(first, other), steps_in_common(first, other)
            same = f"have the same bits in all {common:,} steps that both have" if common else "have no step in common"
            text = same if step is None else f"have other bits from step {step} on"
            found.append(
                Verdict(f"The losses of {first.name} and {other.name} {text}", good=step is None and common > 0)
            )
    return found


def settings(histories: Sequence[History]) -> list[Setting]:
    """Every option and fact of config.json; those that differ between the runs come first."""
    flat = [flatten(history.config) for history in histories]
    names = {name: None for values in flat for name in values}
    rows = [Setting(name, tuple(values.get(name, _ABSENT) for values in flat), differs=False) for name in names]
    rows = [Setting(row.name, row.values, differs=len(set(row.values)) > 1) for row in rows]
    return sorted(rows, key=lambda row: not row.differs)


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """Options as flags, the rest as section and name."""
    found = {}
    for name, value in config.items():
        inside = value if isinstance(value, dict) else {"": value}
        for key, leaf in inside.items():
            words = f"{name} {key}".strip()
            label = f"--{key.replace('_', '-')}" if name == "config" else words.replace("_", " ")
            label = words if name == "code" else label  # a file's own name
            found[label] = leaf if isinstance(leaf, str) else "not set" if leaf is None else json.dumps(leaf)
    return found


def happened(history: History) -> list[tuple[str, str, str]]:
    """Time, kind and text of everything that is no step, evaluation or checkpoint."""
    rows = [(duration(m.at.seconds), m.kind.replace("_", " "), m.text) for m in history.moments]
    if history.dropped:
        rows.insert(len(rows) // 2, ("", "…", f"{history.dropped} more, see events.jsonl"))
    if history.checkpoints:
        place, step = history.checkpoints[-1]
        text = f"{len(history.checkpoints)} in all, the last one of step {step}"
        rows.append((duration(place.seconds), "checkpoints", text))
    if history.unreadable:
        rows.append(("", "warning", f"{history.unreadable} lines of events.jsonl could not be read"))
    return rows


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def number(value: float | None) -> str:
    """As people write it: at most five significant digits, thousands apart."""
    if value is None or not math.isfinite(value):
        return _ABSENT
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}"


def _recent_loss(history: History) -> float | None:
    known = [bucket.columns[0] for bucket in history.steps.buckets()[-20:] if bucket.columns[0].finite]
    count = sum(column.finite for column in known)
    return sum(column.total for column in known) / count if count else None


def _rate(history: History) -> float | None:
    samples, seconds = STEP_COLUMNS.index("samples"), STEP_COLUMNS.index("seconds")
    buckets = history.steps.buckets()
    time = sum(bucket.columns[seconds].total for bucket in buckets)
    return sum(bucket.columns[samples].total for bucket in buckets) / time if time else None
