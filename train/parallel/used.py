"""Which parameters train in a step and which of these are used, as the ranks that ran a forward tell all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from samestep.train.parallel.group import Group

_UNKNOWN, _FROZEN, _UNUSED, _USED = range(4)


def anywhere(
    group: Group, trained: Sequence[bool], used: Sequence[bool], device: torch.device, *, ran: bool
) -> tuple[list[bool], list[bool]]:
    """Of all parameters whether they train, and of those that do whether some rank used them. A collective.

    Args:
        group: all ranks.
        trained: of all parameters, what this rank knows.
        used: of those that train.
        device: where the group's tensors are.
        ran: whether this rank had a sample in this step; a layer begins or ends to train in a forward.
    """
    told = iter(used)
    states = [(_USED if next(told) else _UNUSED) if trains else _FROZEN for trains in trained]
    row = torch.tensor(states if ran else [_UNKNOWN] * len(states), dtype=torch.uint8)
    most = group.gather(row.to(device)).amax(0).tolist()
    return [state > _FROZEN for state in most], [state == _USED for state in most if state > _FROZEN]
