"""Pure: any number of rows -> at most twice `limit` buckets that keep every column's lowest and highest value.

A bucket stands for a run of consecutive rows. When there are too many, neighbours are merged, so memory stays the same
however long a run was, and no spike is lost: what is drawn has the extremes of what was measured, where they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

Value = float | None


class Position(NamedTuple):
    """Where a row lies on each axis that a chart can have."""

    step: int
    samples: int  # used since the beginning of the run
    seconds: float  # since the first start


class Summary(NamedTuple):
    """One column of a bucket; `low` and `high` are NaN where no value was finite."""

    total: float
    finite: int
    low: float
    low_at: Position
    high: float
    high_at: Position
    broken: int  # values that were not finite

    @property
    def mean(self) -> float:
        """Of the finite values; NaN without any."""
        return self.total / self.finite if self.finite else math.nan


class Bucket(NamedTuple):
    """Consecutive rows."""

    first: Position
    last: Position
    columns: tuple[Summary, ...]


def summarise(positions: Sequence[Position], values: Sequence[Value]) -> Summary:
    """One column of one bucket; None stands for a value that was not finite."""
    if None not in values and math.isfinite(sum(known := cast("Sequence[float]", values))):  # nearly always, and faster
        low, high = min(known), max(known)
        places = positions[known.index(low)], positions[known.index(high)]
        return Summary(sum(known), len(known), low, places[0], high, places[1], broken=0)
    finite = [(value, index) for index, value in enumerate(values) if value is not None and math.isfinite(value)]
    if not finite:
        return Summary(0.0, 0, math.nan, positions[0], math.nan, positions[0], len(values))
    low, at_low = min(finite)
    high, at_high = max(finite, key=lambda pair: pair[0])
    total = sum(value for value, _ in finite)
    return Summary(total, len(finite), low, positions[at_low], high, positions[at_high], len(values) - len(finite))


def merge(left: Bucket, right: Bucket) -> Bucket:
    """Two neighbours as one; of equal extremes the earlier one stays."""
    columns = tuple(_merge(a, b) for a, b in zip(left.columns, right.columns, strict=True))
    return Bucket(left.first, right.last, columns)


def _merge(a: Summary, b: Summary) -> Summary:
    low = b if not a.finite or b.low < a.low else a
    high = b if not a.finite or b.high > a.high else a
    return Summary(
        a.total + b.total, a.finite + b.finite, low.low, low.low_at, high.high, high.high_at, a.broken + b.broken
    )


@dataclass(slots=True)
class Thinner:
    """Takes rows one after another."""

    limit: int = 1000
    _width: int = 1
    _buckets: list[Bucket] = field(default_factory=list)
    _positions: list[Position] = field(default_factory=list)
    _rows: list[Sequence[Value]] = field(default_factory=list)

    def add(self, position: Position, row: Sequence[Value]) -> None:
        """One row with as many columns as every other one."""
        self._positions.append(position)
        self._rows.append(row)
        if len(self._rows) == self._width:
            self._buckets.append(self._open_bucket())
            self._positions, self._rows = [], []
            if len(self._buckets) == 2 * self.limit:
                pairs = zip(self._buckets[::2], self._buckets[1::2], strict=True)
                self._buckets = [merge(left, right) for left, right in pairs]
                self._width *= 2

    def buckets(self) -> list[Bucket]:
        """All rows so far, in order; the last bucket may stand for fewer rows than the others."""
        return [*self._buckets, self._open_bucket()] if self._rows else list(self._buckets)

    @property
    def width(self) -> int:
        """Rows in a bucket."""
        return self._width

    def _open_bucket(self) -> Bucket:
        columns = zip(*self._rows, strict=True)
        summaries = tuple(summarise(self._positions, values) for values in columns)
        return Bucket(self._positions[0], self._positions[-1], summaries)
