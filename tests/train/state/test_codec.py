"""State trees survive JSON and back, bit for bit; what could only be pickled is refused by name."""

from __future__ import annotations

import collections
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from samestep.launcher.contract import UsageError
from samestep.train.state.codec import decode, encode, not_finite, unshared

floats = st.floats(allow_nan=True, allow_infinity=True)
tensors = st.builds(
    lambda values, kind: torch.tensor(values).to(kind),
    st.lists(st.integers(-5, 5), max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]),
)
leaves = st.none() | st.booleans() | st.integers() | floats | st.text() | tensors
keys = (
    st.integers() | st.text() | st.sampled_from(["$tuple", "$tensor", "a.b", "a", "", "1"]) | st.tuples(st.integers())
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.sets(st.integers(), max_size=3)
    ),
    max_leaves=15,
)


def round_trip(tree: Any) -> Any:
    value, kept = encode(tree, "state")
    return decode(json.loads(json.dumps(value)), kept)


def same(left: Any, right: Any) -> bool:
    """Equal types, structure and bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, float):
        return left.hex() == right.hex() or (math.isnan(left) and math.isnan(right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@given(trees)
def test_every_tree_comes_back_the_same(tree: Any) -> None:
    assert same(round_trip(tree), tree)


def test_tensors_never_share_a_name() -> None:
    a, b, c, d = (torch.tensor(float(number)) for number in range(4))
    tree = {"x": {"y": a}, "x.y": b, "z": {1: c, "1": d}}
    assert same(round_trip(tree), tree)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, 1.7976931348623157e308, 0.1]
)
def test_floats_keep_their_bits(value: float) -> None:
    assert same(round_trip({"v": value}), {"v": value})


def test_numpy_scalars_become_numbers() -> None:
    assert same(round_trip([np.float32(0.1), np.int64(3), np.bool_(True)]), [float(np.float32(0.1)), 3, True])


def test_containers_of_torch_and_the_standard_library_become_plain_ones() -> None:
    tree = collections.OrderedDict(a=collections.defaultdict(dict, {1: {"step": torch.tensor(2.0)}}))
    assert same(round_trip(tree), {"a": {1: {"step": torch.tensor(2.0)}}})


@pytest.mark.parametrize("counted", ["aab", "", [3, 6, 6]])
def test_a_counter_stays_one(counted: Any) -> None:
    tree = {"milestones": collections.Counter(counted), "other": collections.Counter(counted)}
    assert same(round_trip(tree), tree)


@pytest.mark.parametrize("old", [{"$map": [[3, 1], [6, 2]]}, {}])
def test_milestones_that_were_saved_without_their_kind_are_a_counter_again(old: Any) -> None:
    (scheduler,) = decode({"_schedulers": [{"milestones": old}]}, {})["_schedulers"]
    assert type(scheduler["milestones"]) is collections.Counter
    assert list(scheduler["milestones"].elements()) == ([3, 6, 6] if old else [])


class Custom:
    pass


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (Custom(), "Custom"),
        (len, "builtin_function"),
        (lambda: 1.0, "function"),
        (b"bytes", "bytes"),
        (1j, "complex"),
        (np.complex64(1j), "complex"),
        (np.zeros(2), "ndarray"),
        (torch.float32, "dtype"),
        (Path("x"), "Path"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_what_needs_pickle_is_refused_where_it_is(value: Any, word: str) -> None:
    with pytest.raises(UsageError, match=rf"optimizer\.groups\.0\.extra.*{word}"):
        encode({"groups": [{"extra": value}]}, "optimizer")


def test_a_dtype_that_can_not_be_stored_is_refused_where_it_is() -> None:
    encode({"w": torch.zeros(1, dtype=torch.complex64)}, "model")
    with pytest.raises(UsageError, match=r"model\.w is expected to have a dtype that safetensors stores, but is torch"):
        encode({"w": torch.zeros(1, dtype=torch.complex128)}, "model")


def test_an_unknown_kind_is_an_error_and_never_guessed() -> None:
    with pytest.raises(ValueError, match=r"\$object"):
        decode({"$object": "os.system"}, {})


@pytest.mark.parametrize(
    "optimizer_type", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adafactor, torch.optim.LBFGS]
)
def test_states_of_torchs_optimizers_and_schedulers_come_back(optimizer_type: Any) -> None:
    model = nn.Linear(3, 2)
    optimizer = optimizer_type(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, 10, cycle_momentum=False)
    for owner in (optimizer, scheduler):
        assert same(round_trip(owner.state_dict()), json_shape(owner.state_dict()))


def json_shape(tree: Any) -> Any:
    """The same with plain dicts, which is what comes back."""
    if isinstance(tree, dict):
        return {key: json_shape(value) for key, value in tree.items()}
    return [json_shape(item) for item in tree] if type(tree) is list else tree


def test_a_tied_tensor_is_kept_once_under_its_first_name() -> None:
    weight, other, empty = torch.randn(3, 2), torch.randn(3, 2), torch.empty(0)
    kept, aliases = unshared({"a": weight, "b": other, "c": weight, "d": weight.t(), "e": empty, "f": empty})
    assert list(kept) == ["a", "b", "d", "e", "f"]
    assert aliases == {"c": "a"}


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, float("inf")])
    assert not_finite({"a": good, "n": torch.tensor([1])}) == ""
    assert not_finite({"a": good, "b": bad, "c": bad}) == "b"
    assert not_finite({"a": torch.tensor(float("nan"), dtype=torch.bfloat16)}) == "a"
