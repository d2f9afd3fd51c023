"""One model's gradients in a loop of one's own: what `OptimizerStep` does with them, between the user's lines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from samestep.launcher.contract import UsageError
from samestep.train.assemble import Setting
from samestep.train.data.rng import seed_of_pass, seed_shard
from samestep.train.loop import Run
from samestep.train.observe.tally import StepTally, Value, Values, scalar
from samestep.train.own_loop.step import Step
from samestep.train.parallel.buffers import combiner
from samestep.train.parallel.reduction import GradientReducer
from samestep.train.parallel.shards import MicroBatch, StepPlan
from samestep.train.parallel.step_sums import divide, step_sums
from samestep.train.recipe import LossOutput, objective, require_gradient, weigh
from samestep.train.shard_pass import ShardPass


class ShardGradients:
    """Gradients of one model, the same bits on any number of ranks; made by `OwnLoop.gradients`.

    `over(step)` gives this rank's batches of a step, each to be followed by one `backward`. Afterwards `p.grad` of
    each trainable parameter is, on every rank, the gradient of the mean loss over the global batch: None where no
    batch used the parameter, or where nothing in them had weight. Gradients of other models are left as they are, and
    what a plain `.backward()` in between adds to `p.grad` is not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._run: Run | None = None
        self._part: MicroBatch | None = None  # whose loss is waited for
        self._batch: Any = None
        self._warned = False
        self._open = self._left = False  # a pass has begun, and was left before its end
        self.weightless = False  # nothing in the newest pass had weight
        self._summed = -1  # the step of the newest pass

    def bind(self, run: Run, setting: Setting) -> None:
        """Become a part of `run`. Not for users: `OwnLoop.steps` does it."""
        group, device, shards = setting.member.group, setting.device, setting.shards
        exchange, clock = run.step.shards.reducer.exchange, run.step.clock  # one for all sums: they share its memory
        reducer = GradientReducer(self.model, group, exchange, shards, None, through_ddp=False)
        buffers = combiner(run.components.model, group, shards)  # of all models: its forwards may run others
        self.shards = ShardPass(
            reducer, buffers, StepTally(group, device), step_sums(group, exchange, shards, device), clock
        )
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
        self.shards.begin(plan)
        self._open = True
        seed = seed_of_pass(run.config.seed, step.begin_pass())
        for number, shard in enumerate(self.shards.mine):
            self.shards.clock.enter("data")
            batch = step.batch(number)
            self.shards.clock.enter("forward")
            (self._part,) = plan.parts(shard)
            seed_shard(seed, plan.step, shard)
            self.shards.before(self._part)
            self._batch = batch
            try:
                yield batch
            except GeneratorExit:
                self._left = True
                raise
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
        run.step.guard.investigate.require_rows(self._batch, outcome, self._plan, part.shard)
        require_gradient(target)
        self._part = self._batch = None
        self.shards.backward(part, outcome, target)
        self.shards.clock.enter("forward")

    def _finish(self, run: Run, plan: StepPlan) -> None:
        gradients, sums = self.shards.finish()
        self.shards.clock.enter("optimizer")
        self._summed = plan.step
        if self.shards.tally.own_weights:
            self.weightless = sums.weight == 0.0
            if self.weightless:
                run.reporter.warning(f"step {plan.step + 1} has no weight in its whole batch: gradients are None")
                for parameter in self.shards.reducer.parameters:
                    parameter.grad = None
                return
            divide(gradients, sums)
        run.step.guard.admits(plan, gradients, self.shards.tally.mine)

    @property
    def under_way(self) -> bool:
        """Whether a pass has begun, was not left, and has not come to its end."""
        return self._open and not self._left

    def rows_of(self, step: Step) -> Values | None:
        """This rank's rows of the newest pass over `step` (see StepTally); None where there was none."""
        return self.shards.tally.mine if self._summed == step.plan.step else None

    def require_complete(self) -> None:
        """Judge a pass that may have been left.

        Raises:
            UsageError: it was.
        """
        if self._open:
            raise UsageError(
                "over(step) is expected to be gone through to its end, but was left early",
                "every rank has to come to the end of a pass before the next one: leave out break, return and zip",
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
