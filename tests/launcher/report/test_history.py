"""Events become numbers in one pass, whatever the file holds."""

from __future__ import annotations

import json
import math
import tracemalloc

import pytest

from samestep.launcher.contract import RunDir, UsageError
from samestep.launcher.report.history import STEP_COLUMNS, first_difference, fold, read, steps_in_common


def test_a_whole_run_is_told(made):
    history = made.history(made.events(100, crash_after=50))
    assert (history.status, history.restarts, history.last.step, history.last.samples) == ("finished", 1, 100, 6400)
    kinds = [moment.kind for moment in history.moments]
    assert kinds == ["run_started", "worker_failed", "restarted", "resumed", "run_finished"]
    assert "rank 1 (step 51, backward): killed by SIGKILL" in history.moments[1].text
    assert [step for _, step in history.checkpoints] == [25, 50, 75, 100]
    assert history.unreadable == 0
    assert len(history.losses) == 100


@pytest.mark.parametrize(
    ("until", "status"), [("worker_failed", "failed"), ("restarted", "not finished"), ("run_finished", "finished")]
)
def test_status_is_that_of_the_last_start(until, status, made):
    events = made.events(100, crash_after=50)
    end = [event["event"] for event in events].index(until)
    assert made.history(events[: end + 1]).status == status


def test_times_of_ranks_are_averaged_over_the_steps_they_stand_for(made):
    def loads(step, seconds):
        return made.step(step, rank_seconds=dict.fromkeys(made.step(1)["seconds"], seconds))

    start = made.events(0, finish=False)
    history = made.history([*start, made.step(1), made.step(2), loads(3, [1.0, 2.0]), loads(4, [5.0, 6.0])])
    assert history.ranks.steps == 4
    assert history.ranks.seconds["data"] == [3 * 1.0 + 5.0, 3 * 2.0 + 6.0]
    assert history.ranks.slowest["backward", 1] == 4


def test_evaluations_and_checkpoints_are_added_up_by_rank(made):
    common = {"time": 1000.0, "step": 1}
    evaluated = {"event": "eval", "metrics": {}, "epoch": 1, "samples": 8, "seconds": 4.0, **common}
    saved = {"event": "checkpoint", "path": "step-00000001", "seconds": 0.5, "bytes": {}, **common}
    of_ranks = [{**evaluated, "rank_seconds": seconds} for seconds in ([1.0, 4.0], [2.0, 3.0])]
    history = made.history([*made.events(0, finish=False), made.step(1), evaluated, *of_ranks, saved, saved])
    assert history.ranks.seconds == {"evaluation": [3.0, 7.0], "checkpoint": [1.0, 0.0]}


def test_a_run_that_goes_on_with_other_ranks_does_not_mix_their_times(made):
    history = made.history([*made.events(20, ranks=2, finish=False), *made.events(0, ranks=3, finish=False)])
    assert (history.ranks.world_size, history.ranks.steps, history.ranks.since_step) == (3, 0, 21)


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[]",
        b"3",
        b"{}",
        b'{"event": "step", "time": 1}',
        b'{"event": "step", "time": "soon", "step": "x"}',
        b'{"event": "eval", "time": 1, "step": 1, "metrics": 3}',
        b'{"event": "eval", "time": 1, "step": 1, "metrics": {"accuracy": "high"}}',
        b'{"event": "run_started", "time": 1, "world_size": null, "shards": 1}',
        b'{"event": "step", "tim',
        b"\xff\xfe\x00",
    ],
)
def test_a_line_that_is_no_event_is_counted_and_ruins_nothing(line, made):
    lines = [json.dumps(event).encode() for event in made.events(100)]
    history = fold("run", {}, [*lines[:40], line, *lines[40:]])
    assert (history.unreadable, history.status, history.last.step) == (1, "finished", 100)


def test_losses_that_were_not_finite_are_kept_apart_and_change_no_mean(made):
    losses = [1.0, None, 3.0, None]
    history = made.history([made.step(step, loss=loss) for step, loss in enumerate(losses, 1)])
    column = STEP_COLUMNS.index("loss")
    assert [place.step for place in history.broken] == [2, 4]
    means = [bucket.columns[column].mean for bucket in history.steps.buckets()]
    assert [None if math.isnan(mean) else mean for mean in means] == losses


