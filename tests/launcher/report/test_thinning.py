"""Thinned rows keep what matters: extremes, totals, order, and what was not finite."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from samestep.launcher.report.thinning import Position, Thinner

values = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6), st.just(math.nan), st.just(math.inf)), max_size=200)


def thinned(column, limit=4):
    thinner = Thinner(limit)
    for step, value in enumerate(column, 1):
        thinner.add(Position(step, 32 * step, step / 10), (value, 1.0))
    return thinner.buckets()


@given(values)
def test_extremes_totals_and_broken_values_are_those_of_all_rows(column):
    buckets = thinned(column)
    finite = [value for value in column if value is not None and math.isfinite(value)]
    summaries = [bucket.columns[0] for bucket in buckets]
    assert sum(s.finite for s in summaries) == len(finite)
    assert sum(s.broken for s in summaries) == len(column) - len(finite)
    assert math.isclose(math.fsum(s.total for s in summaries), math.fsum(finite), abs_tol=1e-6)
    if finite:
        assert min(s.low for s in summaries if s.finite) == min(finite)
        assert max(s.high for s in summaries if s.finite) == max(finite)
        assert all(
            column[s.low_at.step - 1] == s.low and column[s.high_at.step - 1] == s.high for s in summaries if s.finite
        )


@given(values)
def test_buckets_are_few_in_order_and_without_gaps(column):
    buckets = thinned(column)
    assert len(buckets) <= 8
    ends = [(bucket.first.step, bucket.last.step) for bucket in buckets]
    assert [step for first, last in ends for step in range(first, last + 1)] == list(range(1, len(column) + 1))


def test_a_short_run_is_not_thinned_at_all():
    buckets = thinned([3.0, None, 1.0], limit=1000)
    assert [(b.first, b.columns[0].low) for b in buckets if b.columns[0].finite] == [
        (Position(1, 32, 0.1), 3.0),
        (Position(3, 96, 0.3), 1.0),
    ]


def test_one_spike_among_a_hundred_thousand_rows_stays_where_it_was():
    column = [random.Random(step).random() for step in range(100_000)]
    column[77_777] = 50.0
    buckets = thinned(column, limit=1000)
    assert len(buckets) <= 2000
    spike = max((bucket.columns[0] for bucket in buckets), key=lambda summary: summary.high)
    assert (spike.high, spike.high_at.step) == (50.0, 77_778)
