"""State outside of parameters, buffers and state_dict: no checkpoint has it, and each rank its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from samestep.train.observe.guards.check import Check, Finding, Subject, listed
from samestep.train.observe.guards.kept import (
    Drawn,
    beside_state_dict,
    of_functions,
    of_groups,
    of_late_buffers,
    of_loss,
    of_model,
)
from samestep.train.parallel.shards import StepPlan

_TWICE = 2  # a number that changes once is what was cached, such as a length
_WATCHED = 3  # losses; what is no number and changes in each of so many is no cache
_HINT = "no checkpoint has them, and a rank changes them once a shard: keep them by register_buffer"


class PlainAttributes(Check):
    """Compares what the modules and the loss keep, before and after each loss, and a collate_fn around a step."""

    def __init__(self, subject: Subject) -> None:
        model, known = subject.model, {name for name, _ in subject.model.named_buffers()}
        self._model = _Kept(lambda: {**dict(of_model(model)), **dict(of_late_buffers(model, known))})
        self._loss = _Kept(lambda: {**dict(of_loss(subject.loss, model)), **dict(of_functions(model))})
        self._collate = _Kept(lambda: dict(of_loss(subject.collate_fn, model)))
        self._optimizer = _Kept(lambda: dict(beside_state_dict(subject.optimizer)))
        self._scheduler = _Kept(lambda: dict(beside_state_dict(subject.scheduler)))
        self._groups = _Kept(lambda: dict(of_groups(subject.optimizer)))
        self._of_losses = self._model, self._loss, self._groups
        self._of_steps = self._collate, self._optimizer, self._scheduler

    def before_step(self, plan: StepPlan) -> tuple[()]:  # noqa: ARG002
        """Batches are made inside of a step; those that workers make leave no trace here."""
        for kept in self._of_steps:
            kept.begin()
        return ()

    def before_loss(self, batch: object, samples: int) -> tuple[()]:  # noqa: ARG002
        """Remember all."""
        for kept in self._of_losses:
            kept.begin()
        return ()

    def after_loss(self) -> tuple[()]:
        """Count who changed."""
        for kept in self._of_losses:
            kept.end()
        return ()

    def after_step(self, plan: StepPlan) -> tuple[()]:  # noqa: ARG002
        """Count what changed in the step."""
        for kept in self._of_steps:
            kept.end()
        return ()

    def forget(self) -> None:
        """What was counted belongs to steps that are done again."""
        for kept in (*self._of_losses, *self._of_steps):
            kept.forget()

    def conclude(self) -> Iterator[Finding]:
        """Name them."""
        of_model_, of_loss_, of_collate = self._model.conclude(), self._loss.conclude(), self._collate.conclude()
        if of_model_.state:
            yield Finding(
                f"the loss changes plain attributes of the model: {listed(of_model_.state)}",
                f"{_HINT}, or derive them from the batch; fine where forward sets them before it reads them",
            )
        if of_loss_.state:
            yield Finding(
                f"the loss changes what it keeps outside of the model: {listed(of_loss_.state)}",
                f"{_HINT} of the model, a criterion as one of its modules, or derive them from the batch; fine where "
                "no loss depends on them",
            )
        if settings := self._groups.conclude().state:
            yield Finding(
                f"the loss changes settings of the optimizer: {listed(settings)}",
                "a rank does so once a shard, so they depend on the number of ranks: pass Components a scheduler",
            )
        if changed := of_collate.state + of_collate.generators:
            yield Finding(
                f"collate_fn changes what it keeps: {listed(changed)}",
                "each rank and loader worker has that for itself, and no checkpoint has it: derive the batch from its "
                "samples, and draw from the random numbers of torch, numpy or random themselves, which are seeded for "
                "each batch; fine where no batch depends on it",
            )
        for part, kept in (("optimizer", self._optimizer), ("scheduler", self._scheduler)):
            of_part = kept.conclude()
            if changed := of_part.state + of_part.generators:
                yield Finding(
                    f"the {part} changes what its state_dict leaves out: {listed(changed)}",
                    "no checkpoint has that, so a run that goes on begins with what build sets there: return it from "
                    "state_dict and take it in load_state_dict; fine where no step depends on it",
                )
        if drawn := of_model_.generators + of_loss_.generators:
            yield Finding(
                f"the loss draws from random numbers of its own: {listed(drawn)}",
                "each rank would go on in them where it stands: draw from those of torch, numpy or random themselves, "
                "which are seeded for each shard",
            )


class _Names(NamedTuple):
    """Who changed."""

    state: list[str]
    generators: list[str]


@dataclass(slots=True)
class _Kept:
    """Counts changes of what `now` gives, by name."""

    now: Callable[[], dict[str, Hashable]]
    losses: int = 0
    before: dict[str, Hashable] = field(default_factory=dict)
    numbers: Counter[str] = field(default_factory=Counter)
    things: Counter[str] = field(default_factory=Counter)
    generators: Counter[str] = field(default_factory=Counter)
    told: set[str] = field(default_factory=set)

    def begin(self) -> None:
        self.before = self.now()

    def end(self) -> None:
        """A flag that changes once is enough."""
        self.losses += 1
        for name, value in self.now().items():
            if name not in self.before or self.before[name] != value:
                self._of(value)[name] += _TWICE if isinstance(value, bool) else 1

    def forget(self) -> None:
        self.losses = 0
        for changes in (self.numbers, self.things, self.generators):
            changes.clear()

    def conclude(self) -> _Names:
        """Those that were not told before; what changed in all losses but the first may have been set up there."""
        enough = max(_WATCHED, self.losses) - 1
        numbers = self._fresh(self.numbers, _TWICE)
        found = _Names(numbers + self._fresh(self.things, enough), self._fresh(self.generators, enough))
        self.forget()
        return found

    def _of(self, value: Hashable) -> Counter[str]:
        if isinstance(value, Drawn):
            return self.generators
        return self.numbers if isinstance(value, int | float | str) else self.things

    def _fresh(self, changes: Counter[str], least: int) -> list[str]:
        fresh = [name for name, times in changes.items() if times >= least and name not in self.told]
        self.told.update(fresh)
        return fresh
