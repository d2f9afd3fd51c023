"""Each leak is named on the recipe that has it, and on no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).resolve().parent.parent.parent / "scripts" / "recipes"

FATAL = {
    "backward": (["first.weight", "the loss is expected to leave gradients alone"], "backward()"),
    "own backward": (["first.weight", "the loss is expected to leave gradients alone"], "backward()"),
    "own loop": (["the loss is expected to leave the optimizer alone", "called its step()"], "drop backward(), step()"),
    "assigned": (["first.weight", "the loss is expected to leave gradients alone"], "p.grad"),
    "uncleared": (["first.weight", "cleared before each step"], "collate_fn"),
    "toggle": (["leave modules in the mode", "norm"], "model.eval()"),
    "twice": (["scheduler", "once an optimizer step", "2 times"], "scheduler.step()"),
    "elsewhere": (["mask", "is on meta", "computes on cpu"], "__init__"),
    "evaluation trains": (["the metric error changed norm."], "model.train()"),
    "evaluation changes": (["the metric error changed first.weight"], "changes of weights"),
    "draws": (["a batch of the same samples", "collate_fn gave another one"], "a generator of its own too"),
    "stream": (["train_data", "the same each time", "Stream"], "__getitem__(index)"),
}
WARNED = {
    "evaluated": ["eval mode, with gradients"],
    "frozen mode": ["norm of the model stays in eval mode"],
    "graph": ["history of Net", "after each step", ".detach()"],
    "constant": ["every gradient was exactly zero"],
    "clamp": ["the loss changes weights", "first.weight"],
    "between": ["first.weight of the model changed between two steps"],
    "between, a buffer": ["seen of the model changed between two steps"],
    "noisy": ["random numbers of torch", "generator of its own"],
    "zero rate": ["learning rate was 0 in 3 steps in a row"],
    "unused": ["other.weight, other.bias", "no gradient in any step so far"],
    "unheld": ["first.weight", "the optimizer does not hold"],
    "late": ["other.weight, other.bias", "since step 6"],
    "attribute": ["last.scale", "plain tensor", "register_buffer"],
    "plain numbers": ["plain attributes of the model: Net.count, detour.calls (", "register_buffer"],
    "plain flag": ["plain attributes of the model: Net.started (", "register_buffer"],
    "half": ["a batch of 4 samples was planned, but collating made one of 2"],
    "counts": ["collate_fn changes what it keeps: batches"],
    "double": ["a batch of 4 samples was planned, but collating made one of 8"],
}
OF_RANKS = {
    "rank": ["rank 1 ran detour", "rank 0 did not"],
    "collective": ["calls collectives of torch.distributed itself", "1 in a shard"],
}


def warnings(ended: Any) -> list[str]:
    return [event["text"] for event in ended.events("warning")]


@pytest.mark.parametrize("leak", FATAL)
def test_what_can_not_be_meant_ends_the_run_with_its_name(start: Any, leak: str) -> None:
    words, hint = FATAL[leak]
    ended = start("leaking", "--run-dir", "run", "--leak", leak)
    assert ended.codes == [2], ended.stderr
    said, _, fix = ended.stderr.partition("\nhint: ")
    assert "Traceback" not in ended.stderr
    assert all(word in said for word in words), said
    assert hint in fix


@pytest.mark.parametrize("leak", ["own backward", "own loop"])
def test_a_loop_of_its_own_in_a_loss_is_named_before_torch_says_something_else(start: Any, leak: str) -> None:
    """Of a graph that is used twice, or of weights that were changed in place."""
    ended = start("leaking", "--run-dir", "run", "--leak", leak, "--shards", 2, ranks=2)
    assert ended.codes == [2, 2], ended.stderrs
    assert ended.stderrs.count("error: ") == 1
    assert "Traceback" not in ended.stderrs


@pytest.mark.parametrize("leak", ["unheld", "lazy"])
def test_gradients_that_no_optimizer_clears_do_not_add_up(trained: Any, leak: str) -> None:
    """Under DDP they would, and reach the weights through the norm that is clipped, on two ranks alone."""
    flags = ("--leak", leak, "--shards", 2, "--epochs", 1, "--clip-grad-norm", 0.1)
    one, two = (trained("leaking", *flags, ranks=ranks, cwd=f"ranks-{ranks}") for ranks in (1, 2))
    assert one.bits == two.bits


@pytest.mark.parametrize("leak", WARNED)
def test_what_may_be_meant_is_told_once_and_training_goes_on(trained: Any, leak: str) -> None:
    ended = trained("leaking", "--leak", leak, "--epochs", 5 if leak == "late" else 1)
    (text,) = [text for text in warnings(ended) if all(word in text for word in WARNED[leak])]
    assert ended.stderr.count(f"warning: {text}\n") == 1


@pytest.mark.parametrize("leak", ["unused", "graph", "between", "plain numbers"])
def test_a_warning_is_the_same_on_two_ranks_and_told_once(trained: Any, leak: str) -> None:
    ended = trained("leaking", "--leak", leak, ranks=2)
    (text,) = warnings(ended)
    assert all(word in text for word in WARNED[leak]), text
    assert ended.stderrs.count("warning: ") == 1


@pytest.mark.parametrize("leak", OF_RANKS)
def test_ranks_that_go_their_own_way_are_named(trained: Any, leak: str) -> None:
    ended = trained("leaking", "--leak", leak, ranks=2)
    (text,) = warnings(ended)
    assert all(word in text for word in OF_RANKS[leak]), text


def test_a_leak_on_one_rank_ends_all_ranks_with_the_same_sentence(start: Any) -> None:
    ended = start("leaking", "--run-dir", "run", "--leak", "toggle on rank 1", ranks=2)
    assert ended.codes == [2, 2], ended.stderrs
    assert ended.stderr.count("leave modules in the mode") == 1
    assert (ended.cwd / "rank-1.err").read_text() == ""


@pytest.mark.parametrize(("ranks", "shards"), [(1, 2), (2, 4)])
def test_a_loss_that_changes_weights_is_no_warning_where_ranks_would_change_them_differently(
    start: Any, ranks: int, shards: int
) -> None:
    flags = ("--leak", "clamp", "--shards", shards, "--global-batch-size", 12)
    ended = start("leaking", "--run-dir", "run", *flags, ranks=ranks)
    assert ended.codes == [2] * ranks, ended.stderrs
    said, _, fix = ended.stderr.partition("\nhint: ")
    assert "the loss changes weights of the model itself: first.weight" in said
    assert "register_buffer" in fix
    assert not list(ended.run_dir.glob("checkpoints/*")), "nothing was saved"


def test_a_bound_that_each_loss_sees_to_is_a_warning_and_the_bits_are_those_of_one_rank(trained: Any) -> None:
    one, two = (trained("leaking", "--leak", "bound", "--shards", 2, ranks=n, cwd=f"{n}") for n in (1, 2))
    assert one.bits == two.bits
    assert any("the loss changes weights of the model itself: first.weight" in text for text in warnings(one))


def test_weights_that_a_loss_changes_later_are_named_as_one_reason_why_ranks_differ(start: Any) -> None:
    flags = ("--leak", "late clamp", "--shards", 3, "--global-batch-size", 6, "--epochs", 4)
    ended = start("leaking", "--run-dir", "run", *flags, ranks=2)
    assert ended.codes == [1, 1], ended.stderrs
    said, _, fix = ended.stderr.partition("\nhint: ")
    assert "rank 1 differs in its weights (first first.weight)" in said
    assert "a forward that changes weights itself" in fix


@pytest.mark.parametrize(("ranks", "check"), [(1, "first"), (2, "first"), (2, "always")])
def test_a_recipe_without_leaks_raises_no_alarm(trained: Any, ranks: int, check: str) -> None:
    flags = ("--shards", 2, "--epochs", 2, "--check", check, "--eval-every", 2)
    assert warnings(trained("leaking", *flags, ranks=ranks)) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_queue_that_becomes_a_mean_over_shards_is_named_and_no_other_buffer(trained: Any, ranks: int) -> None:
    (text,) = warnings(trained("queued", "--shards", 2, ranks=ranks))
    assert "the mean over its shards and micro-batches: queue (fine for running statistics" in text


def test_micro_batches_make_a_mean_of_a_queue_too_and_a_single_shard_does_not(trained: Any) -> None:
    (text,) = warnings(trained("queued", "--micro-batches", 2, cwd="parts"))
    assert "micro-batches: queue (" in text
    assert warnings(trained("queued", cwd="whole")) == []


@pytest.mark.parametrize("name", ["small", "oracle"])
def test_recipes_of_other_tests_raise_no_alarm(trained: Any, name: str) -> None:
    assert warnings(trained(name, "--max-steps", 5, "--check", "always")) == []


def test_a_recipe_with_unused_layers_raises_that_alarm_alone(trained: Any) -> None:
    (text,) = warnings(trained("everything", "--max-steps", 5, "--check", "always"))
    assert "never.weight" in text
    assert "no gradient in any step so far" in text


def test_torchs_own_modules_raise_no_alarm(trained: Any) -> None:
    assert warnings(trained("modules", "--shards", 2, "--max-steps", 6, "--check", "always")) == []


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_recipes_of_ours_raise_no_alarm(trained: Any, recipe: Path) -> None:
    assert warnings(trained(recipe, "--max-steps", 4, "--shards", 2, "--check", "always")) == []


def same_bits_however_much_is_looked_at(trained: Any, recipe: Path | str, *flags: object, **more: Any) -> None:
    runs = [
        trained(recipe, "--shards", 2, *flags, "--check", check, cwd=f"{check}-{ranks}", ranks=ranks, **more)
        for ranks in (1, 2)
        for check in ("never", "first", "always")
    ]
    for run in runs[1:]:
        assert run.bits == runs[0].bits


def test_looking_changes_no_bit(trained: Any) -> None:
    same_bits_however_much_is_looked_at(trained, "everything", "--max-steps", 6)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_looking_changes_no_bit_of_our_recipes(trained: Any, recipe: Path) -> None:
    same_bits_however_much_is_looked_at(trained, recipe, "--max-steps", 6)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_looking_changes_no_bit_of_compiled_models(trained: Any, recipe: Path) -> None:
    same_bits_however_much_is_looked_at(trained, recipe, "--compile", "--max-steps", 6, seconds=300)


def test_check_never_looks_at_nothing(trained: Any) -> None:
    assert warnings(trained("leaking", "--leak", "toggle", "--check", "never")) == []
