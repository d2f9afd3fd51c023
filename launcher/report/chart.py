"""Pure: what a chart is, and how buckets become its points. In plotly's JSON form: https://plotly.com/javascript/reference/.

A trace whose x is a place in the run carries it three times, in `Chart.xs`: as steps, samples and time; the page
switches between them. Colours of text and grid belong to the page's theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from samestep.launcher.report.history import History
from samestep.launcher.report.thinning import Bucket, Position, merge

Thing = TypeVar("Thing")

AXES = ("steps", "samples", "seconds")
MARKS = 300  # of one kind in a chart
_UNITS = ((7200.0, 3600.0, "hours"), (300.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


@dataclass(slots=True)
class Chart:
    """One chart of the page."""

    key: str
    title: str
    unit: str  # of the y axis
    note: str = ""
    wide: bool = False
    logarithmic: bool = False  # whether a logarithmic y axis is offered
    data: list[dict[str, Any]] = field(default_factory=list)
    xs: list[dict[str, list[float]] | None] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)

    def add(self, trace: dict[str, Any], at: Sequence[Position] | None = None) -> None:
        """A trace, drawn over places in the run or over the x that it has."""
        self.data.append(trace | {"name": plain(trace["name"])})
        self.xs.append(
            None if at is None else {name: [short(place[axis]) for place in at] for axis, name in enumerate(AXES)}
        )


@dataclass(frozen=True, slots=True)
class TimeUnit:
    """The unit in which the page shows time since the start."""

    seconds: float
    name: str


def time_unit(histories: Iterable[History]) -> TimeUnit:
    """Seconds, minutes or hours, as the longest run needs."""
    longest = max((history.last.seconds for history in histories), default=0.0)
    return next(TimeUnit(seconds, name) for least, seconds, name in _UNITS if longest >= least)


def chunks(buckets: Sequence[Bucket], most: int) -> list[Bucket]:
    """Neighbours merged, so that at most `most` are left."""
    size = max(1, math.ceil(len(buckets) / most))
    merged = []
    for start in range(0, len(buckets), size):
        whole = buckets[start]
        for bucket in buckets[start + 1 : start + size]:
            whole = merge(whole, bucket)
        merged.append(whole)
    return merged


def extremes(buckets: Sequence[Bucket], column: int) -> tuple[list[Position], list[float | None]]:
    """Points of a line through every bucket's lowest and highest value; a gap where no value was finite."""
    places: list[Position] = []
    values: list[float | None] = []
    for bucket in buckets:
        summary = bucket.columns[column]
        if not summary.finite:
            points: list[tuple[Position, float | None]] = [(bucket.first, None)]
        elif summary.low_at == summary.high_at:
            points = [(summary.low_at, summary.low)]
        else:
            points = sorted([(summary.low_at, summary.low), (summary.high_at, summary.high)])
        places += [place for place, _ in points]
        values += [short(value) for _, value in points]
    return places, values


def short(value: float | None) -> Any:
    """Six significant digits of a fraction: a chart shows fewer."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def plain(text: str) -> str:
    """Plotly reads a small part of HTML in its texts: as it is meant to be seen, and not longer than fits."""
    return text[:200].replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")


def thin(things: Sequence[Thing]) -> list[Thing]:
    """At most MARKS of them, evenly chosen."""
    every = max(1, math.ceil(len(things) / MARKS))
    return list(things[::every])
