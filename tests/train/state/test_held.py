"""A model that changes what it holds is named before a checkpoint is written that nothing could go on from."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.timeout(90)
CHANGES = {
    "buffer": ("mean is new", "persistent=False"),
    "parameter": ("head.bias is another one", "copy into it"),
    "gone": ("head.bias is gone", "build"),
    "layer, later": ("late.weight is new", "build"),
    "adapters": ('load its own state_dict, but does not: Missing key(s) in state_dict: "body.weight"', "fits it"),
    "tolerant": ("these stay as they are: body.weight, body.bias", "return them from state_dict"),
    "forgetful": ("these stay as they are: head.weight, head.bias", "take them in load_state_dict"),
    "forgetful part": ("these stay as they are: head.weight, head.bias", "_load_from_state_dict of a part"),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("way", CHANGES)
def test_what_a_forward_makes_of_the_model_is_refused_on_any_number_of_ranks(start: Any, way: str, ranks: int) -> None:
    text, fix = CHANGES[way]
    flags = ("--way", way, "--shards", 2, "--check", "never")
    ended = start("changing", "--run-dir", "run", *flags, ranks=ranks)
    assert ended.codes == [2] * ranks, ended.stderrs
    said, _, hint = ended.stderr.partition("\nhint: ")
    assert text in said
    assert fix in hint
    assert ended.stderrs.count("error: ") == 1
    assert "Traceback" not in ended.stderrs
    assert not [*(ended.run_dir / "checkpoints").glob("step-*")]


@pytest.mark.parametrize("way", ["cache", "renamed", "frozen"])
def test_a_cache_that_is_not_saved_a_pair_that_fits_and_frozen_weights_left_out_are_fine(
    trained: Any, way: str
) -> None:
    whole = trained("changing", "--way", way, "--shards", 2, ranks=2, cwd="whole")
    trained("changing", "--way", way, "--shards", 2, "--max-steps", 3, cwd="resumed")
    assert trained("changing", "--way", way, "--shards", 2, cwd="resumed").bits == whole.bits


def test_a_part_that_leaves_out_what_has_changed_is_refused_by_a_run_that_goes_on(start: Any, trained: Any) -> None:
    flags = ("--way", "uncounted part", "--shards", 2)
    trained("changing", *flags, "--max-steps", 3, ranks=2)
    ended = start("changing", "--run-dir", "run", *flags)
    assert ended.codes == [2]
    assert "OfParts.load_state_dict does not bring back what was saved: head.seen" in ended.stderr
