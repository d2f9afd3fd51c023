"""What an optimizer makes in its first update can be saved, or the run ends there, and not at its first checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from samestep.train.state.codec import encode

Follow = Callable[[nn.Module], None]


def with_savable_state(optimizer: Optimizer, follow: Follow) -> Follow:
    """As `follow`, which is told of each update; the first time it looks at the optimizer's state.

    Raises:
        UsageError: from that call, on every rank: some of it could only be saved with pickle.
    """
    looked = False

    def look_and_follow(model: nn.Module) -> None:
        nonlocal looked
        if not looked:
            encode({"optimizer": optimizer.state_dict()}, "state")
            looked = True
        follow(model)

    return look_and_follow
