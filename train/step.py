"""One optimizer step: no gradients; forward, loss and backward for each shard; gradient sync, clip, step, schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from samestep.train.data.rng import seed_shard
from samestep.train.finite import FiniteGuard
from samestep.train.micro_batches import MicroBatches
from samestep.train.observe.phases import PhaseClock
from samestep.train.observe.tally import Values
from samestep.train.parallel.shards import StepPlan
from samestep.train.parallel.step_sums import Sums, divide
from samestep.train.recipe import Components, objective, require_gradient, weigh
from samestep.train.scaling import Scaling
from samestep.train.schedule import advance
from samestep.train.shard_pass import ShardPass


@dataclass(slots=True)
class OptimizerStep:
    """Calling it runs one step on this rank and returns its losses and weights, on the device still (see StepTally)."""

    components: Components
    seed: int
    clip_grad_norm: float | None
    autocast: AbstractContextManager[None]
    scaling: Scaling
    shards: ShardPass
    guard: FiniteGuard
    micro_batches: MicroBatches
    follow: Callable[[nn.Module], None]  # the moving average of the weights, told after each update
    warn: Callable[[str], None]

    @property
    def clock(self) -> PhaseClock:
        """Tells where the time goes."""
        return self.shards.clock

    def __call__(self, plan: StepPlan, batches: Iterator[Any]) -> Values:
        """Take this rank's shards of `plan` from `batches`, which are on the device."""
        tally, clock = self.shards.tally, self.shards.clock
        may_be_left_out = self.guard.keeps_buffers or tally.own_weights or self.scaling.leaves_out
        self.shards.begin(plan, keep=may_be_left_out)

        for shard in self.shards.mine:
            clock.enter("data")
            batch = next(batches)

            for part in plan.parts(shard):
                clock.enter("forward")
                if part.first:
                    seed_shard(self.seed, plan.step, shard)
                self.shards.before(part)
                inputs = self.micro_batches.cut(batch, part, plan.size(shard))
                with self.autocast:
                    outcome = weigh(self.components.loss(self.components.model, inputs), part.samples)
                    target = objective(outcome, plan.samples)
                self.guard.investigate.require_rows(inputs, outcome, plan, shard)
                require_gradient(target)
                self.shards.backward(part, outcome, self.scaling.scale(target))

        gradients, sums = self.shards.finish()
        clock.enter("optimizer")
        usable = self._divide(gradients, sums, plan) and self.guard.admits(plan, gradients, tally.mine)
        if not (usable and self._update()):
            self.shards.buffers.undo()
        return tally.mine

    def _divide(self, gradients: list[Tensor], sums: Sums, plan: StepPlan) -> bool:
        """Divide by the sum of weights that the loss brought; False where nothing in the batch had weight."""
        if not self.shards.tally.own_weights:
            return True
        if sums.weight == 0.0:
            self.warn(f"step {plan.step + 1} has no weight in its whole batch: no update")
            return False
        divide(gradients, sums)
        return True

    def _update(self) -> bool:
        optimizer, scheduler = self.components.optimizer, self.components.scheduler
        self.scaling.unscale(optimizer)
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.shards.reducer.parameters, self.clip_grad_norm)
        if not self.scaling.update(optimizer):
            return False
        self.follow(self.components.model)
        if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):
            return True
        if self.components.scheduler_interval == "step":
            advance(scheduler)
        return True
