"""P3, P6: what a run goes on from, what it refuses, and what it never saves."""

from __future__ import annotations

import json
import pickle  # noqa: TID251 (to offer one that must be refused)
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn

from samestep.launcher.digest import path_digest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "small.py"
EVERY = ("--checkpoint-every", "3", "--shards", "2")


@pytest.fixture
def go(rank_server, tmp_path):
    """`go(*flags, ranks=1, fault="")` starts the recipe once more in the same run directory."""

    def start(*flags, ranks=1, fault="", folder="here", code=0):
        ended = rank_server(tmp_path / folder, RECIPE, "--run-dir", "run", *flags, ranks=ranks, env={"FAULT": fault})
        assert set(ended.codes) == {code}, ended.stderrs
        return ended

    return start


def test_a_stop_at_any_step_and_another_world_size_ends_in_the_same_bits(go):
    whole = go(*EVERY, folder="whole").bits
    for stop in (1, 6, 7, 8):
        go(*EVERY, "--max-steps", stop, ranks=2, folder=f"stop-{stop}")
        resumed = go(*EVERY, ranks=1 + stop % 2, folder=f"stop-{stop}")
        assert resumed.bits == whole
        assert [e["step"] for e in resumed.events("step")] == list(range(1, 15))
        assert [e["epoch"] for e in resumed.events("epoch")] == [1, 2]


def test_more_epochs_go_on_where_the_run_had_ended(go):
    whole = go("--epochs", "3", "--shards", "2", folder="whole").bits
    go("--epochs", "2", "--shards", "2")
    assert go("--epochs", "3").bits == whole


def test_a_finished_run_started_again_says_its_digest_and_changes_nothing(go):
    first = go()
    before = (first.run_dir / "events.jsonl").read_bytes()
    again = go()
    assert f"Already finished: 14 steps, digest {first.digest}" in again.stdout
    assert (again.run_dir / "events.jsonl").read_bytes() == before


def test_a_finished_run_started_again_with_other_options_names_them_and_changes_nothing(go):
    first = go()
    before = (first.run_dir / "events.jsonl").read_bytes()
    for _ in range(2):  # the options of the run are still those that it was trained with
        again = go("--global-batch-size", "8")
        assert "Already finished: 14 steps" in again.stdout
        told = "warning: --global-batch-size changed from 16 to 8 since the last start: the run had ended before"
        assert told in again.stderr
        assert (again.run_dir / "events.jsonl").read_bytes() == before


def test_a_run_that_is_to_end_before_the_step_that_it_has_come_to_has_that_many(go):
    ended = go("--max-steps", "6")
    events = ended.run_dir / "events.jsonl"
    events.write_text("".join(line for line in events.read_text().splitlines(True) if "run_finished" not in line))
    again = go("--max-steps", "4")
    assert json.loads((again.run_dir / "config.json").read_text())["total_steps"] == 6
    assert again.digest == ended.digest


def test_a_run_killed_after_its_last_save_is_ended_properly(go):
    ended = go()
    events = ended.run_dir / "events.jsonl"
    events.write_text("".join(line for line in events.read_text().splitlines(True) if "run_finished" not in line))
    (ended.run_dir / "weights.safetensors").unlink()
    digest = ended.events("checkpoint")[-1]
    again = go()
    assert again.digest
    assert digest in again.events("checkpoint")
    assert (again.run_dir / "weights.safetensors").exists()


def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_used(go):
    whole = go(*EVERY, folder="whole").bits
    stopped = go(*EVERY, "--max-steps", "9")
    weights = stopped.checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    resumed = go(*EVERY)
    assert resumed.bits == whole
    assert "step-00000009 is damaged (model.safetensors was changed" in resumed.stderr
    assert (stopped.run_dir / "checkpoints" / "step-00000009.corrupt").is_dir()


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_valid_checkpoint_left_is_exit_78_never_a_start_from_zero(go, ranks):
    stopped = go(*EVERY, "--max-steps", "9")
    for manifest in (stopped.run_dir / "checkpoints").glob("*/MANIFEST.json"):
        manifest.unlink()
    refused = go(*EVERY, ranks=ranks, code=78)
    assert refused.stderr.startswith("error: no checkpoint in")
    assert "Traceback" not in refused.stderrs


