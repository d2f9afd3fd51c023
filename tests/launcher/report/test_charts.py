"""What the charts say is what was measured."""

from __future__ import annotations

from samestep.launcher.report.figures import charts
from samestep.launcher.report.page import render


def by_key(*histories):
    return {chart.key: chart for chart in charts(histories)}


def test_one_run_has_its_charts_in_order(made):
    keys = list(by_key(made.history(made.events(100))))
    expected = ["loss", "eval-accuracy", "timeline", "throughput", "host-memory", "phases-run", "ranks-run"]
    assert keys == expected


def test_several_runs_share_a_chart_and_keep_their_colours(made):
    found = by_key(made.history(made.events(60), "one"), made.history(made.events(60), "two"))
    shown = [(trace["name"], trace["line"]["color"]) for trace in found["throughput"].data]
    assert [name for name, _ in shown] == ["one", "two"]
    assert len({ink for _, ink in shown}) == 2
    assert {"phases-one", "phases-two", "ranks-one", "ranks-two"} <= found.keys()


def test_every_step_of_a_short_run_is_a_point_on_each_axis(made):
    loss = by_key(made.history(made.events(100)))["loss"]
    assert loss.data[0]["y"] == [float(f"{2.0 / step:.6g}") for step in range(1, 101)]
    assert loss.xs[0] is not None
    assert loss.xs[0]["steps"] == list(range(1, 101))
    assert loss.xs[0]["samples"] == [64 * step for step in range(1, 101)]
    assert loss.xs[0]["seconds"][-1] == 10.0


def test_a_spike_of_a_long_run_is_drawn_and_so_is_a_loss_that_was_not_finite(made):
    events = [made.step(step, loss=0.1) for step in range(1, 20_001)]
    events[7_000]["loss"], events[12_000]["loss"] = 99.0, None
    loss = by_key(made.history(events))["loss"]
    raw = loss.data[0]
    assert loss.xs[0] is not None
    assert loss.xs[0]["steps"][raw["y"].index(99.0)] == 7_001
    assert len(raw["y"]) <= 4000
    marks = next(trace for trace in loss.data if trace["name"].endswith("not finite"))
    assert loss.xs[loss.data.index(marks)]["steps"] == [12_001]


def test_throughput_is_samples_over_time_and_no_mean_of_rates(made):
    fast, slow = {"samples_per_s": 640.0}, {"samples_per_s": 64.0}  # 0.1 s and 1 s for 64 samples
    events = [made.step(step) | (slow if step % 2 else fast) for step in range(1, 1000)]
    smooth = by_key(made.history(events))["throughput"].data[-1]["y"]
    assert abs(smooth[10] - 2 * 64 / 1.1) < 15
    assert max(smooth) < 200


def test_stacked_phases_add_up_to_the_step(made):
    phases = by_key(made.history(made.events(20)))["phases-run"]
    stacked = [trace["y"][0] for trace in phases.data if "stackgroup" in trace]
    assert abs(sum(stacked) - 1000 * sum(0.002 * n for n in range(5))) < 1e-6
    slowest = phases.data[-1]["y"][0]
    assert abs(slowest - sum(stacked) - 2.0) < 1e-6  # rank 1 takes 2 ms more in backward


def test_times_of_each_rank_are_stacked_and_say_who_is_slow(made):
    ranks = by_key(made.history(made.events(20, ranks=3)))["ranks-run"]
    assert [trace["x"] for trace in ranks.data] == [["rank 0", "rank 1", "rank 2"]] * 6
    assert ranks.data[-1]["name"] == "between steps"
    backward = next(trace for trace in ranks.data if trace["name"] == "backward")
    assert backward["y"] == [3.0, 3.0, 3.0]
    assert backward["customdata"] == ["0%", "0%", "100%"]


def test_evaluations_and_checkpoints_are_spread_over_the_steps_of_their_ranks(made):
    evaluated = {"event": "eval", "time": 1000.0, "step": 20, "metrics": {}, "rank_seconds": [0.2, 0.4, 0.2]}
    saved = {"event": "checkpoint", "time": 1000.0, "step": 20, "seconds": 0.1}
    ranks = by_key(made.history([*made.events(20, ranks=3), evaluated, saved]))["ranks-run"]
    heights = {trace["name"]: trace["y"] for trace in ranks.data}
    assert (heights["evaluation"], heights["checkpoint"]) == ([10.0, 20.0, 10.0], [5.0, 0.0, 0.0])


def test_failures_restarts_and_checkpoints_stand_on_the_time_axis(made):
    timeline = by_key(made.history(made.events(100, crash_after=50)))["timeline"]
    marks = {trace["name"].rpartition(", ")[2]: (trace["x"], trace["y"]) for trace in timeline.data[1:]}
    assert marks["checkpoints"] == ([2.5, 5.0, 7.5, 10.0], [25, 50, 75, 100])
    assert marks["failure"] == marks["restart"] == ([5.0], [50])
    assert marks["end"] == ([10.0], [100])


def test_a_run_without_a_step_has_a_page(made):
    page = "".join(render([made.history(made.events(0, finish=False))], ""))
    assert "not finished" in page


def test_a_run_of_a_million_steps_is_a_page_of_few_megabytes(made):
    history = made.history(made.events(100))
    buckets = history.steps.buckets()
    many = [bucket for _ in range(20) for bucket in buckets]  # as many as a Thinner ever gives
    history.steps._buckets = many
    assert len("".join(render([history], ""))) < 1_500_000
