"""One pass over the shards of a rank: gradients, buffers, losses and weights of a model, led through it together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from samestep.train.finite import start_of_backward
from samestep.train.observe.phases import PhaseClock
from samestep.train.observe.tally import StepTally
from samestep.train.parallel.buffers import BufferCombiner
from samestep.train.parallel.no_buffers import NoBuffers
from samestep.train.parallel.reduction import GradientReducer
from samestep.train.parallel.shards import MicroBatch, StepPlan
from samestep.train.parallel.step_sums import StepSums, Sums
from samestep.train.recipe import Outcome


@dataclass(slots=True)
class ShardPass:
    """Used as begin; before and backward for each part of each of `mine`; finish."""

    reducer: GradientReducer
    buffers: BufferCombiner | NoBuffers
    tally: StepTally
    sums: StepSums
    clock: PhaseClock

    @property
    def mine(self) -> list[int]:
        """This rank's shards of the step."""
        return self.reducer.mine

    def begin(self, plan: StepPlan, *, keep: bool = False) -> None:
        """No gradient is left of before; with `keep` the buffers can be brought back. A collective at times."""
        self.reducer.begin(plan)
        self.buffers.begin(plan, keep=keep)
        self.tally.begin(plan, self.reducer.mine)
        self.sums.begin(plan, self.tally.width, self.buffers.width, self.reducer.sends_after)

    def before(self, part: MicroBatch) -> None:
        """A forward begins: from the step's buffers."""
        self.buffers.before(part)

    def backward(self, part: MicroBatch, outcome: Outcome, target: Tensor) -> None:
        """Take the loss of a part, and the gradients of `target`, what the step minimises of it. A collective at times.

        Raises:
            UsageError: the loss brings weights, or logs, unlike before (see StepTally.add); see GradientReducer.
        """
        total = self.tally.add(outcome, part)
        if part.last:
            self.sums.weigh(part.shard, self.tally.of_shard())
        self.clock.enter("backward")
        self.reducer.backward(part, target, start_of_backward(target, total), partial(self._computed, part))

    def finish(self) -> tuple[list[Tensor], Sums]:
        """The gradients summed over all shards, those of `p.grad` that are not None; and the other sums. A collective.

        Raises:
            UsageError: no parameter has a gradient, or an integer buffer did not end alike in all shards.
        """
        self.clock.enter("sync")
        gradients = self.reducer.finish()
        sums = self.sums.finish()
        self.buffers.finish(sums.buffers)
        return gradients, sums

    def _computed(self, part: MicroBatch) -> None:
        """Note what is summed beside the gradients; it is sent before anything waits for those, where it can be."""
        self.buffers.after(part)
        if part.last:
            self.sums.add(part.shard, self.buffers.of_shard())
