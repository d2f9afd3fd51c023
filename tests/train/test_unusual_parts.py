"""Parts that torch takes and a run can't use: a sentence with a hint, exit 2, no traceback."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(60)


def refused(ended: Any, *words: str, hint: str) -> None:
    """Every rank left with 2, and rank zero alone spoke."""
    assert set(ended.codes) == {2}, ended.stderrs
    assert "Traceback" not in ended.stderrs
    assert ended.stderrs.count("error: ") == 1
    said, _, fix = ended.stderr.partition("\nhint: ")
    assert all(word in said for word in words), said
    assert hint in fix


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "interval": (("scheduler_interval", "'step' or 'epoch'", "'batch'"), '"step"'),
    "closure": (("LBFGS.step needs closure",), "Adam"),
    "lazy": (("weight and 1 more have none yet",), "one batch through the model in build"),
    "weight norm": (("ema", "1.0 (Linear) is not"), "parametrizations.weight_norm"),
}


@pytest.mark.parametrize("part", REFUSED)
def test_a_part_that_a_run_can_not_use_is_named_before_the_first_step(start: Any, part: str) -> None:
    words, hint = REFUSED[part]
    ended = start("unusual", "--run-dir", "run", "--part", part)
    refused(ended, *words, hint=hint)
    assert not list(ended.run_dir.glob("events.jsonl")), "nothing was started"


OF_A_LOSS: dict[str, tuple[tuple[str, ...], str]] = {
    "vector": (("Weighted.log['seen']", "scalar", "(4,)"), "mean"),
    "word": (("Weighted.log['seen']", "scalar", "is str"), "mean"),
    "complex": (("loss is expected to be real", "torch.complex64"), ".abs()"),
    "complex sum": (("loss: Weighted.total is expected to be real", "torch.complex64"), ".abs()"),
    "penalty": (("loss", "evaluations, which compute no gradients", "does not require grad"), "is_grad_enabled()"),
}


@pytest.mark.parametrize("part", OF_A_LOSS)
def test_what_a_loss_returns_or_asks_for_in_vain_is_named(start: Any, part: str) -> None:
    words, hint = OF_A_LOSS[part]
    refused(start("unusual", "--run-dir", "run", "--part", part), *words, hint=hint)


def test_a_run_tells_that_nothing_asks_for_its_metrics(start: Any) -> None:
    ended = start("unusual", "--run-dir", "run", "--part", "unasked")
    assert set(ended.codes) == {0}, ended.stderrs
    assert ended.stderr.count("warning: metrics are not computed, as there is no eval_data: error") == 1


def test_a_number_of_numpy_can_be_logged(trained: Any) -> None:
    trained("unusual", "--part", "number")


@pytest.mark.compiler
def test_an_optimizer_without_hooks_is_checked_as_far_as_it_goes_and_has_the_bits_of_the_one_inside(
    trained: Any,
) -> None:
    runs = [trained("unusual", "--part", part, "--check", "always", cwd=f"{part}-") for part in ("", "around")]
    assert runs[0].bits == runs[1].bits


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hook_that_backward_would_not_call_is_refused_with_shards(start: Any, ranks: int) -> None:
    ended = start("unusual", "--run-dir", "run", "--part", "hook", "--shards", 2, ranks=ranks)
    refused(ended, "register_post_accumulate_grad_hook with 2 shards", "weight has one", hint="--clip-grad-norm")


def test_a_hook_that_backward_calls_is_called_with_one_shard(trained: Any) -> None:
    early, late = (trained("unusual", "--part", "hook", "--max-steps", n, cwd=f"{n}").weights for n in (1, 3))
    assert early["weight"].equal(late["weight"]), "its gradient is set to zero"
    assert not early["bias"].equal(late["bias"])


@pytest.mark.compiler
@pytest.mark.parametrize("ranks", [1, 2])
def test_state_that_can_not_be_saved_is_refused_at_the_first_update_not_at_the_first_save(
    start: Any, ranks: int
) -> None:
    ended = start("unusual", "--run-dir", "run", "--part", "deque", ranks=ranks)
    refused(ended, "state.optimizer.state.0.last", "collections.deque", hint="pickle")
    record = json.loads((ended.run_dir / "errors" / "rank-0.json").read_text())
    assert (record["step"], record["phase"]) == (0, "optimizer")
