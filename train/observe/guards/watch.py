"""The guards of a run: null unless asked for, else all checks in the first steps after each start.

What one rank finds, all ranks are told in the same step: a fatal finding ends all of them with the same sentence, a
warning is written by rank zero, once. What has no same step to wait for ends the rank that finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch

from samestep.launcher.contract import UsageError
from samestep.train.observe.guards.attributes import PlainAttributes
from samestep.train.observe.guards.averaged import AveragedBuffers
from samestep.train.observe.guards.batches import PlannedBatches
from samestep.train.observe.guards.check import Check, Finding, Subject
from samestep.train.observe.guards.devices import SameDevice
from samestep.train.observe.guards.gradients import ClearedGradients, MissingGradients, UnheldParameters, ZeroGradients
from samestep.train.observe.guards.graphs import KeptGraphs
from samestep.train.observe.guards.modes import TrainingMode
from samestep.train.observe.guards.paths import NoCollectives, SamePath
from samestep.train.observe.guards.randomness import KeyedRandomness
from samestep.train.observe.guards.schedule import LearningRate, SteppedOnce
from samestep.train.observe.guards.threads import KeptThreads
from samestep.train.observe.guards.uncalled import UncalledHooks
from samestep.train.observe.guards.weights import OutsideChanges, unchanged
from samestep.train.parallel.group import Group, gather_json
from samestep.train.parallel.shards import StepPlan, owned_span
from samestep.train.recipe import Loss

FIRST_STEPS = 3
When = Literal["first", "always", "never"]


class Guards(Protocol):
    """Told of each step, and put around the functions of a recipe."""

    def loss(self, function: Loss) -> Loss:
        """The loss, watched while it trains."""

    def metric(self, name: str, function: Loss) -> Loss:
        """A function of the evaluation, watched."""

    def before_step(self, plan: StepPlan) -> None:
        """A step begins."""

    def after_step(self, plan: StepPlan) -> None:
        """A step is over. A collective while all checks are on.

        Raises:
            UsageError: a fatal finding, on every rank.
        """

    def forget(self) -> None:
        """The run went back to an earlier state."""

    def close(self) -> None:
        """The run is over, however it ended: the model may live on."""


class NullGuards:
    """Looks at nothing."""

    def loss(self, function: Loss) -> Loss:
        """The function itself."""
        return function

    def metric(self, name: str, function: Loss) -> Loss:  # noqa: ARG002
        """The function itself."""
        return function

    def before_step(self, plan: StepPlan) -> None:
        """Nothing."""

    def after_step(self, plan: StepPlan) -> None:
        """Nothing."""

    def forget(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@dataclass(slots=True)
class WatchingGuards:
    """Runs `checks` in the first `steps` steps (None: in all), `MissingGradients` in every step."""

    checks: list[Check]
    missing: MissingGradients
    group: Group
    shards: int
    steps: int | None
    warn: Callable[[str], None]
    _seen: int = 0
    _sizes: list[int] = field(default_factory=list)  # samples of this rank's losses to come, in this step
    _found: list[Finding] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)

    @property
    def _watching(self) -> bool:
        return self.steps is None or self._seen < self.steps

    def loss(self, function: Loss) -> Loss:
        """Watched in the steps that are looked at; outside of a step, in an evaluation, it is the function itself."""

        def watched(model: Any, batch: Any) -> Any:
            if not self._sizes:
                return function(model, batch)
            size = self._sizes.pop(0)
            for check in self.checks:
                self._note(check.before_loss(batch, size))
            try:
                result = function(model, batch)
            except Exception:
                self._tell(self._found)  # may say why
                raise
            for check in self.checks:
                self._note(check.after_loss())
            if any(finding.at_once for finding in self._found):
                self._tell(self._found)
            return result

        return watched

    def metric(self, name: str, function: Loss) -> Loss:
        """Watched in its first calls."""
        return unchanged(name, function, self.steps)

    def before_step(self, plan: StepPlan) -> None:
        """Look, and expect the losses of this rank's shards."""
        if self._watching:
            for check in self.checks:
                self._note(check.before_step(plan))
            mine = owned_span(self.group.rank, self.group.world_size, self.shards)
            self._sizes = [part.samples for shard in plan.present(mine) for part in plan.parts(shard)]

    def after_step(self, plan: StepPlan) -> None:
        """Look; while all checks are on, tell all ranks what each has found."""
        late = self.missing.after_step(plan)
        if late:
            self._tell(late)  # gradients are the same on every rank, and so is this
        if not self._watching:
            return
        self._sizes = []
        for check in self.checks:
            self._note(check.after_step(plan))
        self._seen += 1
        if self._seen % FIRST_STEPS == 0:
            for check in (*self.checks, self.missing):
                self._note(check.conclude())
        if not self._watching:
            self.close()
        self._tell(_of_all_ranks(self._found, self.group))
        self._found = []

    def forget(self) -> None:
        """What was seen of the step that is not finished, and of those before it, is no measure for the next one."""
        self._sizes, self._found = [], []
        for check in self.checks:
            check.forget()

    def close(self) -> None:
        """Take all hooks away."""
        for check in self.checks:
            check.close()

    def _note(self, findings: Iterable[Finding]) -> None:
        self._found += findings

    def _tell(self, findings: list[Finding]) -> None:
        for finding in sorted(findings, key=lambda found: not found.fatal):
            if finding.fatal:
                raise UsageError(finding.text, finding.hint)
            if finding.text not in self._told:
                self._told.add(finding.text)
                self.warn(f"{finding.text} ({finding.hint})")


def _of_all_ranks(found: list[Finding], group: Group) -> list[Finding]:
    """The findings of all ranks, each once, in the order of the ranks. A collective."""
    by_rank = gather_json(group, [asdict(one) for one in found])
    return list(dict.fromkeys(Finding(**one) for row in by_rank for one in row))


def guards_for(
    when: When, subject: Subject, group: Group, shards: int, device: torch.device, warn: Callable[[str], None]
) -> Guards:
    """What `--check` asks for."""
    if when == "never":
        return NullGuards()
    checks: list[Check] = [
        PlannedBatches(),
        SameDevice(subject, device),
        TrainingMode(subject),
        ClearedGradients(subject),
        UnheldParameters(subject),
        ZeroGradients(subject),
        OutsideChanges(subject),
        AveragedBuffers(subject),
        PlainAttributes(subject),
        KeyedRandomness(subject),
        KeptThreads(),
        LearningRate(subject),
        SteppedOnce(subject),
        KeptGraphs(subject),
        UncalledHooks(subject),
        SamePath(subject, group),
        NoCollectives(group),
    ]
    steps = FIRST_STEPS if when == "first" else None
    return WatchingGuards(checks, MissingGradients(subject), group, shards, steps, warn)
