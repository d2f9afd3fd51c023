"""A mistake in a recipe or its flags: exit 2, one sentence, one hint, no traceback."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from samestep.train.checks import check_shard_size

pytestmark = pytest.mark.timeout(60)


def expect(ended: Any, *words: str, hint: str | None = "") -> None:
    """Usage error of one rank that says `words`; `hint` None where there need not be one."""
    said = ended.stderr
    assert ended.codes == [2], said
    assert "Traceback" not in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) <= 4
    if hint is not None:
        assert "\nhint: " in said
        assert hint in said.split("\nhint: ")[1]
    for word in words:
        assert word in said, said


MISTAKES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "empty": (("train_data", "empty"), None),
    "iterable": (("train_data", "map-style", "Stream"), "iterable"),
    "eval": (("eval_data", "map-style", "Stream"), "iterable"),
    "number": (("loss", "tensor", "float"), ".item()"),
    "none": (("loss", "tensor", "NoneType"), "tensor"),
    "detached": (("no gradient",), ".detach()"),
    "no parameter": (("trainable parameter", "step 1", "gradient"), "model returns"),
    "shape": (("(4,)", "(4, 2)"), "Weighted"),
    "total": (("Weighted.total", "(4, 2)"), None),
    "negative weight": (("loss: Weighted.weight", "0 or more", "is -4"), "negate the total"),
    "negative tensor": (("loss in step 1: Weighted.weight", "is -1.0"), "negate the total"),
    "not callable": (("loss", "int"), "supervised"),
    "frozen": (("trainable parameter",), "requires_grad"),
    "foreign": (("optimizer", "2 of 2", "(2, 3)"), "model.parameters()"),
    "half foreign": (("optimizer", "1 of 3", "(7,)"), "model.parameters()"),
    "sum": (("reduction", "sum", "MSELoss"), "mean"),
    "dict": (("build", "Components", "dict"), "Components("),
    "nothing": (("build", "Components", "NoneType"), "Components("),
    "class": (("model", "torch.nn.Module", "type"), None),
    "pickle": (("optimizer", "extra", "Stubborn"), "pickle"),
    "plateau": (("eval_data", "ReduceLROnPlateau"), "another scheduler"),
    "plateau metric": (("plateau_metric", "(loss)", "precision"), None),
    "late weights": (("weights", "step 2"), "Weighted"),
    "lost weights": (("weights", "step 2"), "Weighted"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_build_is_named_with_its_fix(start: Any, mistake: str) -> None:
    words, hint = MISTAKES[mistake]
    ended = start("mistaken", "--run-dir", "run", "--mistake", mistake)
    expect(ended, *words, hint=hint)
    assert not list(ended.run_dir.glob("checkpoints/*")), "nothing was saved"


def test_a_tensor_of_infinite_weight_is_named_where_losses_are_read(start: Any) -> None:
    ended = start("mistaken", "--run-dir", "run", "--mistake", "infinite tensor", "--check", "never")
    expect(ended, "loss in step 1: Weighted.weight", "is inf", hint="samples or tokens")
    assert not list(ended.run_dir.glob("checkpoints/*")), "nothing was saved"


@pytest.mark.parametrize("flags", [(), ("--check", "never"), ("--num-workers", 1), ("--samples", 4)], ids=str)
def test_a_batch_of_nothing_whose_loss_is_nan_is_named_with_its_samples(start: Any, flags: tuple[Any, ...]) -> None:
    """The gradient of a mean over nothing is 0, so --nan-policy has nothing to see."""
    ended = start("left_out", "--run-dir", "run", *flags)
    samples = "samples 4, 5, and" if "--samples" in flags else "all of samples "  # of the evaluation, in order
    expect(ended, "collate_fn", samples, "the loss of nothing is not finite", hint="return Weighted(total, weight)")


def test_a_batch_of_nothing_is_fine_where_the_loss_weighs_it_with_nothing(trained: Any) -> None:
    losses = [event["loss"] for event in trained("left_out", "--weighed").events("step")]
    assert [loss is None for loss in losses] == [False, False, True]


@pytest.mark.parametrize("flags", [("--shards", 2), ("--shards", 1, "--micro-batches", 2)], ids=["shards", "parts"])
@pytest.mark.parametrize("mistake", ["late weights", "lost weights"])
def test_a_loss_that_brings_weights_for_a_part_of_the_first_step_is_named(
    start: Any, mistake: str, flags: tuple[Any, ...]
) -> None:
    expect(start("mistaken", "--run-dir", "run", "--mistake", mistake, *flags), "every shard", hint="Weighted")


@pytest.mark.parametrize("mistake", ["late weights", "lost weights"])
def test_all_ranks_stop_where_one_brings_weights_for_some_of_its_shards(start: Any, mistake: str) -> None:
    ended = start("mistaken", "--run-dir", "run", "--mistake", mistake, "--shards", 3, ranks=2)
    assert ended.codes == [2, 2], ended.stderrs
    assert ended.stderr.count("error: ") == 1


def test_batchnorm_with_a_shard_of_one_sample_is_refused_before_the_first_step(start: Any) -> None:
    """10 samples, batches of 4: the last one has 2, one for each of 2 shards."""
    ended = start("mistaken", "--run-dir", "run", "--mistake", "norm", "--shards", 2)
    expect(ended, "BatchNorm1d", "2 samples a shard", "last batch of 2", hint="--global-batch-size")
    assert not ended.events("step")


@pytest.mark.parametrize(
    ("mistake", "norm"), [("norm behind another", "BatchNorm1d"), ("norm of one pixel", "BatchNorm2d")]
)
def test_every_batchnorm_that_would_see_one_value_a_channel_is_refused(start: Any, mistake: str, norm: str) -> None:
    ended = start("mistaken", "--run-dir", "run", "--mistake", mistake, "--shards", 2)
    expect(ended, norm, "2 samples a shard", "last batch of 2", hint="--global-batch-size")
    assert not ended.events("step")


def test_each_batchnorm_is_looked_at_once_and_a_copy_of_the_model_runs() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.LayerNorm(12), nn.Unflatten(1, (3, 4)), nn.BatchNorm1d(3))
    check_shard_size(model, samples=5, global_batch_size=4, shards=2)
    copied, one = copy.deepcopy(model), torch.ones(1, 3, 2, 2)
    copied(one)
    assert [len(layer._forward_pre_hooks) for layer in model] == [1, 0, 0, 0, 1]
    model(one)
    assert not any(layer._forward_pre_hooks for layer in model)


def test_batchnorm_with_two_samples_a_shard_is_fine(trained: Any) -> None:
    trained("mistaken", "--mistake", "norm", "--shards", 1)


@pytest.mark.parametrize("mistake", ["empty", "shape", "norm", "no parameter", "negative weight", "negative tensor"])
def test_all_ranks_stop_and_rank_zero_alone_speaks(start: Any, mistake: str) -> None:
    ended = start("mistaken", "--run-dir", "run", "--mistake", mistake, "--shards", 2, ranks=2)
    assert ended.codes == [2, 2], ended.stderrs
    assert ended.stderr.count("error: ") == 1
    assert (ended.cwd / "rank-1.err").read_text() == ""


@pytest.mark.parametrize(
    ("flags", "words", "hint"),
    [
        (["--epoch", "3"], ["--epoch"], "--epochs"),
        (["--mistke", "x"], ["--mistke"], "--mistake"),
        (["--global-batch-size", "0"], ["--global-batch-size", "at least 1", "0"], None),
        (["--global_batch_size", "-4"], ["--global-batch-size", "at least 1", "-4"], None),
        (["--device", "gpu"], ["--device", "gpu"], None),
        (["--device", "cuda:99"], ["--device", "cuda:99"], None),
        (["--config", "nowhere.toml"], ["nowhere.toml"], None),
        (["--resume", "nowhere"], ["--resume nowhere", "valid checkpoint"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_the_flags_is_named(start: Any, flags: list[str], words: list[str], hint: str | None) -> None:
    ended = start("mistaken", *flags)
    expect(ended, *words, hint=hint)


def test_a_wrong_flag_creates_nothing(start: Any) -> None:
    ended = start("mistaken", "--epoch", 3)
    assert sorted(path.name for path in ended.cwd.iterdir()) == ["rank-0.err", "rank-0.out"]


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, ["RANK and WORLD_SIZE", "WORLD_SIZE is not set"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE and RANK", "RANK is not set"]),
        ({"LOCAL_RANK": "0"}, ["LOCAL_RANK and RANK", "RANK is not set"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["RANK and MASTER_ADDR"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, ["RANK and MASTER_PORT"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, ["RANK is 2", "WORLD_SIZE is 2"]),
        ({"RANK": "zero", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, ["RANK", "integer", "zero"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_half_set_environment_is_named(start: Any, environ: dict[str, str], words: list[str]) -> None:
    expect(start("mistaken", "--run-dir", "run", env=environ), *words)


def test_a_run_dir_that_can_not_be_is_named(start: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    expect(start("mistaken", "--run-dir", tmp_path / "file" / "run"), "--run-dir", "file/run", hint="--run-dir")


def test_other_shards_than_at_the_first_launch_are_refused(trained: Any, start: Any) -> None:
    trained("mistaken", "--shards", 2)
    expect(start("mistaken", "--run-dir", "run", "--shards", 3), "--shards", "2", "3", hint="--run-dir")


def test_data_that_each_rank_draws_for_itself_is_told_with_what_may_have_done_it(start: Any, tmp_path: Path) -> None:
    drawn = "torch.from_numpy(__import__('numpy').random.default_rng().normal(size=(10, 3)))"
    recipe = (Path(__file__).parent / "recipes" / "left_out.py").read_text()
    (tmp_path / "draws.py").write_text(recipe.replace("torch.randn(10, 3)", drawn))
    ended = start(tmp_path / "draws.py", "--run-dir", "run", ranks=2)
    assert ended.codes == [2, 2], ended.stderrs
    for words in ("dataset is expected to be equal on all ranks", "a generator of its own without a seed", "by host"):
        assert words in ended.stderrs


def test_resume_never_does_not_touch_an_old_run(trained: Any, start: Any) -> None:
    before = trained("mistaken").digest
    ended = start("mistaken", "--run-dir", "run", "--resume", "never")
    expect(ended, "never", hint="--run-dir")
    assert ended.digest == before


@pytest.mark.parametrize("value", ["x", "-1", "nan", "inf", "1e999"])
@pytest.mark.parametrize("name", ["SAMESTEP_GRACE_SECONDS", "SAMESTEP_JOIN_TIMEOUT", "SAMESTEP_GENERATION"])
def test_a_number_of_the_environment_that_is_none_is_named_before_anything_is_made(
    start: Any, name: str, value: str
) -> None:
    ended = start("mistaken", "--run-dir", "run", env={name: value})
    expect(ended, f"{name} is expected to be", value, hint=f"unset {name}")
    assert not ended.run_dir.exists()


def test_a_run_directory_that_is_a_symlink_to_nothing_is_named_as_one(start: Any, tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    ended = start("mistaken", "--run-dir", "../gone", cwd="job")
    expect(ended, "gone is a symlink to", "nowhere, which does not exist", hint="create ")


def test_no_valid_checkpoint_left_is_exit_78_on_every_rank(trained: Any, start: Any) -> None:
    ended = trained("mistaken", "--shards", 2)
    for folder in (ended.run_dir / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    ended = start("mistaken", "--run-dir", "run")
    assert ended.codes == [78], ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_ends_in_the_same_bits(trained: Any) -> None:
    flags = ("--checkpoint-every", 2, "--epochs", 2)
    before = trained("mistaken", *flags)
    newest, digest = before.checkpoint, before.digest
    raw = bytearray((newest / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (newest / "model.safetensors").write_bytes(raw)
    after = trained("mistaken", *flags)
    assert after.digest == digest
    assert [path.name for path in newest.parent.glob("*.corrupt")] == [f"{newest.name}.corrupt"]
    assert any(newest.name in event["text"] for event in after.events("warning"))


def test_a_users_exception_keeps_its_traceback_and_leaves_a_record(start: Any, tmp_path: Path) -> None:
    script = tmp_path / "raises.py"
    script.write_text("from samestep.train import train\n\n\ndef build(config):\n    return 1 / 0\n\n\ntrain(build)\n")
    ended = start(script, "--run-dir", "run")
    assert ended.codes == [1]
    assert "ZeroDivisionError" in ended.stderr
    record = (ended.run_dir / "errors" / "rank-0.json").read_text()
    assert f"{script}:5 in build" in record
    assert '"phase": "build"' in record


@pytest.mark.parametrize(
    ("name", "recorded"), [("asyncio.CancelledError", True), ("Own", True), ("KeyboardInterrupt", False)]
)
def test_what_is_raised_leaves_a_record_unless_it_is_a_way_to_leave(
    start: Any, tmp_path: Path, name: str, recorded: bool
) -> None:
    script = tmp_path / "raises.py"
    script.write_text(
        "import asyncio\n\nfrom samestep.train import train\n\n\nclass Own(BaseException):\n    pass\n\n\n"
        f"def build(config):\n    raise {name}('mine')\n\n\ntrain(build)\n"
    )
    ended = start(script, "--run-dir", "run")
    assert f"{name.rpartition('.')[2]}: mine" in ended.stderr
    assert (ended.run_dir / "errors" / "rank-0.json").exists() is recorded
    if recorded:
        record = json.loads((ended.run_dir / "errors" / "rank-0.json").read_text())
        assert (record["kind"], record["message"]) == (name.rpartition(".")[2], "mine")
        assert record["frame"] == f"{script}:11 in build"
