"""What stands for a BufferCombiner where a model has no buffers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from samestep.train.parallel.shards import MicroBatch, StepPlan

NOTHING = torch.empty(0, dtype=torch.float64)


class ChangingBuffers(Protocol):
    """What the state of a run has to know of them.

    Attributes:
        known: names of those that changed before the start of this process.
    """

    known: set[str]

    @property
    def changing(self) -> list[str] | None:
        """Names of those that change; None before the first step."""

    def unsaved(self) -> dict[str, Tensor]:
        """Those that change, or may do so, and are no part of the model's state_dict."""

    def settle(self) -> None:
        """Judge what was not read from a GPU yet."""


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
