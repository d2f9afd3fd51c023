"""What an optimizer makes in its first update can be saved, or the run ends there, and not at its first checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from samestep.launcher.contract import UsageError
from samestep.train.state.codec import encode

Follow = Callable[[nn.Module], None]


def with_savable_state(optimizer: Optimizer, follow: Follow) -> Follow:
    """As `follow`, which is told of each update; the first time it looks at the optimizer's state.

    Raises:
        UsageError: from that call, on every rank: some of it could only be saved with pickle; and from any, where
            groups of parameters were added, which those that `build` makes anew could not be given back.
    """
    looked = False
    groups = _groups(optimizer)

    def look_and_follow(model: nn.Module) -> None:
        nonlocal looked
        if not looked:
            encode({"optimizer": optimizer.state_dict()}, "state")
            looked = True
        if _groups(optimizer) != groups:
            raise UsageError(
                f"the optimizer is expected to keep the {groups} parameter groups of build, but has "
                f"{_groups(optimizer)} now: no checkpoint of it could be loaded",
                "make all groups in build, and freeze with requires_grad_(False) what is to train later",
            )
        follow(model)

    return look_and_follow


def _groups(optimizer: Optimizer) -> int:
    return len(getattr(optimizer, "param_groups", ()))
