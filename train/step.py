"""One optimizer step: no gradients; forward, loss and backward for each shard; gradient sync, clip, step, schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from samestep.train.data.cut import empty_batch, has_no_rows
from samestep.train.data.rng import seed_shard
from samestep.train.finite import FiniteGuard, start_of_backward
from samestep.train.micro_batches import MicroBatches
from samestep.train.observe.phases import PhaseClock
from samestep.train.observe.tally import StepTally, Values
from samestep.train.parallel.buffers import BufferCombiner
from samestep.train.parallel.no_buffers import NoBuffers
from samestep.train.parallel.reduction import GradientReducer
from samestep.train.parallel.shards import MicroBatch, StepPlan
from samestep.train.parallel.step_sums import StepSums, Sums
from samestep.train.recipe import Components, is_mean_of_nothing, objective, require_gradient, weigh
from samestep.train.scaling import Scaling
from samestep.train.schedule import advance


@dataclass(slots=True)
class OptimizerStep:
    """Calling it runs one step on this rank and returns its losses and weights, on the device still (see StepTally)."""

    components: Components
    seed: int
    clip_grad_norm: float | None
    autocast: AbstractContextManager[None]
    scaling: Scaling
    reducer: GradientReducer
    guard: FiniteGuard
    buffers: BufferCombiner | NoBuffers
    micro_batches: MicroBatches
    tally: StepTally
    sums: StepSums
    clock: PhaseClock
    follow: Callable[[nn.Module], None]  # the moving average of the weights, told after each update
    warn: Callable[[str], None]

    def __call__(self, plan: StepPlan, batches: Iterator[Any]) -> Values:
        """Take this rank's shards of `plan` from `batches`, which are on the device."""
        self.reducer.begin(plan)
        may_be_left_out = self.guard.keeps_buffers or self.tally.own_weights or self.scaling.leaves_out
        self.buffers.begin(plan, keep=may_be_left_out)
        self.tally.begin(plan, self.reducer.mine)
        self.sums.begin(plan, self.tally.width, self.buffers.width, self.reducer.sends_after)

        for shard in self.reducer.mine:
            self.clock.enter("data")
            batch = next(batches)

            for part in plan.parts(shard):
                self.clock.enter("forward")
                if part.first:
                    seed_shard(self.seed, plan.step, shard)
                self.buffers.before(part)
                inputs = self.micro_batches.cut(batch, part, plan.size(shard))
                with self.autocast:
                    outcome = weigh(self.components.loss(self.components.model, inputs), part.samples)
                    target = objective(outcome, plan.samples)
                if has_no_rows(inputs) and is_mean_of_nothing(outcome):
                    raise empty_batch(self.guard.investigate.sampler.samples_of(plan, shard))
                require_gradient(target)
                total = self.tally.add(outcome, part)
                if part.last:
                    self.sums.weigh(shard, self.tally.of_shard())

                self.clock.enter("backward")
                scaled = self.scaling.scale(target)
                self.reducer.backward(part, scaled, start_of_backward(scaled, total), partial(self._computed, part))

        self.clock.enter("sync")
        gradients = self.reducer.finish()
        sums = self.sums.finish()
        self.buffers.finish(sums.buffers)

        self.clock.enter("optimizer")
        usable = self._divide(gradients, sums, plan) and self.guard.admits(plan, gradients, self.tally.mine)
        if not (usable and self._update()):
            self.buffers.undo()
        return self.tally.mine

    def _computed(self, part: MicroBatch) -> None:
        """Note what is summed beside the gradients; it is sent before anything waits for those, where it can be."""
        self.buffers.after(part)
        if part.last:
            self.sums.add(part.shard, self.buffers.of_shard())

    def _divide(self, gradients: list[Tensor], sums: Sums, plan: StepPlan) -> bool:
        """Divide by the sum of weights that the loss brought; False where nothing in the batch had weight."""
        if not self.tally.own_weights:
            return True
        if sums.weight == 0.0:
            self.warn(f"step {plan.step + 1} has no weight in its whole batch: no update")
            return False
        # torch divides all at once by a weight of their own type, one after the other by another; the bits are the same
        alike = all(gradient.dtype == torch.float32 for gradient in gradients)
        torch._foreach_div_(gradients, sums.weights[0].float() if alike else sums.weights[0])
        return True

    def _update(self) -> bool:
        optimizer, scheduler = self.components.optimizer, self.components.scheduler
        self.scaling.unscale(optimizer)
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.reducer.parameters, self.clip_grad_norm)
        if not self.scaling.update(optimizer):
            return False
        self.follow(self.components.model)
        if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):
            return True
        if self.components.scheduler_interval == "step":
            advance(scheduler)
        return True