def test_resume_never_with_checkpoints_there_is_a_usage_error(go):
    go("--max-steps", "2")
    assert "--resume never is expected" in go("--resume", "never", code=2).stderr


def test_resume_from_a_path_starts_another_run_there(go, tmp_path):
    whole = go(*EVERY, folder="whole")
    go(*EVERY, "--max-steps", "6", folder="first")
    path = tmp_path / "first" / "run" / "checkpoints" / "step-00000006"
    other = go("--resume", path, ranks=2, folder="second")
    assert other.digest == whole.digest
    assert [e["step"] for e in other.events("step")] == list(range(7, 15))


def test_what_changed_since_the_run_that_another_one_begins_with_is_named(go, tmp_path):
    go("--max-steps", "4", "--threads", "1", folder="first")
    path = tmp_path / "first" / "run" / "checkpoints" / "step-00000004"
    other = go("--resume", path, "--clip-grad-norm", "0.5", "--threads", "2", folder="second")
    begun = "since the run that this one begins with: the bits of the following steps can differ"
    assert f"warning: --clip-grad-norm changed from None to 0.5 {begun}" in other.stderr
    assert f"warning: threads changed from 1 to 2 {begun}" in other.stderr
    assert other.stderr.count("warning: ") == 2
    assert "warning: " not in go("--resume", path, folder="same").stderr


@pytest.mark.parametrize("of", ["own", "another"])
def test_a_run_whose_config_can_not_be_read_is_said_to_hide_what_changed(go, tmp_path, of):
    first = go("--max-steps", "4", "--threads", "1", folder="here")
    (first.run_dir / "config.json").write_text("{")
    own = of == "own"
    flags = () if own else ("--resume", first.run_dir / "checkpoints" / "step-00000004")
    later = go("--clip-grad-norm", "0.5", *flags, folder="here" if own else "there")
    since = "the last start" if own else "the run that this one begins with"
    assert f"warning: what changed since {since} can't be told: its config.json can't be read" in later.stderr


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("latest", "--resume takes auto (the newest valid checkpoint), never, or the path of a checkpoint's folder"),
        ("../first/run", "--resume ../first/run/checkpoints/step-00000002"),
    ],
)
def test_a_resume_that_names_no_checkpoint_is_told_what_does(go, path, hint):
    go("--max-steps", "2", folder="first")
    refused = go("--resume", path, folder="second", code=2)
    assert f"error: --resume {path} is expected to be a valid checkpoint folder" in refused.stderr
    assert refused.stderr.rstrip().endswith(hint)
    assert len(refused.stderr.splitlines()) == 2


def test_resume_from_an_older_checkpoint_sets_the_newer_ones_aside(go, tmp_path):
    whole = go(*EVERY)
    older = tmp_path / "here" / "run" / "checkpoints" / "step-00000012"
    again = go("--resume", older, *EVERY)
    assert again.bits == whole.bits
    assert "step-00000014 is newer than the one resumed from" in again.stderr
    assert (older.parent / "step-00000014.superseded").is_dir()
    assert (older.parent / "step-00000014").is_dir()


@pytest.mark.parametrize(
    ("flags", "fault", "said"),
    [
        (("--seed", "1"), "", "seed is expected to be as in step-00000004, but changed from 0 to 1"),
        (("--samples", "99"), "", "dataset is expected to be as in"),
        ((), "other-data", "dataset is expected to be as in"),
        (("--shards", "3"), "", "--shards is expected to stay 2"),
        (("--width", "9"), "", "model and optimizer are expected to fit"),
    ],
)
def test_a_change_that_breaks_order_or_shapes_is_refused_with_both_values(go, flags, fault, said):
    go("--max-steps", "4", "--shards", "2")
    refused = go(*flags, fault=fault, code=2)
    assert said in refused.stderr
    assert "hint:" in refused.stderr
    assert len(refused.stderr.splitlines()) <= 4


def test_a_change_that_can_only_move_bits_is_a_warning_with_both_values(go):
    go("--max-steps", "4", "--threads", "1")
    resumed = go("--precision", "bf16", "--threads", "2", "--epochs", "3")
    assert "warning: --precision changed from no to bf16" in resumed.stderr
    assert "warning: threads changed from 1 to 2" in resumed.stderr
    assert "epochs" not in resumed.stderr


