"""Curves in TensorBoard and MLflow, read back with their own readers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

from samestep.launcher.contract import UsageError
from samestep.train.observe.mlflow_names import legal
from samestep.train.observe.trackers import Feed, Sent, wanted

FLAGS = ("--log-every", 2, "--checkpoint-every", 4, "--shards", 2)
SECONDS = 2.0  # that the tracker of recipes/tracked.py takes to start
Curve = list[tuple[int, Any]]


def tensorboard_curve(run_dir: Path, tag: str) -> Curve:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        reader = EventAccumulator(str(run_dir / "trackers" / "tensorboard"), {"scalars": 0})
        reader.Reload()
        return [(point.step, point.value) for point in reader.Scalars(tag)]


def mlflow_curve(store: str, run_dir: Path, tag: str) -> Curve:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        run = json.loads((run_dir / "trackers.json").read_text())["mlflow"]["id"]
        return [(point.step, point.value) for point in MlflowClient(store).get_metric_history(run, tag)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Environment of a local MLflow store."""
    environ = {"MLFLOW_TRACKING_URI": f"file://{tmp_path / 'mlruns'}", "MLFLOW_ALLOW_FILE_STORE": "true"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return environ


def test_mlflow_keeps_its_files_in_the_run_directory_where_nobody_names_a_store(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)
    ended = trained("small", *FLAGS, "--max-steps", 4, "--trackers", "mlflow")
    assert ended.events("warning") == []
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    files = f"file://{ended.run_dir / 'trackers' / 'mlruns'}"
    losses = [(event["step"], event["loss"]) for event in ended.events("step")]
    assert set(mlflow_curve(files, ended.run_dir, "train/loss")) <= set(losses)
    assert mlflow_curve(files, ended.run_dir, "train/loss")


def test_curves_have_the_runs_own_losses_with_the_step_as_x(trained: Any, store: dict[str, str]) -> None:
    plain = trained("small", *FLAGS, "--max-steps", 9, ranks=2, cwd="plain")
    ended = trained("small", *FLAGS, "--max-steps", 9, "--trackers", "tensorboard,mlflow", ranks=2, env=store)
    assert ended.bits == plain.bits, "looking on changes nothing"
    assert ended.events("warning") == []
    per_epoch = max(event["step"] for event in ended.events("step") if event["epoch"] == 1)
    losses = {event["step"]: event["loss"] for event in ended.events("step")}
    printed = [step for step in losses if ((step - 1) % per_epoch + 1) % 2 == 0]
    expected = [(step, losses[step]) for step in printed]
    assert mlflow_curve(store["MLFLOW_TRACKING_URI"], ended.run_dir, "train/loss") == expected
    assert tensorboard_curve(ended.run_dir, "train/loss") == [(s, pytest.approx(v)) for s, v in expected]  # float32
    evals = [(event["step"], event["metrics"]["loss"]) for event in ended.events("eval")]
    assert mlflow_curve(store["MLFLOW_TRACKING_URI"], ended.run_dir, "eval/loss") == evals
    assert [step for step, _ in tensorboard_curve(ended.run_dir, "eval/loss")] == [step for step, _ in evals]
    experiments = [path for path in Path(store["MLFLOW_TRACKING_URI"][7:]).iterdir() if path.name.isdecimal()]
    runs = [path.parent for experiment in experiments for path in experiment.glob("*/meta.yaml")]
    assert len(runs) == 1, "one rank alone has trackers"


@pytest.mark.slow
def test_steps_that_are_done_again_are_points_once_in_the_same_curve(trained: Any, store: dict[str, str]) -> None:
    flags = (*FLAGS, "--trackers", "tensorboard,mlflow")
    first = trained("small", *flags, "--max-steps", 7, env=store)
    for path in sorted(first.checkpoint.rglob("*"), reverse=True):
        path.unlink()
    first.checkpoint.rmdir()  # as if it had died before that: steps 5 to 7 are done again
    ended = trained("small", *flags, "--max-steps", 10, env=store)
    assert [event["step"] for event in ended.events("resumed")] == [4]
    whole = trained("small", *flags, "--max-steps", 10, env=store, cwd="whole")
    for tag in ("train/loss", "eval/loss", "epoch/loss"):
        curve = tensorboard_curve(ended.run_dir, tag)
        assert curve == tensorboard_curve(whole.run_dir, tag)
        uri = store["MLFLOW_TRACKING_URI"]
        assert mlflow_curve(uri, ended.run_dir, tag) == mlflow_curve(uri, whole.run_dir, tag)
        assert len({step for step, _ in curve}) == len(curve) > 0


def test_a_server_that_does_not_answer_costs_a_warning(trained: Any) -> None:
    environ = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    ended = trained("small", *FLAGS, "--max-steps", 4, "--trackers", "mlflow,tensorboard", env=environ)
    (text,) = [event["text"] for event in ended.events("warning")]
    assert text.startswith("tracker mlflow failed (")
    assert text.endswith("it gets no more points")
    assert ended.stderr.count("tracker mlflow failed") == 1
    assert tensorboard_curve(ended.run_dir, "train/loss"), "the other one goes on"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("tensorbord", ["tensorbord", "did you mean tensorboard?"]),
        ("wandb", ["wandb", "pip install 'samestep[wandb]'"]),
    ],
)
def test_a_tracker_that_is_not_there_is_a_usage_error_before_anything_is_done(
    start: Any, names: str, words: list[str]
) -> None:
    if names in {str(kind) for kind in tracking.get_available_trackers()}:
        pytest.skip(f"{names} is installed")
    ended = start("small", "--trackers", names, "--run-dir", "run", ranks=2)
    assert ended.codes == [2, 2]
    assert all(word in ended.stderr for word in words), ended.stderr
    assert not ended.run_dir.exists()


