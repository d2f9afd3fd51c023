"""Whoever follows a run sees each event once, also when the run cuts or replaces its file."""

from __future__ import annotations

import json

from samestep.launcher.view.follow import Follower, sift


def line(number, kind="warning"):
    return json.dumps({"event": kind, "number": number}) + "\n"


def numbers(follower):
    anew, events = follower.read()
    return anew, [event["number"] for event in events]


def test_each_event_is_given_once_and_whole(tmp_path):
    path = tmp_path / "events.jsonl"
    follower = Follower(path)
    assert numbers(follower) == (False, [])
    path.write_text(line(1) + line(2)[:9])
    assert numbers(follower) == (True, [1])
    assert numbers(follower) == (False, [])
    with path.open("a") as file:
        file.write(line(2)[9:] + "not json\n[]\n" + line(3))
    assert numbers(follower) == (False, [2, 3])


def test_a_file_that_was_replaced_or_cut_is_read_anew(tmp_path):
    path, other = tmp_path / "events.jsonl", tmp_path / "other"
    path.write_text("".join(map(line, range(10))))
    follower = Follower(path)
    follower.read()
    other.write_text("".join(map(line, range(12))))  # longer than what was read: its name alone tells nothing
    other.rename(path)
    assert numbers(follower) == (True, list(range(12)))
    with path.open("r+") as file:
        file.truncate(len(line(0)))
    assert numbers(follower) == (True, [0])


def test_only_the_end_of_a_long_past_is_read_if_asked(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("".join(line(number) for number in range(10, 90)))
    size = len(line(10))
    assert numbers(Follower(path, past=3 * size)) == (True, [87, 88, 89])
    assert numbers(Follower(path, past=3 * size - 1)) == (True, [88, 89])
    assert numbers(Follower(path, past=10**6)) == (True, list(range(10, 90)))
    assert numbers(Follower(path, past=0)) == (True, [])


def test_of_many_steps_the_last_are_read_and_of_all_else_everything():
    lines = [line(number, "step" if number % 10 else "checkpoint").encode() for number in range(5000)]
    kept = [json.loads(text) for text in sift(lines)]
    assert len([event for event in kept if event["event"] == "checkpoint"]) == 500
    steps = [event["number"] for event in kept if event["event"] == "step"]
    assert len(steps) == 200
    assert steps[-1] == 4999
    assert [event["number"] for event in kept] == sorted(event["number"] for event in kept)
