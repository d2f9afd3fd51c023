"""The display as people see it, at the widths of their terminals."""

from __future__ import annotations

import math

import pytest

from samestep.launcher.view.lines import clock, count, display, one_line, size
from samestep.launcher.view.standing import Standing


def stood(events, **config):
    standing = Standing()
    standing.configure({"total_steps": 100, "config": {"epochs": 2}} | config)
    for event in events:
        standing.take(event)
    return standing


def shown(standing, width, **how):
    return [line.plain for line in display(standing, width, **how)]


def test_training_at_80_columns(made):
    assert shown(stood(made.events(60, finish=False)), 80) == [
        "━━━━━━━━━━━━━━━  step 60/100  epoch 2/2  loss 0.03333  3200 samples/s  ETA 0:04",
        "data 0 fwd 10 bwd 20 sync 30 opt 40%  slowest 1  361 MiB  saved 50",
    ]


def test_training_at_160_columns(made):
    assert shown(stood(made.events(60, crash_after=40, finish=False)), 160) == [
        "━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  step 60/100  epoch 2/2  loss 0.03333  3200 samples/s  ETA 0:04",
        "data 0% forward 10% backward 20% sync 30% optimizer 40%  slowest rank 1 in backward  memory 361 MiB (rank 1)"
        "  1 restart  saved step 50",
    ]


def test_an_ended_run_shows_its_digest_whole_at_80_columns(made):
    *_, last = shown(stood(made.events(100)), 80, running=False)
    assert last == f"done, digest {'ab' * 32}"


def test_a_failed_run_says_why_and_whether_it_goes_on(made):
    events = made.events(60, crash_after=40)
    failed = [event["event"] for event in events].index("worker_failed")
    standing = stood(events[: failed + 1])
    assert shown(standing, 80, running=False)[-1] == "rank 1 failed in step 41: killed by SIGKILL (signal 9)"
    assert shown(standing, 80)[-1] == "rank 1 failed in step 41: killed by SIGKILL (signal 9); starting again"


def test_a_run_that_was_stopped_says_where_it_would_go_on(made):
    standing = stood(made.events(60, finish=False))
    assert shown(standing, 80, running=False)[-1] == "not running; started again it goes on from step 50"


def test_a_loss_that_is_not_finite_is_said_and_not_averaged_away(made):
    line = shown(stood([*made.events(60, finish=False), made.step(61, loss=None)]), 80)[0]
    assert "loss not finite" in line


def test_before_the_first_step(made):
    assert shown(stood([]), 80) == ["starting, no step yet"]
    assert one_line(stood(made.events(0, finish=False))) == "starting, no step yet"


@pytest.mark.parametrize("width", [1, 8, 20, 40, 60, 79, 80, 100, 160, 400])
def test_no_line_is_wider_than_the_screen(width, made):
    long = {"event": "worker_failed", "time": 1.0, "rank": 1, "step": 3, "phase": "x", "cause": "y\n" * 300}
    for events in ([], made.events(60, crash_after=40, finish=False), made.events(100), [*made.events(60), long]):
        lines = display(stood(events, total_steps=10**9), width)
        assert len(lines) <= 3
        assert all(line.cell_len <= width and "\n" not in line.plain for line in lines)


def test_a_terminal_without_unicode_gets_ascii(made):
    for line in shown(stood(made.events(60, finish=False)), 100, plain_bar=True):
        assert line.isascii()


def test_one_line_holds_everything_and_no_control_character(made):
    line = one_line(stood(made.events(60, crash_after=40, finish=False)))
    assert line.isprintable()
    for part in ("step 60/100", "loss 0.0333", "3200 samples/s", "ETA 0:04", "backward 20%", "rank 1", "1 restart"):
        assert part in line


def test_an_error_that_colours_or_clears_the_screen_is_shown_as_words(made):
    cause = "ValueError: \x1b[1;31mred\x1b[0m\rover\x1b[2J\u202e\x07 é"
    failed = {"event": "worker_failed", "time": 1.0, "rank": 1, "step": 3, "phase": "forward", "cause": cause}
    standing = stood([*made.events(3, finish=False), failed])
    assert shown(standing, 80)[-1] == "rank 1 failed in step 4: ValueError: red over   é; starting again"
    assert one_line(standing).isprintable()


def test_one_rank_has_no_slowest(made):
    assert "slowest" not in one_line(stood(made.events(20, ranks=1, finish=False)))


def test_remaining_time_counts_evaluations_and_checkpoints_too(made):
    steps = [made.step(step, at=1000.0 + step) for step in range(1, 21)]  # steps of 20 ms, but one a second
    assert stood(steps).remaining == 80.0


@pytest.mark.parametrize("broken", [{}, {"event": 3}, {"event": "step", "time": None}, {"event": "step", "step": "x"}])
def test_a_strange_event_is_passed_over(broken, made):
    before = one_line(stood(made.events(60, finish=False)))
    assert one_line(stood([*made.events(60, finish=False), broken])) == before


def test_numbers_are_short():
    assert [clock(seconds) for seconds in (0, 42.4, 725, 11_220, 187_200)] == [
        "0:00",
        "0:42",
        "12:05",
        "3:07:00",
        "2 d 4 h",
    ]
    assert [size(held) for held in (812 << 20, 3 << 30)] == ["812 MiB", "3.00 GiB"]
    assert [count(value) for value in (0.5234, 87.345, 2787.4)] == ["0.523", "87.3", "2787"]
    assert math.isclose(stood([]).shares.get("data", 0.0), 0.0)


def test_who_waits_for_others_is_not_called_slow(made):
    def spread(mean, most, rank):
        return {"mean": mean, "max": most, "slowest_rank": rank}

    # rank 1 takes 4 ms longer, half of it in forward and half in backward; rank 0 waits for it in sync
    seconds = {"data": spread(0, 0, 0), "forward": spread(4, 5, 1), "backward": spread(4, 5, 1)}
    seconds |= {"sync": spread(2, 4, 0), "optimizer": spread(0, 0, 0)}
    standing = stood([*made.events(0, finish=False), made.step(1, seconds=seconds)])
    assert standing.slowest == (1, "forward")


def test_a_step_without_weight_changes_no_loss(made):
    standing = stood([made.step(1, loss=0.25), made.step(2, loss=None, weightless=True)])
    assert "loss 0.25" in one_line(standing)


def test_memory_is_that_of_the_devices_where_there_are_any(made):
    memory = {"host": [5 << 30, 4 << 30], "device": [2 << 30, 3 << 30]}
    assert "GPU memory 3.00 GiB (rank 1)" in one_line(stood([made.step(1, memory=memory)]))
    assert "memory 5.00 GiB (rank 0)" in one_line(stood([made.step(1, memory=memory | {"device": [0, 0]})]))
