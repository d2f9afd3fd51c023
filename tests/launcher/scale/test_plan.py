"""`samestep plan`: figures of a run or of a person in, rows out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from samestep.launcher.contract import RunDir, UsageError
from samestep.launcher.scale.command import duration, plan
from samestep.launcher.scale.measured import measured
from samestep.launcher.scale.plan_config import numbers_of_ranks

GIVEN = ["--batch", "512", "--measured-ranks", "8", "--forward-ms", "40", "--backward-ms", "80"]
GIVEN += ["--optimizer-ms", "8", "--weights-mb", "2600", "--state-mb", "5200", "--samples", "1000000000"]


def phases(**seconds):
    return {name: {"mean": value, "max": 2 * value, "slowest_rank": 0} for name, value in seconds.items()}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What a run of two ranks leaves: slow first steps, one failure, one checkpoint."""
    step = {"event": "step", "samples": 32, "time": 0.0}
    slow = step | {"seconds": phases(data=9, forward=9, backward=9, sync=9, optimizer=9)}
    usual = step | {"seconds": phases(data=0.001, forward=0.02, backward=0.04, sync=0.01, optimizer=0.005)}
    events = [{"event": "run_started", "world_size": 4}, slow, slow]
    events += [usual | {"time": 10.0}] * 9
    events += [{"event": "worker_failed", "time": 11.0}, {"event": "restarted", "world_size": 2}]
    events += [usual | {"time": 13.5}] * 9
    events += [{"event": "checkpoint", "seconds": 0.25}]
    lines = [json.dumps(event) for event in events]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + '\n{"event": "st')
    folder = RunDir(tmp_path).checkpoint(20)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"0" * 4000)
    (folder / "optimizer.safetensors").write_bytes(b"0" * 8000)
    (folder / "MANIFEST.json").write_text("{}")
    return tmp_path


def test_a_run_is_read_without_its_first_steps(run_dir):
    found = measured(RunDir(run_dir))
    assert (found.batch, found.ranks, found.samples) == (32, 2, 640)
    assert (found.data, found.forward, found.backward, found.optimizer) == (0.001, 0.02, 0.04, 0.005)
    assert (found.save, found.restart) == (0.25, 2.5)
    assert (found.weights, found.state) == (4000.0, 8000.0)


def test_a_run_that_has_not_come_to_its_end_is_planned_whole(run_dir):
    lines = (run_dir / "events.jsonl").read_text().splitlines()[:-1]
    (run_dir / "config.json").write_text(json.dumps({"total_steps": 50}))
    last = {"event": "step", "step": 21, "time": 14.0, "samples": 32, "seconds": phases(forward=0.02)}
    (run_dir / "events.jsonl").write_text("\n".join([*lines, json.dumps(last), ""]))
    assert measured(RunDir(run_dir)).samples == 32 * 50


def test_gradients_are_those_that_the_run_sums_not_its_frozen_weights(run_dir):
    events = run_dir / "events.jsonl"
    ranks = [{"rank": 0, "gradient_bytes": 120}, {"rank": 1, "gradient_bytes": 120}]
    events.write_text(json.dumps({"event": "run_started", "world_size": 2, "ranks": ranks}) + "\n" + events.read_text())

    def planned(*words):
        said: list[str] = []
        plan([str(run_dir), "--json", *words], said.append)
        return json.loads(said[0])["workload"]["gradients"]

    assert [planned(), planned("--weights-mb", "3"), planned("--gradients-mb", "2")] == [120, 3e6, 2e6]


