"""Hooks that backward would call are called on any number of shards and ranks, or refused."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("hook", "words"),
    [
        ("leaf", "that of a tensor of shape (4, 3) does not"),
        ("accumulated", "that of a tensor of shape (4, 3) does not"),
        ("module", "that of a module with register_full_backward_hook does not"),
    ],
)
def test_a_hook_whose_way_leads_to_no_parameter_is_refused_with_shards(
    start: Any, hook: str, words: str, ranks: int
) -> None:
    ended = start("listening", "--run-dir", "run", "--hook", hook, "--shards", 2, ranks=ranks)
    assert 2 in ended.codes, ended.stderrs
    assert 0 not in ended.codes
    assert "Traceback" not in ended.stderrs
    assert ended.stderrs.count("error: ") == 1
    assert words in ended.stderrs
    assert "\nhint: register it with a result of the first layer" in ended.stderrs
    assert not ended.events("step")


@pytest.mark.parametrize("hook", ["leaf", "module", "accumulated", "between"])
def test_with_one_shard_on_one_rank_it_is_called(trained: Any, hook: str) -> None:
    ended = trained("listening", "--hook", hook)
    assert ended.weights["slope"] != 1
    assert ended.events("warning") == []


def test_a_hook_of_what_is_computed_from_inputs_alone_is_named_with_shards(trained: Any) -> None:
    ended = trained("listening", "--hook", "between", "--shards", 2)
    (warning,) = ended.events("warning")
    assert warning["text"].startswith("backward does not come to hooks of tensors that depend on no parameter")
    assert ended.weights["slope"] == 1


@pytest.mark.parametrize("hook", ["behind", "penalty"])
def test_a_hook_that_is_called_raises_no_alarm(trained: Any, hook: str) -> None:
    ended = trained("listening", "--hook", hook, "--shards", 2)
    assert not [event for event in ended.events("warning") if event["text"].startswith("backward")]


def test_a_hook_behind_a_parameter_is_called_for_each_shard_on_any_number_of_ranks(trained: Any) -> None:
    flags = ("--hook", "behind", "--shards", 3)
    runs = [trained("listening", *flags, ranks=ranks, cwd=f"ranks-{ranks}") for ranks in (1, 2)]
    assert runs[0].weights["slope"] != 1
    assert runs[0].bits == runs[1].bits


def test_a_penalty_on_gradients_of_an_input_stays_allowed(trained: Any) -> None:
    flags = ("--hook", "penalty", "--shards", 3)
    runs = [trained("listening", *flags, ranks=ranks, cwd=f"ranks-{ranks}") for ranks in (1, 2)]
    assert runs[0].bits == runs[1].bits
