"""What stands for a BufferCombiner where a model has no buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from samestep.train.parallel.shards import MicroBatch, StepPlan

NOTHING = torch.empty(0, dtype=torch.float64)


class NoBuffers:
    """What a model without buffers has."""

    width = 0
    changing: list[str] | None = None

    def __init__(self) -> None:
        self.known: set[str] = set()  # see BufferCombiner

    def undo(self) -> None:
        """Nothing to bring back."""

    def settle(self) -> None:
        """Nothing is open."""

    def unsaved(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def begin(self, plan: StepPlan, *, keep: bool = False) -> None:
        """Nothing to remember."""

    def before(self, part: MicroBatch) -> None:
        """Nothing to bring back."""

    def after(self, part: MicroBatch) -> None:
        """Nothing to take."""

    def of_shard(self) -> Tensor:
        """Nothing to sum."""
        return NOTHING

    def finish(self, total: Tensor) -> None:
        """Nothing to combine."""
