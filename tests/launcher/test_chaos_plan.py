"""A seed in, a plan out; what came of it in, a table out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise

import pytest

from samestep.launcher.chaos.kinds import KINDS, Aim, Moment
from samestep.launcher.chaos.outcome import Strike, Trial, Verdict, table
from samestep.launcher.chaos.plan import Course, Fault, over_runs, plan, soak
from samestep.launcher.chaos.run import ChaosConfig, chosen
from samestep.launcher.chaos.trace import Trace
from samestep.launcher.chaos.trial import left_in
from samestep.launcher.contract import RunDir, UsageError

COURSE = Course(steps=40, epoch_ends=(10, 20, 30, 40), saves=(4, 8, 12, 16, 20, 24, 28, 32, 36), join_seconds=2.0)
ALL = chosen("")


def planned(seed=1, faults=300, per_run=5, kinds=ALL, course=COURSE):
    return plan(seed, faults, per_run, kinds, course, 3)


def test_the_same_seed_gives_the_same_plan_and_another_one_another():
    assert planned(1) == planned(1)
    assert planned(1) != planned(2)


def test_every_fault_is_planned_once_and_no_moment_twice_in_a_run():
    runs = planned()
    assert [fault.number for run in runs for fault in run] == list(range(1, 301))
    assert len(runs) == 60
    for run in runs:
        assert len({fault.moment for fault in run}) == len(run) == 5
        steps = [-1 if fault.after_step is None else fault.after_step for fault in run]
        assert steps == sorted(steps)


def test_no_rank_crashes_twice_in_one_way_before_it_has_made_progress():
    for run in planned(kinds=chosen("rank-segv"), per_run=6):
        ranks = [fault.rank for fault in run]
        assert all(first != second for first, second in pairwise(ranks))


def test_many_faults_strike_every_kind_at_every_moment():
    faults = [fault for run in planned(faults=6 * len(ALL) * 2) for fault in run]
    pairs = Counter((fault.kind.name, fault.moment) for fault in faults)
    early = {Moment.JOINING, Moment.FIRST_STEP}
    possible = {(k.name, m) for k in ALL for m in Moment if k.hits_from_the_start or m not in early}
    assert set(pairs) == possible
    assert len({kind.name for kind in ALL}) >= 25
    assert {fault.rank for fault in faults} == {0, 1, 2}


def test_moments_are_where_they_say():
    for fault in (fault for run in planned() for fault in run if not fault.kind.needs_two_checkpoints):
        match fault.moment:
            case Moment.JOINING:
                assert fault.after_step is None
                assert 0 <= fault.delay <= 2
            case Moment.FIRST_STEP:
                assert fault.after_step == 0
            case Moment.EPOCH_EDGE:
                assert fault.after_step in (10, 20, 30)
            case Moment.IN_SAVE:
                assert fault.after_step in COURSE.saves
            case Moment.LAST_STEP:
                assert fault.after_step == 39
            case Moment.MID_EPOCH:
                assert 2 <= fault.after_step <= 39


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_shortest_runs_can_be_planned(steps):
    runs = planned(course=Course(steps, (), (), 0.1), per_run=6)
    assert all(fault.after_step is None or 0 <= fault.after_step <= max(steps, 1) for run in runs for fault in run)


def test_a_soak_strikes_about_as_often_as_asked():
    faults = list(islice(soak(3, 15.0, ALL, 2), 200))
    assert 14 < sum(fault.delay for fault in faults) / 200 < 16
    assert {fault.kind for fault in faults} == set(ALL)


@pytest.mark.parametrize("length", [4.0, 10.0, 40.0, 500.0])
def test_runs_that_are_shorter_than_the_time_between_faults_are_struck_as_often(length):
    clock, struck = [0.0], []
    for run in over_runs(soak(3, 15.0, ALL, 2), 3000.0, lambda: clock[0]):
        end = clock[0] + length
        for fault in run:
            if clock[0] + fault.delay >= end:
                break
            clock[0] += fault.delay
            struck.append(fault.number)
        clock[0] = end
    assert struck == list(range(1, len(struck) + 1))
    assert 180 < len(struck) < 215
    assert 3000 <= clock[0] < 3000 + length


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("rank-kill", ["rank-kill"]),
        ("launcher, rank-segv", ["launcher-kill", "launcher-term", "launcher-int", "rank-segv"]),
        ("loader,loader-kill", ["loader-kill", "loader-segv"]),
        ("rank-stop", ["rank-stop"]),
    ],
)
def test_kinds_are_chosen_by_name_or_its_beginning(text, names):
    assert [kind.name for kind in chosen(text)] == names


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"kinds": "rank-kil"}, "rank-kill"),
        ({"faults": 0}, "--faults"),
        ({"per_run": 0}, "--per-run"),
        ({"nproc_per_node": 0}, "--nproc-per-node"),
        ({"nproc_per_node": 99999}, "expected to be at most 4096, but is 99999"),
    ],
)
def test_wrong_options_are_refused_with_the_fix(values, word):
    with pytest.raises(UsageError) as caught:
        ChaosConfig(**values)
    assert word in str(caught.value)
    assert caught.value.hint


def event(name, time, **more):
    return json.dumps({"event": name, "time": time, **more}) + "\n"


def test_a_trace_follows_steps_and_starts_also_when_a_resume_cuts_them(tmp_path):
    trace = Trace(RunDir(tmp_path))
    trace.update()
    assert (trace.step, trace.ranks, trace.started_since(0)) == (0, {}, None)
    file = tmp_path / "events.jsonl"
    ranks = [{"rank": 0, "pid": 11}, {"rank": 1, "pid": 12}]
    file.write_text(event("run_started", 1.0, ranks=ranks) + event("step", 2.0, step=1, loss_hex="0x1") + '{"event"')
    trace.update()
    assert (trace.step, trace.ranks, trace.started_since(0), trace.started_since(1)) == (1, {0: 11, 1: 12}, 1.0, None)
    with file.open("a") as more:
        more.write(': "step", "time": 3.0, "step": 2, "loss_hex": "0x2"}\n')
    trace.update()
    assert (trace.step, trace.step_since(2.5), trace.losses) == (2, 3.0, [(1, "0x1"), (2, "0x2")])
    shorter = tmp_path / "events.tmp"
    shorter.write_text(event("run_started", 1.0, ranks=ranks) + event("restarted", 4.0, ranks=ranks[:1]))
    shorter.rename(file)
    trace.update()
    assert (trace.step, trace.ranks, trace.started_since(2.5)) == (0, {0: 11}, 4.0)


def fault(number, name, moment=Moment.MID_EPOCH):
    return Fault(number, next(kind for kind in KINDS if kind.name == name), moment, 1, 3)


def verdict(*trials, **more):
    return Verdict("d" * 64, 2.0, trials, **more)


GOOD = Trial(
    1,
    (
        Strike(fault(1, "rank-kill"), True, 3, survived=True, seconds=0.25),
        Strike(fault(2, "rank-kill", Moment.JOINING), True, 0, survived=True, seconds=0.75),
        Strike(fault(3, "server-kill"), True, 5, survived=True),
        Strike(fault(4, "loader-kill"), False, 6, survived=True),
    ),
    same=True,
    difference="",
    seconds=4.0,
    goodput=0.5,
    growth={"launcher descriptors": 0},
)


def test_the_table_counts_what_was_hit_and_only_that():
    assert table(verdict(GOOD, host_growth={"temporary files": 0})) == [
        "fault                  injected  survived  same bits  recovery median / max",
        "rank-kill                     2         2          2  0.50 / 0.75 s",
        "server-kill                   1         1          1  nothing was interrupted",
        "all                           3         3          3  0.50 / 0.75 s",
        "joining                       1         1          1  0.75 / 0.75 s",
        "mid-epoch                     2         2          2  0.25 / 0.25 s",
        "1 fault found nothing to hit: not counted",
        "growth: launcher descriptors +0, temporary files +0",
        "1 run, 3 faults in 4 s, goodput 50 % (an undisturbed run takes 2.0 s); every run ends in the same bits",
    ]


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        (
            Trial(2, (Strike(fault(9, "rank-segv"), True, 3, False, None, "it ended"),), True, "", 1.0, 1.0),
            "NOT: fault 9, rank-segv at mid-epoch: it ended",
        ),
        (Trial(2, (), False, "the loss of step 3 differs", 1.0, 1.0), "NOT: run 2: the loss of step 3 differs"),
        (Trial(2, (), True, "", 1.0, 1.0, ("python 7",)), "NOT: run 2 left behind: python 7"),
    ],
)
def test_one_flaw_is_named_and_spoils_the_verdict(bad, line):
    spoiled = verdict(GOOD, bad)
    assert line in table(spoiled)
    assert table(spoiled)[-1].endswith("NOT all is well")
    assert verdict(GOOD).good
    assert not spoiled.good
    assert spoiled.to_dict()["good"] is False
    assert json.loads(json.dumps(spoiled.to_dict()))["faults"][0]["kind"] == "rank-kill"


def test_a_verdict_without_one_hit_is_not_good():
    missed = Trial(1, (Strike(fault(4, "loader-kill"), False, 6, survived=True),), True, "", 1.0, 1.0)
    for nothing in (verdict(), verdict(missed)):
        assert not nothing.good
        assert "NOT: no fault hit anything, so nothing is known" in table(nothing)
        assert table(nothing)[-1].endswith("NOT all is well")


def test_faults_whose_run_was_over_before_their_moment_are_told():
    late = replace(GOOD, number=2, too_late=3)
    assert "3 faults came too late, the run was over: not counted" in table(verdict(GOOD, late))
    assert not any("too late" in line for line in table(verdict(GOOD)))


@pytest.mark.parametrize(
    "options", [{"minutes": -1.0}, {"minutes": float("nan")}, {"minutes": float("inf")}, {"every": float("nan")}]
)
def test_times_in_which_nothing_would_be_struck_are_refused(options):
    with pytest.raises(UsageError, match=r"is expected to be .*\nhint: "):
        ChaosConfig(**options)


@pytest.mark.parametrize("earlier", ["reference", "run-3"])
def test_a_folder_with_earlier_runs_is_refused(earlier, samestep):
    (samestep.cwd / "recipe.py").write_text("from samestep.train import train\n")
    (samestep.cwd / "kept" / earlier).mkdir(parents=True)
    ended = samestep("chaos", "--keep", "kept", "recipe.py")
    assert (ended.code, ended.stdout) == (2, "")
    assert f"kept/{earlier} is there" in ended.stderr


def test_a_folder_that_cannot_be_made_is_a_usage_error(samestep):
    (samestep.cwd / "recipe.py").write_text("from samestep.train import train\n")
    ended = samestep("chaos", "--keep", "recipe.py/kept", "recipe.py")
    assert (ended.code, ended.stdout) == (2, "")
    assert "--keep is expected to name a folder that can be made" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_every_aim_is_struck_by_some_kind():
    assert {kind.aim for kind in KINDS} == set(Aim)


def test_what_no_run_can_help_does_not_count_as_left_behind(tmp_path):
    (tmp_path / "torchinductor_someone").mkdir()
    (tmp_path / "a1b2c3_4").write_bytes(b"blat")
    (tmp_path / "4_c3b2a1").write_bytes(b"")
    (tmp_path / "tmpbcajb61e").write_bytes(b"")
    assert left_in(tmp_path) == set()
    (tmp_path / "pymp-ab12cd3").mkdir()
    (tmp_path / "tmpab12c").write_bytes(b"data of the run")
    (tmp_path / "tmpbcajb62e").write_bytes(b"data of the run")
    (tmp_path / "tmpab12cd3").write_bytes(b"")
    (tmp_path / "blat").write_bytes(b"blat")
    assert left_in(tmp_path) == {"pymp-ab12cd3", "tmpab12c", "tmpbcajb62e", "tmpab12cd3", "blat"}
