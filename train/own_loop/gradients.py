"""One model's gradients in a loop of one's own: what `OptimizerStep` does with them, between the user's lines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from samestep.launcher.contract import UsageError
from samestep.train.assemble import Setting
from samestep.train.data.rng import seed_of_pass, seed_shard
from samestep.train.finite import start_of_backward
from samestep.train.loop import Run
from samestep.train.observe.tally import StepTally, Value, Values, scalar
from samestep.train.own_loop.step import Step
from samestep.train.parallel.buffers import BufferCombiner
from samestep.train.parallel.no_buffers import NoBuffers
from samestep.train.parallel.reduction import GradientReducer
from samestep.train.parallel.shards import MicroBatch, StepPlan
from samestep.train.parallel.step_sums import divide, step_sums
from samestep.train.recipe import LossOutput, objective, require_gradient, weigh


class ShardGradients:
    """Gradients of one model, the same bits on any number of ranks; made by `OwnLoop.gradients`.

    `over(step)` gives this rank's batches of a step, each to be followed by one `backward`. Afterwards `p.grad` of
    each trainable parameter is, on every rank, the gradient of the mean loss over the global batch: None where no
    batch used the parameter, or where nothing in them had weight.
    """

    def __init__(self, model: nn.Module, find_unused_parameters: bool | None) -> None:
        self.model = model
        self._find_unused = find_unused_parameters
        self._run: Run | None = None
        self._part: MicroBatch | None = None  # whose loss is waited for
        self._warned = False
        self._open = False  # a pass is under way
        self._summed = -1  # the step of the newest pass

    def bind(self, run: Run, setting: Setting) -> None:
        """Become a part of `run`. Not for users: `OwnLoop.steps` does it."""
        group, device, shards = setting.member.group, setting.device, setting.shards
        exchange = run.step.reducer.exchange  # one for all sums of a rank: they share its memory
        self.reducer = GradientReducer(self.model, group, exchange, shards, self._find_unused)
        self.reducer.flights.enter = run.step.clock.enter
        models = run.components.model  # also another one's buffers may change in these forwards
        has_buffers = next(models.buffers(), None) is not None
        self.buffers = BufferCombiner(models, group, shards) if has_buffers else NoBuffers()
        self.tally = StepTally(group, device)
        self._sums = step_sums(group, exchange, shards, device)
        self._run = run

    def over(self, step: Step) -> Iterator[Any]:
        """This rank's batches of `step`, on the device, random numbers keyed by step, shard and pass. A collective.

        Each batch is of one shard: a rank has as many as it owns shards, and none where the global batch has too few
        samples. Several passes over one step, also by other models, get the same batches.

        Raises:
            UsageError: a batch was not followed by `backward`, or the pass before was left early.
        """
        run, plan = self._running(), step.plan
        self._plan = plan
        self.require_complete()
        self._look_at_mode(run, plan)
        self.reducer.begin(plan)
        self.buffers.begin(plan)
        self.tally.begin(plan, self.reducer.mine)
        self._sums.begin(plan, self.tally.width, self.buffers.width, self.reducer.sends_after)
        self._open = True
        seed = seed_of_pass(run.config.seed, step.begin_pass())
        for number, shard in enumerate(self.reducer.mine):
            run.step.clock.enter("data")
            batch = step.batch(number)
            run.step.clock.enter("forward")
            (self._part,) = plan.parts(shard)
            seed_shard(seed, plan.step, shard)
            self.buffers.before(self._part)
            yield batch
            if self._part is not None:
                raise UsageError(
                    f"each batch of over(step) is expected to be followed by one backward, but in step {plan.step + 1} "
                    "one was not",
                    "call backward(loss) once for each batch; a loss of 0 * output.sum() adds nothing",
                )
        self._finish(run, plan)
        self._open = False
        step.seed_between(run.config.seed)

    def backward(self, loss: LossOutput) -> None:
        """Take the gradients of one batch's loss: what a recipe's `loss` may return (see `Components`).

        Raises:
            UsageError: no batch waits for it, or it has another form or no gradient.
        """
        run, part = self._running(), self._part
        if part is None:
            raise UsageError(
                "backward is expected once for each batch of over(step), but no batch waits for it",
                "add the losses of a batch up, and call backward(loss) with their sum",
            )
        outcome = weigh(loss, part.samples)
        target = objective(outcome, self._plan.samples)
        require_gradient(target)
        total = self.tally.add(outcome, part)
        self._sums.weigh(part.shard, self.tally.of_shard())
        run.step.clock.enter("backward")
        self._part = None
        self.reducer.backward(part, target, start_of_backward(target, total), partial(self._computed, part))
        run.step.clock.enter("forward")

    def _computed(self, part: MicroBatch) -> None:
        self.buffers.after(part)
        self._sums.add(part.shard, self.buffers.of_shard())

    def _finish(self, run: Run, plan: StepPlan) -> None:
        run.step.clock.enter("sync")
        gradients = self.reducer.finish()
        sums = self._sums.finish()
        self.buffers.finish(sums.buffers)
        run.step.clock.enter("optimizer")
        self._summed = plan.step
        if self.tally.own_weights:
            if sums.weight == 0.0:
                run.reporter.warning(f"step {plan.step + 1} has no weight in its whole batch: gradients are None")
                for parameter in self.reducer.parameters:
                    parameter.grad = None
                return
            divide(gradients, sums)
        run.step.guard.admits(plan, gradients, self.tally.mine)

    def rows_of(self, step: Step) -> Values | None:
        """This rank's rows of the newest pass over `step` (see StepTally); None where there was none."""
        return self.tally.mine if self._summed == step.plan.step else None

    def require_complete(self) -> None:
        """Judge a pass that may have been left.

        Raises:
            UsageError: it was.
        """
        if self._open:
            raise UsageError(
                "over(step) is expected to be gone through to its end, but was left early",
                "every rank has to come to the end of each pass: leave out break and return",
            )

    def _look_at_mode(self, run: Run, plan: StepPlan) -> None:
        if not self.model.training and not self._warned:
            self._warned = True
            run.reporter.warning(
                f"a model trains in eval mode from step {plan.step + 1} on: dropout is off and BatchNorm keeps its "
                "statistics (call .train() before over(step), if that is not meant)"
            )

    def _running(self) -> Run:
        if self._run is None:
            raise UsageError(
                "over(step) and backward are expected inside of the loop, but were called before loop.steps",
                "for step in loop.steps(data, keep=…): for batch in gradients.over(step): …",
            )
        return self._run


def column_of(row: list[Value] | None, weight: Value, device: torch.device) -> Value:
    """A shard's mean loss times `weight`, since the ledger divides a column by the weights beside it; NaN without."""
    if row is None:
        return math.nan
    total, own = row[:2]
    if isinstance(total, float | int) and isinstance(own, float | int) and isinstance(weight, float | int):
        return total / own * weight if own else 0.0
    divisor = scalar(own, device)
    mean = scalar(total, device) / divisor
    return torch.where(divisor == 0, torch.zeros_like(mean), mean) * scalar(weight, device)
