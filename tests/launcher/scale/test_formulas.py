"""Formulas against published figures, against simulations that know no formula, and at their edges."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from samestep.launcher.scale.faults import LLAMA3_RANK_HOURS, Faults, daly, goodput, run_mttf, young
from samestep.launcher.scale.network import Link, Machines, all_reduce, exchange, exposed, ring, two_trees
from samestep.launcher.scale.predict import Question, Workload, predict

HOUR = 3600.0
WORK = Workload(512, 8, 1 / 8, 0.001, 0.04, 0.08, 0.008, 2.6e9, 2.6e9, 5.2e9, 4e9, 10**9)
ASKED = Question(Machines(8, Link(2e-6, 370e9), Link(5e-6, 50e9)), "weak", False, 25e6, LLAMA3_RANK_HOURS, 1.0, 60.0)


def test_llama_3_was_interrupted_419_times_in_54_days():
    assert 54 * 24 * HOUR / run_mttf(LLAMA3_RANK_HOURS, 16_384) == pytest.approx(419)
    assert run_mttf(LLAMA3_RANK_HOURS, 16_384) / HOUR == pytest.approx(3.09, abs=0.01)


def test_llama_3_could_train_more_than_nine_tenths_of_its_time():
    # ten minutes to be back after each failure, ten seconds a checkpoint: what the paper says was reached
    faults = Faults(run_mttf(LLAMA3_RANK_HOURS, 16_384), save=10, restart=600)
    assert 0.9 < goodput(faults, daly(faults)) < 0.92


def test_metas_clusters_fail_as_measured_and_as_projected():
    measured, projected = 7.9 * 1024, 1.8 * 16_384  # GPU-hours of a failure; two rates, as faults.py says
    assert run_mttf(measured, 1024) / HOUR == pytest.approx(7.9)
    assert run_mttf(projected, 131_072) / HOUR == pytest.approx(0.23, abs=0.006)  # 14 minutes, their third figure
    assert measured < projected < LLAMA3_RANK_HOURS


def simulated_goodput(faults: Faults, interval: float, seed: int, segments: int = 20_000) -> float:
    """Segment by segment: work and save, or fail on the way, start again (and fail while doing so), repeat."""
    chance, clock = random.Random(seed), 0.0
    for _ in range(segments):
        while True:
            fails = chance.expovariate(1 / faults.mttf)
            if fails > interval + faults.save:
                clock += interval + faults.save
                break
            clock += fails
            while (again := chance.expovariate(1 / faults.mttf)) < faults.restart:
                clock += again
            clock += faults.restart
    return segments * interval / clock


@pytest.mark.parametrize(
    ("faults", "interval"),
    [
        (Faults(11_135, 10, 600), 465.0),
        (Faults(28_440, 30, 60), 1300.0),
        (Faults(600, 20, 120), 150.0),
        (Faults(100, 5, 50), 200.0),
    ],
)
def test_goodput_is_what_a_simulation_of_failures_gives(faults, interval):
    assert simulated_goodput(faults, interval, seed=1) == pytest.approx(goodput(faults, interval), rel=0.03)


@pytest.mark.parametrize("mttf", [600.0, 11_135.0, 28_440.0, 4e6])
@pytest.mark.parametrize("save", [0.1, 10.0, 100.0])
def test_the_best_interval_is_the_best(mttf, save):
    faults = Faults(mttf, save, 60)
    best = max(goodput(faults, daly(faults) * 1.02**power) for power in range(-100, 101))
    assert best - goodput(faults, daly(faults)) < 1e-3 * best
    assert goodput(faults, daly(faults)) >= goodput(faults, young(faults)) - 1e-6


@pytest.mark.parametrize(
    ("faults", "interval", "expected"),
    [
        (Faults(math.inf, 1, 60), 9, 0.9),
        (Faults(100, 0, 0), 1e-6, 1.0),
        (Faults(1e-3, 1, 60), 1, 0.0),
        (Faults(10, 25, 1), daly(Faults(10, 25, 1)), 0.0282),
    ],
)
def test_goodput_at_its_edges(faults, interval, expected):
    assert goodput(faults, interval) == pytest.approx(expected, abs=1e-3)


def simulated_ring(ranks: int, size: float, link: Link) -> float:
    """2 (W-1) rounds, in each of which every rank sends one slice of W to its neighbour."""
    return sum(link.latency + size / ranks / link.bandwidth for _ in range(2 * (ranks - 1)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 1024])
def test_a_ring_takes_its_rounds_and_exact_sends_no_more_bytes(ranks):
    link = Link(5e-6, 1e9)
    assert ring(ranks, 1e6, link) == pytest.approx(simulated_ring(ranks, 1e6, link))
    assert exchange(ranks, 1e6, link) == pytest.approx(ring(ranks, 1e6, link))


def test_latency_grows_with_ranks_in_a_ring_and_with_their_logarithm_in_trees():
    link = Link(5e-6, 1e9)
    assert ring(1024, 0, link) == pytest.approx(2 * 1023 * 5e-6)
    assert two_trees(1024, 0, link) == pytest.approx(2 * 10 * 5e-6)
    assert two_trees(1, 1e9, link) == 0.0


def test_the_fastest_way_depends_on_size_and_machines():
    machines = Machines(8, Link(2e-6, 370e9), Link(5e-6, 50e9))
    assert all_reduce(1, 1e9, machines, exact=False)[0] == 0.0
    assert all_reduce(1024, 1e3, machines, exact=False)[1] == "two trees"
    assert all_reduce(16, 1e10, machines, exact=False)[1] == "ring"
    # two levels: a machine's eight ranks share the way out
    assert all_reduce(16, 1e9, machines, exact=False)[0] < 0.6 * ring(16, 1e9, machines.between)
    assert all_reduce(16, 1e9, machines, exact=True)[1] == "exchange"


def simulated_exposed(count: int, backward: float, one: float) -> float:
    """A clock: bucket k is ready at (k+1)/count of the backward pass, one is on its way at a time."""
    clock = 0.0
    for bucket in range(count):
        clock = max(clock, backward * (bucket + 1) / count) + one
    return clock - backward


@pytest.mark.parametrize(("count", "backward"), [(1, 0.1), (4, 0.1), (100, 0.1), (100, 1e-4), (10, 0.0)])
def test_only_what_backward_does_not_hide_is_exposed(count, backward):
    machines = Machines(1, Link(0, 1), Link(1e-5, 1e10))
    one = all_reduce(16, 1e7, machines, exact=True)[0]
    found = exposed(16, count * 1e7, 1e7, backward, machines, exact=True)
    assert found.total == pytest.approx(count * one)
    assert found.exposed == pytest.approx(simulated_exposed(count, backward, one))
    assert one <= found.exposed * (1 + 1e-9) <= found.total * (1 + 1e-9)


def test_one_rank_is_as_measured_and_more_are_never_faster_each():
    alone = predict(WORK, ASKED, 1)
    assert alone.step == pytest.approx(0.129)
    assert (alone.batch, alone.exposed, alone.efficiency) == (64, 0.0, 1.0)
    rows = [predict(WORK, ASKED, 1 << power) for power in range(15)]
    assert all(before.efficiency >= after.efficiency - 1e-12 for before, after in pairwise(rows))
    assert rows[-1].mttf / HOUR == pytest.approx(3.09, abs=0.01)


def test_a_batch_that_stays_is_shared_until_nobody_has_less_than_a_sample():
    strong = replace(ASKED, scaling="strong")
    assert [predict(WORK, strong, ranks).batch for ranks in (1, 8, 4096)] == [512] * 3
    computing = [(row := predict(WORK, strong, ranks)).step - row.exposed for ranks in (1, 8, 512, 4096)]
    assert computing == pytest.approx([8 * 0.121 + 0.008, 0.129, 0.121 / 64 + 0.008, 0.121 / 64 + 0.008])


@pytest.mark.parametrize(
    ("exact", "ranks", "gigabytes"), [(False, 8, 14.4), (True, 2, 14.4), (True, 8, 14.4 + 5.2), (True, 1, 14.4)]
)
def test_memory_counts_the_copies_of_an_exact_sum(exact, ranks, gigabytes):
    assert predict(WORK, replace(ASKED, exact=exact), ranks).memory / 1e9 == pytest.approx(gigabytes)


def test_time_to_train_has_failures_in_it():
    calm = replace(ASKED, rank_hours=1e15, save=0.0)
    row, lucky = predict(WORK, ASKED, 1024), predict(WORK, calm, 1024)
    assert lucky.days == pytest.approx(1e9 / lucky.samples_per_s / 86_400, rel=1e-6)
    assert row.days == pytest.approx(lucky.days / row.goodput, rel=1e-6)


def test_nothing_is_trained_in_less_than_a_step():
    row = predict(replace(WORK, samples=1), replace(ASKED, rank_hours=1e15, save=0.0), 8)
    assert row.days * 86_400 == pytest.approx(row.step, rel=1e-6)
