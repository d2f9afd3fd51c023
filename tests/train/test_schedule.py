"""A scheduler that is over before the run is named with both numbers, before the first step where it can be."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.timeout(60)

TOO_LONG = {
    "steps": (("--epochs", 3), "OneCycleLR is expected to last for all 6 steps of this run, but was made for 5"),
    "epochs": (("--epochs", 6, "--interval", "epoch"), "for all 6 epochs of this run, but was made for 5"),
    "chained": (("--epochs", 3, "--kind", "chained"), "OneCycleLR is expected to last for all 6 steps"),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", TOO_LONG)
def test_it_is_named_before_the_first_step(start: Any, case: str, ranks: int) -> None:
    flags, words = TOO_LONG[case]
    ended = start("scheduled", "--run-dir", "run", *flags, ranks=ranks)
    assert ended.codes == [2] * ranks, ended.stderrs
    assert words in ended.stderr
    assert "--epochs, --max-steps" in ended.stderr
    assert not ended.events("step")


def test_one_that_is_hidden_in_another_is_named_where_it_ends(start: Any) -> None:
    ended = start("scheduled", "--run-dir", "run", "--kind", "behind another", "--epochs", 4, ranks=2)
    assert ended.codes == [2, 2], ended.stderrs
    assert "SequentialLR is expected to last for the whole run" in ended.stderr
    assert "tried to step 6 times, and the specified number of total steps is 5" in ended.stderr.lower()
    assert ended.stderrs.count("error: ") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--epochs", 2),
        ("--epochs", 3, "--max-steps", 5),
        ("--epochs", 5, "--interval", "epoch"),
        ("--epochs", 3, "--kind", "behind another"),
    ],
    ids=str,
)
def test_one_that_lasts_to_the_end_is_fine(trained: Any, flags: tuple[Any, ...]) -> None:
    trained("scheduled", *flags)


def test_a_resumed_run_of_more_steps_is_told_whose_schedule_it_has(trained: Any, start: Any) -> None:
    before = trained("scheduled", "--epochs", 2).digest
    ended = start("scheduled", "--run-dir", "run", "--epochs", 3)
    assert ended.codes == [2]
    assert "hint: a resumed run keeps the schedule that it began with" in ended.stderr
    assert ended.digest == before