@pytest.mark.parametrize(
    ("stop", "size", "steps"),
    [
        (7, 50, 9),
        (9, 8, 18),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in ((7, 8, 20), (9, 50, 11), (9, 200, 10))),
    ],
)
def test_epochs_are_epochs_whatever_the_batch_size_was_before(go, stop, size, steps):
    go("--max-steps", stop, "--checkpoint-every", stop)
    resumed = go("--global-batch-size", size)
    assert f"warning: --global-batch-size changed from 16 to {size}" in resumed.stderr
    assert f"Finished Training: {steps} steps" in resumed.stdout
    assert [event["epoch"] for event in resumed.events("epoch")] == [1, 2]
    assert [event["samples"] for event in resumed.events("epoch")] == [100, 100]
    assert f"Already finished: {steps} steps" in go("--global-batch-size", 100).stdout


def test_a_state_that_is_not_finite_is_never_saved(go):
    ended = go(*EVERY, fault="nan", code=1)
    assert "is not finite" in ended.stderr
    assert [path.name for path in (ended.run_dir / "checkpoints").iterdir()] == ["step-00000003"] or not list(
        (ended.run_dir / "checkpoints").iterdir()
    )


def test_a_full_disk_keeps_training_and_the_last_good_checkpoint(go, tmp_path):
    whole = go(*EVERY, "--keep-checkpoints", "1", folder="whole")
    saves = tmp_path / "here" / "run" / "checkpoints"
    go(*EVERY, "--keep-checkpoints", "1", "--max-steps", "3")
    kept = tmp_path / "kept"
    shutil.copytree(saves, kept)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(saves)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        shutil.copytree(kept, saves, dirs_exist_ok=True)
        (saves / "filler").write_bytes(b"x" * (64 * 1024 - 28 * 1024))
        full = go(*EVERY, "--keep-checkpoints", "1", code=77)
        assert "could not be written (No space left on device); training goes on" in full.stderr
        assert "the run is expected to end with a checkpoint of step 14" in full.stderr
        assert [path.name for path in saves.glob("step-*")] == ["step-00000003"]
        (saves / "filler").unlink()
        again = go(*EVERY, "--keep-checkpoints", "1")
        assert again.digest == whole.digest
    finally:
        subprocess.run(["umount", str(saves)], check=True)


def test_what_could_only_be_saved_with_pickle_is_refused_at_the_start(go):
    refused = go(fault="unpicklable", code=2)
    assert "state.optimizer.param_groups.0.callback is expected to be made of tensors" in refused.stderr
    assert not refused.events("step")


def test_foreign_weights_start_a_run_and_a_pickle_is_refused(go, tmp_path):
    first = go("--max-steps", "5", folder="first")
    exported = first.run_dir / "weights.safetensors"
    started = go("--weights", exported, "--max-steps", "0", folder="second")
    assert started.digest == first.digest
    marker = tmp_path / "executed"
    evil = tmp_path / "evil.safetensors"
    evil.write_bytes(pickle.dumps(Evil(marker)))
    refused = go("--weights", evil, folder="third", code=2)
    assert "--weights is expected to be a safetensors file" in refused.stderr
    assert not marker.exists()
    save_file({"0.weight": torch.zeros(8, 6)}, tmp_path / "few.safetensors")
    assert (
        "--weights is expected to fit the model"
        in go("--weights", tmp_path / "few.safetensors", folder="fourth", code=2).stderr
    )