def test_checkpoints_that_cannot_be_read_are_asked_for(run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").symlink_to("checkpoints")
    with pytest.raises(UsageError, match="no checkpoint that can be read"):
        plan([str(run_dir)], lambda line: None)


def test_starts_that_do_not_tell_their_ranks_are_left_out(run_dir):
    events = run_dir / "events.jsonl"
    text = events.read_text().rpartition("\n")[0]
    events.write_text(text + '\n{"event": "restarted"}\n')
    assert measured(RunDir(run_dir)).ranks == 2
    events.write_text(text.replace("world_size", "size"))
    with pytest.raises(UsageError, match="expected to tell its number of ranks"):
        measured(RunDir(run_dir))


def test_times_are_those_of_the_number_of_ranks_that_is_told(run_dir):
    events = run_dir / "events.jsonl"
    text = events.read_text().rpartition("\n")[0] + "\n"
    slower = {"event": "step", "time": 20.0, "samples": 32, "seconds": phases(forward=0.08)}
    events.write_text(text + json.dumps({"event": "restarted", "world_size": 1}) + "\n")
    assert measured(RunDir(run_dir)).ranks == 2, "no step was made on one rank yet"
    with events.open("a") as file:
        file.write(json.dumps(slower) + "\n")
    found = measured(RunDir(run_dir))
    assert (found.ranks, found.forward, found.samples) == (1, 0.08, 672)


def test_a_plan_for_the_measured_ranks_is_as_fast_as_the_run_whose_slowest_rank_sets_the_pace(tmp_path):
    # rank 1 takes 80 ms in forward, rank 0 30 ms, then it waits; 10 ms lie between steps
    step = {"event": "step", "time": 1.0, "samples": 8, "seconds": phases(forward=0.055, backward=0.02, sync=0.025)}
    by_rank = {"data": [0.0, 0.0], "forward": [0.03, 0.08], "backward": [0.02, 0.02], "optimizer": [0.0, 0.0]}
    step["rank_seconds"] = by_rank | {"sync": [0.05, 0.0], "between": [0.01, 0.01]}
    events = [{"event": "run_started", "world_size": 2}, *[step] * 20]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    (row,) = rows_of(str(tmp_path), "--ranks", "2", "--weights-mb", "1", "--latency-us", "0", "--node-latency-us", "0")[
        "rows"
    ]
    assert row["samples_per_s"] == pytest.approx(8 / 0.11, rel=1e-3)


def test_json_is_json_also_where_nothing_ever_ends():
    said: list[str] = []
    for hours in ("0.00001", "1e308"):
        assert plan([*GIVEN, "--json", "--rank-hours", hours], said.append) == 0
    hopeless, endless = (json.loads(text, parse_constant=pytest.fail)["rows"][0] for text in said)
    assert (hopeless["goodput"], hopeless["days"]) == (0.0, None)
    assert (endless["goodput"], endless["mttf"], endless["checkpoint_every"]) == (1.0, None, None)


def rows_of(*words: str) -> dict:
    said: list[str] = []
    assert plan([*words, "--json"], said.append) == 0
    return json.loads(said[0])


def test_given_figures_win_over_measured_ones(run_dir):
    found = rows_of(str(run_dir), "--forward-ms", "30", "--ranks", "2", "--samples", "1000", "--save-seconds", "0")
    assert found["workload"] | {"forward": 0.03, "samples": 1000, "gradients": 4000.0} == found["workload"]
    assert (found["question"]["save"], found["question"]["restart"]) == (0.0, 2.5)
    (row,) = found["rows"]
    assert row["step"] == pytest.approx(0.03 + 0.04 + 0.001 + 0.005 + row["exposed"])


def test_table_has_a_row_for_each_number_of_ranks():
    said: list[str] = []
    assert plan(GIVEN, said.append) == 0
    head, *rows, last = said
    assert [int(row.split()[0]) for row in rows] == [1 << power for power in range(15)]
    assert {len(line) for line in (head, *rows)} == {len(head)}
    assert "3.09 h" in rows[-1]
    assert "Without evaluations" in last
    assert "network.py" in last


@pytest.mark.parametrize("suffix", [".svg", ".html"])
@pytest.mark.parametrize("ranks", ["1-16384", "8", "3,5"])
def test_a_plot_needs_nothing_else(suffix, ranks, tmp_path):
    path = tmp_path / f"plan{suffix}"
    assert plan([*GIVEN, "--ranks", ranks, "--plot", str(path)], lambda line: None) == 0
    text = path.read_text()
    svg = ET.fromstring(text[text.index("<svg") :].strip())  # noqa: S314 (our own)
    circles = list(svg.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 4 * len(numbers_of_ranks(ranks))
    for circle in circles:
        assert 0 <= float(circle.attrib["cx"]) <= 460
        assert 0 <= float(circle.attrib["cy"]) <= 260
    assert re.findall(r"(?:src|href|url)\W", text) == []


@pytest.mark.parametrize(
    ("text", "numbers"), [("1-16", [1, 2, 4, 8, 16]), ("3", [3]), ("8,1,8", [1, 8]), ("1-4,6", [1, 2, 4, 6])]
)
def test_numbers_of_ranks(text, numbers):
    assert numbers_of_ranks(text) == numbers


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--batch is expected without a run directory"),
        (GIVEN[2:], "--batch is expected without a run directory"),
        (["nosuch"], "nosuch is expected to be a run directory, but events.jsonl"),
        (["a", "b"], "followed by one run directory"),
        ([*GIVEN, "--ranks", "0"], "--ranks is expected to be numbers"),
        ([*GIVEN, "--ranks", "5-7"], "a power of two in it"),
        ([*GIVEN, "--bandwidth", "0"], "--bandwidth is expected to be more than 0"),
        ([*GIVEN, "--bandwidth", "1e-320"], "--bandwidth is expected to be from 1e-09 to 1e+15, but is 1e-320"),
        ([*GIVEN, "--weights-mb", "1e30"], "--weights-mb is expected to be from 1e-09 to 1e+15"),
        ([*GIVEN, "--samples", "9" * 400], "--samples is expected to be from 1e-09 to 1e+15"),
        ([*GIVEN, "--backward-ms", "-1"], "--backward-ms is expected to be at least 0"),
        ([*GIVEN, "--rank-hours", "nan"], "--rank-hours is expected to be more than 0"),
        ([*GIVEN, "--plot", "x.png"], "--plot is expected to end in .svg or .html"),
        ([*GIVEN, "--plot", "/proc/nosuch/x.svg"], "--plot is expected to be writable"),
        ([*GIVEN, "--scaling", "medium"], "medium"),
        ([*GIVEN, "--weights-mb", "0"], "--weights-mb is expected"),
        ([*GIVEN, *"--forward-ms 0 --backward-ms 0 --optimizer-ms 0".split()], "expected to add up to more than 0"),
        ([*GIVEN, "--bandwith", "1"], "did you mean --bandwidth?"),
    ],
)
def test_mistakes_are_named(words, expected):
    with pytest.raises(UsageError) as refused:
        plan(words, lambda line: None)
    assert expected in str(refused.value)
    assert refused.value.hint


