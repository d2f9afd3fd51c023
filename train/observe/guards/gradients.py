"""Gradients that nobody clears, that nobody makes, or that are all zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from samestep.train.observe.guards.check import Check, Finding, Subject, listed
from samestep.train.parallel.shards import StepPlan

PATIENCE = 20  # steps without gradient after which a parameter that had one is named


class ClearedGradients(Check):
    """`p.grad` is None from zero_grad to the first backward: what is there would be added to the step's gradient."""

    def __init__(self, subject: Subject) -> None:
        self._held = {id(p) for group in subject.optimizer.param_groups for p in group["params"]}
        self._trained = [(n, p) for n, p in subject.model.named_parameters() if p.requires_grad]
        self._dirty: set[str] = set()
        self._first = True

    def before_step(self, plan: StepPlan) -> tuple[()]:  # noqa: ARG002
        """Expect the first loss."""
        self._first = True
        return ()

    def before_loss(self, batch: Any, samples: int) -> Iterator[Finding]:  # noqa: ARG002
        """Look at what was set since the step began, which clears all; later, a part may have had its backward."""
        self._dirty = {name for name, p in self._trained if p.grad is not None and id(p) in self._held}
        first, self._first = self._first, False
        if self._dirty and first:
            yield Finding(
                f"gradients are expected to be cleared before each step, but {listed(sorted(self._dirty))} still "
                "had one when the loss was called",
                "something sets p.grad while a batch is made, such as collate_fn: leave gradients to the step",
                fatal=True,
            )

    def after_loss(self) -> Iterator[Finding]:
        """Look at what the loss has added."""
        made = [name for name, p in self._trained if p.grad is not None and id(p) in self._held]
        if set(made) - self._dirty:
            yield Finding(
                f"the loss is expected to leave gradients alone, but {listed(made)} had one when it returned",
                "the loss must not call backward(), step the optimizer or set p.grad: return it, and all that is done",
                fatal=True,
                at_once=True,
            )


class UnheldParameters(Check):
    """Parameters that ask for a gradient which no optimizer uses."""

    def __init__(self, subject: Subject) -> None:
        held = {id(p) for group in subject.optimizer.param_groups for p in group["params"]}
        self._names = [n for n, p in subject.model.named_parameters() if p.requires_grad and id(p) not in held]

    def conclude(self) -> Iterator[Finding]:
        """Once is enough."""
        if self._names:
            yield Finding(
                f"{listed(self._names)} of the model will never change: the optimizer does not hold them",
                "give the optimizer all of model.parameters(), or say requires_grad_(False)",
            )


class MissingGradients(Check):
    """Parameters that no step uses, or none any more. Cheap enough to look after every step of a run."""

    def __init__(self, subject: Subject) -> None:
        self._named = [(name, p) for name, p in subject.model.named_parameters() if p.requires_grad]
        self._parameters = [p for _, p in self._named]
        self._since: dict[int, int] = {}  # position -> first step, from 1, of those without gradient
        self._ever: set[int] = set()
        self._told: set[int] = set()

    def after_step(self, plan: StepPlan) -> list[Finding]:
        """Note who has no gradient; name who had one once, after PATIENCE steps."""
        missing = [index for index, p in enumerate(self._parameters) if p.grad is None]
        if not missing and not self._since and self._ever:
            return []
        return self._note(missing, plan.step + 1)

    def _note(self, missing: list[int], step: int) -> list[Finding]:
        self._since = {index: self._since.get(index, step) for index in missing}
        self._ever |= set(range(len(self._parameters))) - set(missing)
        late = [
            index
            for index, since in self._since.items()
            if index in self._ever and step - since + 1 >= PATIENCE and index not in self._told
        ]
        self._told |= set(late)
        first = sorted({self._since[index] for index in late})
        return [
            Finding(
                f"{listed(self._named[i][0] for i in late if self._since[i] == since)} had no gradient in any step "
                f"since step {since}",
                "is a branch of the model no longer taken, or requires_grad switched off?",
            )
            for since in first
        ]

    def conclude(self) -> Iterator[Finding]:
        """Name who had none in any step."""
        never = [index for index in self._since if index not in self._ever]
        if never:
            yield Finding(
                f"{listed(self._named[index][0] for index in never)} had no gradient in any step so far",
                "use them in forward, drop them, or say requires_grad_(False)",
            )


class ZeroGradients(Check):
    """A loss that does not move with the weights: constant, saturated or cut off."""

    def __init__(self, subject: Subject) -> None:
        self._model: nn.Module = subject.model
        self._zero: list[bool] = []

    def after_step(self, plan: StepPlan) -> tuple[()]:  # noqa: ARG002
        """Look at the reduced gradients."""
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        self._zero.append(bool(gradients) and not any(bool(g.any()) for g in gradients))
        return ()

    def conclude(self) -> Iterator[Finding]:
        """All of the steps, so that a batch without weight is no alarm."""
        steps, self._zero = self._zero, []
        if all(steps):
            yield Finding(
                f"every gradient was exactly zero in {len(steps)} steps in a row: the weights do not move the loss",
                "look for a constant loss, a saturated activation or a detach() on the way to it",
            )