class Evil:
    """Unpickling it would create a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_the_best_checkpoint_by_a_metric_is_kept_besides_the_newest(go):
    ended = go("--best", "min:error", "--eval-every", "2", "--keep-checkpoints", "1", "--epochs", "4")
    errors = {event["step"]: event["metrics"]["error"] for event in ended.events("eval")}
    best = min(errors, key=lambda step: (errors[step], step))
    names = {path.name for path in (ended.run_dir / "checkpoints").glob("step-*")}
    assert names == {f"step-{best:08d}", f"step-{28:08d}"}
    assert "--best is expected to name a metric" in go("--best", "max:nothing", folder="other", code=2).stderr


def test_an_average_of_weights_is_evaluated_exported_and_resumed_exactly(go):
    whole = go(*EVERY, fault="ema", folder="whole")
    go(*EVERY, "--max-steps", "8", fault="ema", ranks=2)
    resumed = go(*EVERY, fault="ema")
    assert resumed.bits == whole.bits
    average = load_file(resumed.run_dir / "weights.safetensors")
    assert not average["0.weight"].equal(resumed.weights["0.weight"])
    assert average["0.weight"].equal(load_file(whole.run_dir / "weights.safetensors")["0.weight"])


def test_the_digest_of_an_average_is_told_beside_that_of_the_weights(go):
    ended = go("--max-steps", "5", fault="ema")
    exported = path_digest(ended.run_dir / "weights.safetensors")
    assert exported != ended.digest == path_digest(ended.checkpoint)
    assert f"weights.safetensors holds the average of the weights (Components.ema), digest {exported}\n" in ended.stdout
    assert f"Finished Training: 5 steps, digest {ended.digest}" in ended.stdout
    assert "average" not in go("--max-steps", "5", folder="without").stdout


def test_an_average_follows_every_update_as_torchs_own_does(go):
    ended = go("--checkpoint-every", "1", "--keep-checkpoints", "99", fault="ema")
    steps = sorted((ended.run_dir / "checkpoints").glob("step-*"))
    first, *later = [load_file(path / "model.safetensors") for path in steps]
    expected = [first[name].clone() for name in first]
    for weights in later:
        get_ema_multi_avg_fn(0.9)(expected, [weights[name] for name in first], None)
    average = load_file(ended.run_dir / "weights.safetensors")
    assert all(average[name].equal(tensor) for name, tensor in zip(first, expected, strict=True))


@pytest.mark.parametrize(
    ("fault", "key"), [("lr", "weights (first 0.weight)"), ("initial-weights", "weights (first 2.bias)")]
)
def test_ranks_that_drift_apart_are_named_with_step_and_tensor(go, fault, key):
    ended = go(ranks=2, fault=fault, code=1)
    assert f"rank 1 differs in its {key}" in ended.stderr
    assert f"after step {0 if fault == 'initial-weights' else 3} " in ended.stderr


def test_the_configuration_on_disk_says_what_was_resolved(go):
    content = json.loads((go("--max-steps", "1", "--shards", "3").run_dir / "config.json").read_text())
    assert content["shards"] == 3
    assert content["config"]["width"] == 8
    assert content["environment"]["torch"] == torch.__version__


def test_an_error_record_says_step_and_phase(go):
    ended = go(fault="raise", code=1)
    record = json.loads((ended.run_dir / "errors" / "rank-0.json").read_text())
    assert (record["step"], record["phase"], record["kind"]) == (4, "forward", "ValueError")
    assert record["frame"].endswith("in loss")


def test_a_start_that_a_newer_one_has_replaced_ends_with_a_sentence(go):
    ended = go(*EVERY, fault="superseded", code=1)
    assert "error: this is no longer the newest start of the run: " in ended.stderr
    assert "/run/lock belongs to another one (pid " in ended.stderr
    assert "hint: the newest start goes on" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list((ended.run_dir / "checkpoints").iterdir())


def test_a_lock_that_can_not_be_written_is_a_sentence(go, tmp_path):
    (tmp_path / "here" / "run" / "lock").mkdir(parents=True)
    refused = go(ranks=2, code=2)
    assert "run/lock is expected to be writable, but: Is a directory" in refused.stderr
    assert "Traceback" not in refused.stderrs


def test_events_that_can_not_be_read_are_a_sentence_and_nothing_is_set_aside(go, tmp_path):
    (tmp_path / "here" / "run" / "events.jsonl").mkdir(parents=True)
    torn = tmp_path / "here" / "run" / "checkpoints" / "step-00000003"
    torn.mkdir(parents=True)
    refused = go(ranks=2, code=2)
    assert "run/events.jsonl is expected to be a file that can be read, but: Is a directory\nhint: " in refused.stderr
    assert "Traceback" not in refused.stderrs
    assert torn.is_dir()
