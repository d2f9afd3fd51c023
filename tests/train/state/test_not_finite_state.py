"""What is not finite is not saved, exported or the best, unless it was so from the beginning: a mask of -inf."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from samestep.train.state.codec import not_finite
from samestep.train.state.train_state import TrainState

INF = float("inf")


def state_of(**components: Any) -> TrainState:
    some: Any = SimpleNamespace(scheduler=None, **components)
    return TrainState(some, components.get("optimizer", some), None, {})


def test_only_the_places_that_were_not_finite_before_may_be():
    mask = torch.zeros(2, 2)
    mask[0, 1] = -INF
    known = {"mask": ~torch.isfinite(mask)}
    assert not_finite({"mask": mask}) == "mask"
    assert not_finite({"mask": mask}, known) == ""
    assert not_finite({"mask": torch.zeros(2, 2)}, known) == ""
    for spoilt in (mask.fill_diagonal_(INF), torch.tensor([-INF])):
        assert not_finite({"mask": spoilt}, known) == "mask"


def test_parameters_are_always_looked_at():
    model = torch.nn.BatchNorm1d(2)
    for tensor in (model.weight.data, model.running_var):
        assert tensor is not None
        tensor[1] = INF
    state = state_of(model=model, optimizer=torch.optim.SGD(model.parameters()))
    state.note_not_finite()
    assert set(state.capture(0).never_finite) == {"running_var"}
    assert not_finite(state.capture(0).weights, state.never_finite) == "weight"


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_a_mask_of_minus_infinity_is_saved_and_resumed_on_another_number_of_ranks_with_the_same_bits(start):
    flags = ("--run-dir", "run", "--shards", "2", "--global-batch-size", "8", "--checkpoint-every", "1")
    whole = start("masked", *flags, cwd="whole")
    assert whole.codes == [0], whole.stderrs
    for ranks, steps in ((1, 3), (2, 5)):
        assert set(start("masked", *flags, "--max-steps", steps, ranks=ranks).codes) == {0}
    ended = start("masked", *flags)
    assert ended.bits == whole.bits
    assert load_file(ended.run_dir / "weights.safetensors")["mask"].isinf().sum() == 6


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("fault", "name"), [("spoil", "mask"), ("overflow", "linear.")])
def test_a_state_that_became_not_finite_is_neither_saved_nor_exported(start, fault, name):
    flags = ("--run-dir", "run", "--max-steps", "1", "--shards", "1", "--check", "never", "--global-batch-size", "64")
    ended = start("masked", *flags, env={"FAULT": fault})
    assert ended.codes == [1], ended.stderrs
    assert f"the state after step 1 is not saved: {name}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (ended.run_dir / "weights.safetensors").exists()


@pytest.mark.parametrize("rule", ["max:acc", "min:acc"])
def test_what_is_not_finite_is_never_the_best(rule):
    state = state_of(model=torch.nn.Linear(1, 1))
    seen = []
    for step, value in enumerate([math.nan, INF, -INF, 3.0, math.nan, 5.0, INF, 1.0]):
        state.step, state.metrics = step, {"acc": value}
        if state.note_best(rule):
            seen.append(value)
    assert seen == ([3.0, 5.0] if rule == "max:acc" else [3.0, 1.0])
    state.best_value, state.metrics = math.nan, {"acc": 0.0}  # a checkpoint of before says so
    assert state.note_best(rule)
