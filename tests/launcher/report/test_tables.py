"""The words of the page, against what the events say."""

from __future__ import annotations

from samestep.launcher.report.tables import facts, verdicts


def test_the_evaluation_that_is_shown_is_the_last_one_of_however_many(made):
    values = [1.0 / (1 + step % 7) for step in range(5000)]
    events = [made.step(1)]
    events += [
        {"event": "eval", "time": 1000.0 + n, "step": n + 1, "metrics": {"loss": value}}
        for n, value in enumerate(values)
    ]
    for count in (1, 2, 900, 4998, 4999, 5000):
        assert facts(made.history(events[: count + 1]))["Evaluation: loss"] == f"{values[count - 1]:.5g}"
    events.append({"event": "eval", "time": 9000.0, "step": 5001, "metrics": {"loss": None}})
    assert facts(made.history(events))["Evaluation: loss"] == "-"


def test_memory_of_hosts_and_devices_is_told_apart(made):
    memory = {"host": [5 << 30, 4 << 30], "device": [60 << 30, 70 << 30]}
    loads = {"rank_seconds": {phase: [0.0, 0.0] for phase in made.step(1)["seconds"]}, "memory": memory}
    told = facts(made.history([*made.events(0, finish=False), made.step(1, **loads)]))
    assert told["Peak host memory of a rank"] == "5.00 GiB"
    assert told["Peak device memory of a rank"] == "70.00 GiB"
    assert "Peak device memory of a rank" not in facts(made.history(made.events(20)))


def test_runs_without_a_step_in_common_are_not_called_the_same(made):
    events = [made.step(step) for step in range(1, 11)]
    first, later, shorter = (
        made.history(events[:5], "first"),
        made.history(events[5:], "later"),
        made.history(events[:3], "shorter"),
    )
    (apart,), (same,) = verdicts([first, later]), verdicts([first, shorter])
    assert (apart.text, apart.good) == ("The losses of first and later have no step in common", False)
    assert (same.text, same.good) == (
        "The losses of first and shorter have the same bits in all 3 steps that both have",
        True,
    )
