"""A loop of one's own has the promises of a recipe: the same bits on any number of ranks, after stops and deaths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
GAN = ROOT / "scripts" / "recipes" / "digits_gan.py"

SAID = {
    "no gradients": "loop.gradients is expected to be called for each model that trains",
    "not kept": "the model of loop.gradients is expected to be in keep, but Linear is not",
    "numbers in keep": "keep['count'] is expected to have state_dict and load_state_dict, but is a int",
    "ddp in keep": "keep['model'] is expected to be the model itself, but is a DistributedDataParallel",
    "optimizer alone": "keep['optimizer'] is expected to hold parameters of models in keep",
    "list": "keep is expected to be a dict from names to models, optimizers and what else has state, but is list",
    "late": "loop.gradients is expected before loop.steps",
    "second only": "each step is expected to have a pass over it with the first of loop.gradients, but step 1 has none",
    "silent": "each batch of over(step) is expected to be followed by one backward, but in step 1 one was not",
    "twice": "backward is expected once for each batch of over(step), but no batch waits for it",
    "leaves": "over(step) is expected to be gone through to its end, but was left early",
    "updates inside": "keep['optimizer'] is expected to step after a pass, but did so between its batches",
    "nothing left": "collate_fn is expected to make a batch of the samples that it gets, but left out all of samples",
    "default device": "torch's default device is expected to be cpu, as this rank computes on cpu, but the recipe",
    "breaks": "loop.steps is expected to be gone through to its end, but was left in step 3",
    "again": "loop.steps is expected to be gone through once, but was called again",
    "class": "OwnLoop is expected to get a class derived from TrainConfig, but got",
}


def weights(ended: Any, name: str = "model.") -> dict[str, torch.Tensor]:
    return {key.removeprefix(name): tensor for key, tensor in ended.weights.items() if key.startswith(name)}


@pytest.mark.parametrize("ranks", [2, 3])
def test_two_models_that_train_each_other_end_in_the_same_bits_on_any_number_of_ranks(trained: Any, ranks: int) -> None:
    flags = ("--epochs", 1, "--shards", 4, "--max-steps", 12)
    one, several = (trained(GAN, *flags, ranks=count, cwd=f"ranks-{count}") for count in (1, ranks))
    assert one.bits == several.bits
    assert [event["extra"].keys() for event in one.events("step")] == [{"generator"}] * 12


def test_it_ends_in_the_bits_of_a_hand_written_loop(start: Any, trained: Any) -> None:
    by_hand = start("own_loop", "--case", "by hand", cwd="by-hand")
    assert by_hand.codes == [0], by_hand.stderr
    assert by_hand.stdout.split() == trained("own_loop", "--case", "two").stdout.splitlines()[-1].split()


def test_the_loop_of_the_page_runs_and_has_the_same_bits_on_two_ranks(trained: Any, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "own_loop.md").read_text()
    script = tmp_path / "page.py"
    script.write_text(page.partition("```python\n")[2].partition("```")[0])
    one, two = (trained(script, "--shards", 2, "--max-steps", 9, ranks=n, cwd=str(n)) for n in (1, 2))
    assert one.bits == two.bits
    assert one.digest in one.stdout.splitlines()[-1]


@pytest.mark.parametrize(("case", "of_train"), [("plain", "train"), ("tokens", "tokens of train")])
@pytest.mark.parametrize("ranks", [1, 3])
def test_with_one_model_it_ends_in_the_bits_of_a_recipe(trained: Any, case: str, of_train: str, ranks: int) -> None:
    own = trained("own_loop", "--case", case, "--shards", 3, ranks=ranks, cwd="own")
    recipe = trained("own_loop", "--case", of_train, "--shards", 3, cwd="recipe")
    assert weights(own).keys() == recipe.weights.keys()
    assert all(torch.equal(tensor, recipe.weights[name]) for name, tensor in weights(own).items())
    assert own.bits["losses"] == recipe.bits["losses"]
    assert own.bits["epochs"] == recipe.bits["epochs"]


def test_it_goes_on_with_other_ranks_in_the_same_bits(trained: Any) -> None:
    flags = ("--epochs", 1, "--shards", 4)
    whole = trained(GAN, *flags, "--max-steps", 12, cwd="whole")
    starts = ((4, 5), (2, 12))
    runs = [trained(GAN, *flags, "--max-steps", steps, ranks=ranks, cwd="stopped") for ranks, steps in starts]
    assert runs[-1].bits == whole.bits
    assert len(runs[-1].events("resumed")) == 1


def test_a_rank_that_asks_to_stop_ends_all_after_a_saved_step(start: Any, trained: Any) -> None:
    flags = ("--run-dir", "run", "--shards", 3)
    stopped = start("own_loop", "--case", "stopped", *flags, ranks=3)
    assert stopped.codes == [75] * 3
    saved = json.loads((stopped.checkpoint / "state.json").read_text())["counters"]["step"]
    again = trained("own_loop", "--shards", 3, ranks=2)
    assert [event["step"] for event in again.events("resumed")] == [saved]
    assert again.bits == trained("own_loop", "--shards", 3, cwd="whole").bits


def test_schedulers_in_keep_are_brought_back(trained: Any) -> None:
    _, resumed = (trained("own_loop", "--case", "scheduler", "--max-steps", steps) for steps in (3, 8))
    assert resumed.bits == trained("own_loop", "--case", "scheduler", cwd="whole").bits
    assert resumed.events("warning") == []
    assert "Warning" not in resumed.stderr


def test_what_is_drawn_outside_of_passes_is_the_same_on_all_ranks(trained: Any) -> None:
    one, three = (trained("own_loop", "--case", "between", "--shards", 3, ranks=n, cwd=str(n)) for n in (1, 3))
    assert one.bits == three.bits


def test_each_pass_over_a_step_has_its_batches_and_random_numbers_of_its_own(trained: Any) -> None:
    trained("own_loop", "--case", "passes", "--shards", 2)  # which asserts both


def test_updates_import_no_compiler(trained: Any) -> None:
    assert "compiler False" in trained("own_loop").stdout
    assert "compiler False" in trained("own_loop", "--case", "scheduler", cwd="scheduled").stdout


def test_a_batch_without_weight_leaves_no_gradients(trained: Any) -> None:
    ended = trained("own_loop", "--case", "weightless", "--shards", 2, ranks=2)
    assert [event["text"] for event in ended.events("warning")] == [
        "step 2 has no weight in its whole batch: gradients are None"
    ]


@pytest.mark.parametrize("case", ["plain backward before", "plain backward after", "of both at once"])
def test_other_backwards_neither_count_nor_change_gradients(trained: Any, case: str) -> None:
    one, two, four = (trained("own_loop", "--case", case, "--shards", 4, ranks=n, cwd=str(n)) for n in (1, 2, 4))
    assert one.bits == two.bits == four.bits
    if case != "of both at once":
        assert one.bits == trained("own_loop", "--shards", 4, cwd="without").bits


def test_a_step_of_an_optimizer_that_finds_no_gradients_is_named_once(trained: Any) -> None:
    texts = [event["text"] for event in trained("own_loop", "--case", "cleared").events("warning")]
    assert len([text for text in texts if "keep['optimizer'] steps without gradients" in text]) == 1


def test_state_of_one_ranks_batches_in_keep_is_named(start: Any) -> None:
    ended = start("own_loop", "--run-dir", "run", "--case", "baseline", "--shards", 2, ranks=2)
    assert all(ended.codes)
    assert "keep['baseline'] is expected to be the same on all ranks, but after step 3 that of rank 1" in ended.stderrs


@pytest.mark.parametrize(
    ("now", "said"), [("sgd", "SGD needs dampening"), ("renamed", "renamed here and optimizer there")]
)
def test_other_parts_than_those_of_the_checkpoint_are_named(start: Any, trained: Any, now: str, said: str) -> None:
    trained("own_loop", "--max-steps", 2)
    ended = start("own_loop", "--run-dir", "run", "--case", now)
    assert ended.codes == [2], ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_order_of_keep_says_nothing(trained: Any) -> None:
    _, resumed = (trained("own_loop", "--case", *more) for more in (("beside another", "--max-steps", 2), ("turned",)))
    assert resumed.bits == trained("own_loop", "--case", "beside another", cwd="whole").bits


def test_buffers_that_no_state_dict_has_are_brought_back(trained: Any) -> None:
    _, resumed = (trained("own_loop", "--case", "hidden", "--max-steps", steps) for steps in (4, 8))
    assert resumed.bits == trained("own_loop", "--case", "hidden", cwd="whole").bits


def test_a_model_in_eval_mode_is_named_once(trained: Any) -> None:
    texts = [event["text"] for event in trained("own_loop", "--case", "eval").events("warning")]
    assert len([text for text in texts if "trains in eval mode from step 1 on" in text]) == 1


def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(start: Any) -> None:
    ended = start("own_loop", "--run-dir", "run", "--case", "nan", "--shards", 2, ranks=2)
    assert ended.codes == [1, 1]
    assert "the loss of step 3 on rank 0, 1 is not finite" in ended.stderrs
    assert "Traceback" not in ended.stderrs


def test_an_exception_in_the_loop_is_recorded_with_its_step_and_phase(start: Any) -> None:
    ended = start("own_loop", "--run-dir", "run", "--case", "raises", ranks=2)
    assert all(ended.codes)
    record = json.loads((ended.run_dir / "errors" / "rank-1.json").read_text())
    assert (record["kind"], record["message"], record["step"]) == ("ValueError", "no such thing", 2)
    assert record["phase"] == "forward"
    assert "own_loop.py" in record["frame"]


def test_who_leaves_with_success_before_the_end_is_told(start: Any) -> None:
    ended = start("own_loop", "--run-dir", "run", "--case", "exits")
    assert ended.codes == [0]
    assert "warning: left with 0 before the run was done, after step 2" in ended.stderr


def test_a_run_that_has_ended_says_so_and_trains_nothing(trained: Any) -> None:
    first = trained("own_loop")
    again = trained("own_loop")
    assert f"Already finished: 8 steps, digest {first.digest}" in again.stdout
    assert f"result 8 {first.digest}" in again.stdout
    assert len(again.events("step")) == 8


@pytest.mark.parametrize("case", SAID)
def test_a_mistake_is_told_in_one_sentence(start: Any, case: str) -> None:
    ended = start("own_loop", "--run-dir", "run", "--case", case)
    assert ended.codes == [2], ended.stderr
    assert SAID[case] in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "\nhint: " in ended.stderr


@pytest.mark.parametrize("flag", [("--precision", "bf16"), ("--clip-grad-norm", 1), ("--replay", 2), ("--compile",)])
def test_options_that_concern_a_step_are_refused(start: Any, flag: tuple[Any, ...]) -> None:
    ended = start("own_loop", "--run-dir", "run", *flag)
    assert ended.codes == [2]
    assert f"{flag[0]} is expected to be left out with a loop of one's own" in ended.stderr