def test_names_are_taken_once_and_spaces_are_no_matter() -> None:
    assert wanted(" tensorboard , tensorboard,") == ["tensorboard"]
    assert wanted("") == []
    with pytest.raises(UsageError, match="names loud"):
        wanted("tensorboard,loud")


class Tool:
    """A tracker that does what it is told: `fails` is the numbers of the calls of log that raise."""

    requires_logging_directory = True
    fails: frozenset[int] | set[int] = frozenset()
    refuses = False

    def __init__(self, name: str, logging_dir: str) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.calls = 0

    def start(self) -> None:
        if self.refuses:
            raise ConnectionError("no\n network")

    def log(self, values: dict[str, float], step: int) -> None:
        if step == 0:
            return
        self.calls += 1
        if self.calls in self.fails:
            raise TimeoutError("busy")
        self.points.append((step, values))

    def finish(self) -> None:
        raise OSError("nor can it end")


@pytest.fixture
def feed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`feed(fails, refuses)` gives a started Feed and the list of its warnings."""

    def make(fails: set[int] = frozenset(), refuses: bool = False) -> tuple[Feed, list[str]]:  # type: ignore[assignment]
        said: list[str] = []
        tool = type("OneTool", (Tool,), {"fails": fails, "refuses": refuses})
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", tool)
        made = Feed("tensorboard", tmp_path, Sent(tmp_path / "trackers.json"), said.append)
        made.start({})
        return made, said

    return make


def test_a_failure_now_and_then_is_told_and_survived(feed: Any) -> None:
    made, said = feed({2, 4, 5})
    for step in range(1, 8):
        made.log("train", step, {"loss": 1.0})
    assert [step for step, _ in made.tracker.points] == [1, 3, 6, 7]
    assert len(said) == 2
    assert all(text.endswith("(TimeoutError: busy); training goes on") for text in said)


def test_failures_in_a_row_end_the_tracker_and_not_the_run(feed: Any) -> None:
    made, said = feed({2, 3, 4})
    for step in range(1, 8):
        made.log("train", step, {"loss": 1.0})
    made.finish()
    assert made.tracker is None
    assert [text.rpartition("; ")[2] for text in said] == ["training goes on", "it gets no more points"]


def test_a_tracker_that_does_not_start_is_left_alone(feed: Any) -> None:
    made, said = feed(refuses=True)
    made.log("train", 1, {})
    made.finish()
    assert said == ["tracker tensorboard failed (ConnectionError: no network); it gets no more points"]


def test_a_tracker_that_does_not_end_is_told(feed: Any) -> None:
    made, said = feed()
    made.finish()
    assert len(said) == 1


NAMES = {
    "acc@1": "acc_1",
    "acc#1": "acc_1_2",
    "a//b": "a/_/b",
    "../up": "_/up",
    "n" * 300: "n" * 245,
    "n" * 301: "n" * 239 + "_2",
    "n" * 302: "n" * 239 + "_3",
    "Größe .-:/x": "Größe .-:/x",
}


def test_a_name_that_mlflow_refuses_costs_a_warning_and_no_point(tmp_path: Path, store: dict[str, str]) -> None:
    said: list[str] = []
    made = Feed("mlflow", tmp_path, Sent(tmp_path / "trackers.json"), said.append)
    made.start({})
    for step in (1, 2):
        made.log("eval", step, {f"eval/{name}": float(step) for name in (*NAMES, "loss")})
    made.finish()
    for name in (*NAMES.values(), "loss"):
        assert mlflow_curve(store["MLFLOW_TRACKING_URI"], tmp_path, f"eval/{name}") == [(1, 1.0), (2, 2.0)], said
    assert len(said) == len(NAMES) - 1, said
    assert said[0] == "tracker mlflow takes no metric of the name eval/acc@1: there it is eval/acc_1"


@pytest.mark.parametrize(
    ("name", "expected"), [("eval/", "eval/_"), ("a" * 249 + "/b", "a" * 249), ("é/b.c-d e:f", "é/b.c-d e:f")]
)
def test_a_name_for_mlflow_is_the_nearest_that_is_a_path_going_down(name: str, expected: str) -> None:
    assert legal(name, ()) == expected


@pytest.mark.parametrize("content", ["", "[]", "{", '{"tensorboard": {"id": null, "steps": {"train": 5}}}'])
def test_a_damaged_note_of_what_was_sent_is_begun_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "trackers.json").write_text(content)
    sent = Sent(tmp_path / "trackers.json")
    assert sent.of("tensorboard")["steps"] == ({"train": 5} if "5" in content else {})


def test_a_name_that_is_a_folder_of_another_one_has_a_file_beside_it() -> None:
    assert legal("eval/acc/top1", ["eval/acc"]) == "eval/acc_top1"
    assert legal("eval/acc", ["eval/acc/top1"]) == "eval/acc_2"
    assert legal("eval/accuracy", ["eval/acc"]) == "eval/accuracy"
    assert legal("a/b/c/d", ["a", "a_b"]) == "a_b_c/d"


def test_both_metrics_reach_mlflow_and_no_rank_waits_for_its_start_in_a_step(
    trained: Any, store: dict[str, str]
) -> None:
    ended = trained("tracked", "--shards", 2, "--trackers", "mlflow", ranks=2, env=store)
    (warning,) = ended.events("warning")
    assert warning["text"] == "tracker mlflow takes no metric of the name eval/acc/top1: there it is eval/acc_top1"
    values = ended.events("eval")[0]["metrics"]
    for name, ours in (("eval/acc", "acc"), ("eval/acc_top1", "acc/top1")):
        assert mlflow_curve(store["MLFLOW_TRACKING_URI"], ended.run_dir, name) == [(2, values[ours])]
    seconds = ended.events("step")[0]["seconds"]
    assert sum(phase["max"] for phase in seconds.values()) < SECONDS
