"""Floating-point buffers of which a step keeps the mean over its shards, where that need not be what is meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from samestep.train.observe.guards.check import Check, Finding, Subject, listed
from samestep.train.observe.guards.weights import Marks
from samestep.train.parallel.shards import StepPlan


class AveragedBuffers(Check):
    """The mean is that of BatchNorm's running statistics; of a queue it is one whose rows are of no batch.

    Buffers that end alike in all shards have that value as their mean, so only those are named that end a step as
    something else than their last shard left here.
    """

    def __init__(self, subject: Subject) -> None:
        self._model = subject.model
        self._names = {
            f"{path}.{key}".lstrip(".")
            for path, module in subject.model.named_modules()
            if not isinstance(module, nn.modules.batchnorm._NormBase)
            for key in module._buffers
        }
        self._left: Marks | None = None

    def before_step(self, plan: StepPlan) -> tuple[()]:  # noqa: ARG002
        """This rank may have no shard."""
        self._left = None
        return ()

    def after_loss(self) -> tuple[()]:
        """Remember what is left."""
        self._left = Marks(self._buffers())
        return ()

    def after_step(self, plan: StepPlan) -> Iterator[Finding]:
        """Compare; a single part keeps what it left, unless its step was taken back."""
        single = min(plan.samples, plan.shards) == 1 and len(plan.parts(0)) == 1
        if self._left is None or single:
            return
        averaged = self._left.changed(Marks(self._buffers()))
        if averaged:
            yield Finding(
                "forward changes buffers, of which a step keeps the mean over its shards and micro-batches: "
                f"{listed(averaged)}",
                "fine for running statistics, and where forward sets them before it reads them; a queue, a memory or a "
                "count would hold means of what these wrote: --shards 1 with --micro-batches 1 keeps what was written",
            )

    def _buffers(self) -> dict[str, Tensor]:
        buffers: Any = self._model.named_buffers()
        return {name: buffer for name, buffer in buffers if name in self._names and buffer.is_floating_point()}