def test_a_batch_smaller_than_the_measured_ranks_is_one_sample_at_least():
    said: list[str] = []
    plan([*GIVEN, "--batch", "1", "--ranks", "1,8", "--json"], said.append)
    assert [row["batch"] for row in json.loads(said[0])["rows"]] == [1, 1]


def test_a_run_without_steps_is_refused(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": "run_started", "world_size": 1}\n')
    with pytest.raises(UsageError, match="expected to have steps"):
        plan([str(tmp_path)], lambda line: None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0001, "0.1 ms"), (0.25, "250 ms"), (90, "1.5 min"), (7200, "2 h"), (0.9999, "1,000 ms"), (1e9, "11,600 d")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
    assert duration(float("inf")) == "never"


@pytest.mark.parametrize(
    ("ranks", "shards", "seconds"),
    [
        (1, 3, [1.2]),
        (2, 3, [0.4, 0.8]),  # one shard, and two
        (3, 3, [0.4, 0.4, 0.4]),
        (3, 2, [0.0, 0.6, 0.6]),  # one idles
    ],
)
def test_uneven_shards_and_idle_ranks_give_the_same_prediction_for_one_rank(tmp_path, ranks, shards, seconds):
    mean = sum(seconds) / ranks
    step = {"event": "step", "time": 1.0, "samples": 12, "seconds": phases(data=mean)}
    nothing = [0.0] * ranks
    step["rank_seconds"] = dict.fromkeys(("forward", "backward", "optimizer", "sync", "between"), nothing) | {
        "data": seconds
    }
    events = [{"event": "run_started", "world_size": ranks, "shards": shards}, *[step] * 20]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    words = ("--ranks", "1", "--scaling", "strong", "--weights-mb", "1")
    (row,) = rows_of(str(tmp_path), *words)["rows"]
    assert row["step"] == pytest.approx(1.2, rel=1e-3)
