"""Numbers and flags that a forward keeps in plain attributes: no checkpoint has them, and a rank counts for itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from samestep.train.observe.guards.check import Check, Finding, Subject, listed

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # `training` has a check of its own
_TWICE = 2  # a number that changes once is what was cached, such as a length


class PlainAttributes(Check):
    """Compares int, float and bool attributes of all modules before and after each loss."""

    def __init__(self, subject: Subject) -> None:
        self._model = subject.model
        self._before: dict[str, Any] = {}
        self._changes: Counter[str] = Counter()
        self._told: set[str] = set()

    def before_loss(self, batch: Any, samples: int) -> tuple[()]:  # noqa: ARG002
        """Remember them."""
        self._before = dict(_attributes(self._model))
        return ()

    def after_loss(self) -> tuple[()]:
        """Count who changed; a flag once is enough."""
        for name, value in _attributes(self._model):
            if not _same(self._before.get(name), value):
                self._changes[name] += _TWICE if isinstance(value, bool) else 1
        return ()

    def forget(self) -> None:
        """What was counted belongs to steps that are done again."""
        self._changes.clear()

    def conclude(self) -> Iterator[Finding]:
        """Name them."""
        kept = [name for name, times in self._changes.items() if times >= _TWICE and name not in self._told]
        self._changes.clear()
        self._told.update(kept)
        if kept:
            yield Finding(
                f"the loss changes plain attributes of the model: {listed(kept)}",
                "no checkpoint has them, and a rank changes them once a shard: keep them by register_buffer, or derive "
                "them from the batch; fine where forward sets them before it reads them",
            )


def _attributes(model: nn.Module) -> Iterator[tuple[str, int | float | bool]]:
    """By path; torch's own modules may keep what they like in private ones."""
    for path, module in model.named_modules():
        of_torch = type(module).__module__.startswith("torch.")
        for key, value in vars(module).items():
            if not isinstance(value, int | float) or key in _OF_EVERY_MODULE or (of_torch and key.startswith("_")):
                continue
            yield f"{path or type(model).__name__}.{key}", value


def _same(one: Any, other: int | float) -> bool:
    return bool(one == other) or (one != one and other != other)  # NaN is no change
