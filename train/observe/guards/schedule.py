"""A learning rate that is zero, or a scheduler that somebody else steps too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from samestep.train.observe.guards.check import Check, Finding, Subject
from samestep.train.parallel.shards import StepPlan


class LearningRate(Check):
    """Zero in one step is how many warm-ups begin; zero in all of the first ones trains nothing."""

    def __init__(self, subject: Subject) -> None:
        self._optimizer: Optimizer = subject.optimizer
        self._zero: list[bool] = []

    def before_step(self, plan: StepPlan) -> tuple[()]:  # noqa: ARG002
        """Note this step's."""
        self._zero.append(all(float(group.get("lr", 1.0)) == 0.0 for group in self._optimizer.param_groups))
        return ()

    def conclude(self) -> Iterator[Finding]:
        """Judge all of them."""
        steps, self._zero = self._zero, []
        if all(steps):
            yield Finding(
                f"the learning rate was 0 in {len(steps)} steps in a row: nothing was learned",
                "look at lr= of the optimizer and at what the scheduler multiplies it with",
            )


class SteppedOnce(Check):
    """samestep steps the scheduler, once a step or once an epoch."""

    def __init__(self, subject: Subject) -> None:
        self._scheduler: Any = subject.scheduler
        self._most = 1 if subject.scheduler_interval == "step" else 0
        self._before: int | None = None

    def before_step(self, plan: StepPlan) -> tuple[()]:  # noqa: ARG002
        """Note how often it was stepped."""
        self._before = getattr(self._scheduler, "last_epoch", None)
        return ()

    def after_step(self, plan: StepPlan) -> Iterator[Finding]:  # noqa: ARG002
        """Compare."""
        now = getattr(self._scheduler, "last_epoch", None)
        if isinstance(self._before, int) and isinstance(now, int) and now - self._before > self._most:
            where = "once an optimizer step" if self._most else "only at the end of an epoch"
            yield Finding(
                f"the scheduler is expected to be stepped {where}, but was stepped {now - self._before} times in one",
                "drop scheduler.step() from the recipe: samestep does it, as Components.scheduler_interval says",
                fatal=True,
            )