def test_first_difference_is_found_in_bits(made):
    losses = [1.0, 0.5, None, 0.25]
    left = made.history([made.step(step, loss=loss) for step, loss in enumerate(losses, 1)])
    assert first_difference(left, left) is None
    shorter = made.history([made.step(step, loss=loss) for step, loss in enumerate(losses[:3], 1)])
    assert first_difference(left, shorter) is None
    losses[3] = math.nextafter(0.25, 1.0)
    right = made.history([made.step(step, loss=loss) for step, loss in enumerate(losses, 1)])
    assert first_difference(left, right) == 4
    later = made.history([made.step(4, loss=0.25)])
    assert first_difference(left, later) is None
    assert first_difference(right, later) == 4


def test_steps_whose_line_is_lost_are_compared_with_no_others(made):
    steps = [made.step(step) for step in range(1, 8)]
    whole, holed = made.history(steps), made.history([*steps[:2], {"event": "step"}, *steps[3:]])
    assert (first_difference(whole, holed), first_difference(holed, whole)) == (None, None)
    assert (steps_in_common(whole, holed), steps_in_common(holed, holed)) == (6, 6)
    other = made.history([*steps[:5], made.step(6, loss=0.125), *steps[6:]])
    assert first_difference(holed, other) == 6


def test_a_stop_that_was_asked_for_is_told_with_what_was_saved(made):
    stop = {"event": "preempted", "time": 2000.0, "step": 20, "signal": "SIGTERM", "checkpoint": 20}
    for checkpoint, words in ((20, "saved"), (10, "the checkpoint of step 10 is kept"), (None, "not saved")):
        history = made.history([*made.events(20, finish=False), stop | {"checkpoint": checkpoint}])
        assert history.moments[-1].kind == "preempted"
        assert history.moments[-1].text == f"by SIGTERM after step 20, {words}"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_run(made):
    def peak(steps):
        lines = (json.dumps(made.step(step)).encode() for step in range(1, steps + 1))
        tracemalloc.start()
        history = fold("run", {}, lines)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak - 16 * len(history.losses), history

    few, _ = peak(2500)
    many, history = peak(10_000)
    assert many < 1.3 * few
    assert len(history.steps.buckets()) <= 2000


def test_moments_without_end_are_cut_in_the_middle(made):
    warnings = [{"event": "warning", "time": 1.0 + n, "text": str(n)} for n in range(1000)]
    history = made.history(warnings)
    assert len(history.moments) == 400
    assert history.dropped == 600
    assert (history.moments[0].text, history.moments[-1].text) == ("0", "999")


def test_a_folder_without_a_run_is_refused_with_a_hint(tmp_path):
    with pytest.raises(UsageError, match="expected to be a run directory with events") as error:
        read(RunDir(tmp_path))
    assert "--run-dir" in error.value.hint


def test_times_of_ranks_of_a_run_that_begins_in_the_middle_are_those_of_its_steps(made):
    loads = {"rank_seconds": {phase: [1.0, 2.0] for phase in made.step(1)["seconds"]}}
    start = made.events(0, finish=False)
    resumed = {"event": "resumed", "time": 1000.0, "step": 100, "epoch": 3, "checkpoint": "step-00000100"}
    history = made.history([*start, resumed, made.step(101), made.step(102, **loads)])
    assert (history.ranks.since_step, history.ranks.steps) == (101, 2)
    assert history.ranks.seconds["data"] == [2.0, 4.0]


def test_a_step_without_weight_is_not_one_that_was_not_finite(made):
    history = made.history([made.step(1), made.step(2, loss=None, weightless=True), made.step(3, loss=None)])
    assert [place.step for place in history.broken] == [3]


def test_restarts_of_ranks_that_never_wrote_a_start_count_too(made):
    started = made.events(0, finish=False)[0]
    assert made.history([started, started | {"event": "restarted", "generation": 3}]).restarts == 3
    assert made.history([started, started]).restarts == 1
