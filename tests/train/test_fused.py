"""The hint about fused optimizers: where it is true and new to the user, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from samestep.train.fused import fused_hint

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class OwnAdam(Adam):
    """Of a user."""


@pytest.mark.parametrize(
    ("kind", "options", "device", "hinted"),
    [
        (Adam, {}, CUDA, True),
        (AdamW, {}, CUDA, True),
        (SGD, {"lr": 0.1, "momentum": 0.9}, CUDA, True),
        (Adam, {}, CPU, False),
        (Adam, {"fused": True}, CUDA, False),
        (Adam, {"fused": False}, CUDA, False),
        (AdamW, {"foreach": True}, CUDA, False),
        (AdamW, {"foreach": False}, CUDA, False),
        (SGD, {"differentiable": True}, CUDA, False),
        (Adam, {"capturable": True}, CUDA, False),
        (OwnAdam, {}, CUDA, False),
        (RMSprop, {}, CUDA, False),
        (Adagrad, {}, CUDA, False),
    ],
)
def test_the_hint_is_for_those_who_could_and_did_not_choose(kind: Any, options: Any, device: Any, hinted: bool) -> None:
    hint = fused_hint(kind(nn.Linear(2, 1).parameters(), **options), device)
    assert bool(hint) == hinted
    assert not hint or (kind.__name__ in hint and "bits differ" in hint)


def test_one_group_with_a_choice_or_a_complex_parameter_is_enough_for_silence() -> None:
    real, more = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    assert fused_hint(Adam([{"params": [real]}, {"params": [more]}]), CUDA)
    chosen: list[dict[str, Any]] = [{"params": [real]}, {"params": [more], "foreach": False}]
    assert not fused_hint(Adam(chosen), CUDA)
    rotation = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    assert not fused_hint(Adam([more, rotation]), CUDA)
