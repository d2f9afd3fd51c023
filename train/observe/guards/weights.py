"""Weights and buffers that somebody else than the optimizer changes, found by sums of their bits (no copy is kept)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from samestep.launcher.contract import UsageError
from samestep.train.observe.guards.check import Check, Finding, Subject, hooked_update, listed
from samestep.train.parallel.fingerprint import sum_of_bits
from samestep.train.parallel.shards import StepPlan


class Marks:
    """The sum of bits of each named tensor, at one moment."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        real = {name: tensor.detach() for name, tensor in tensors.items() if not tensor.is_meta}
        device = next((tensor.device for tensor in real.values()), None)
        self.names = list(real)
        self.sums = [sum_of_bits(tensor).to(device) for tensor in real.values()]

    def changed(self, later: Marks) -> list[str]:
        """Names of tensors with other bits."""
        if self.names != later.names or not self.names:
            return sorted(set(self.names) ^ set(later.names))
        different = torch.stack(self.sums) != torch.stack(later.sums)
        return [name for name, other in zip(self.names, different.tolist(), strict=True) if other]


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights alone."""
    return dict(model.named_parameters())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers."""
    return parameters_of(model) | dict(model.named_buffers())


class OutsideChanges(Check):
    """From one update to the next loss nothing changes; a loss may change buffers (BatchNorm does), but no weights.

    Weights that change in a second loss of a step too are those of no number of ranks; a bound that the first one has
    brought about may be meant. The optimizer itself has no business in a loss, whatever it finds to do there.
    """

    def __init__(self, subject: Subject) -> None:
        self._model = subject.model
        self._losses = 0  # of this rank in this step
        self._in_loss = self._stepped = False
        self._updated: Marks | None = None
        self._before_loss = Marks({})
        self._hook = hooked_update(subject.optimizer.register_step_post_hook, self._on_updated)

    def before_step(self, plan: StepPlan) -> tuple[()]:  # noqa: ARG002
        """Count anew."""
        self._losses = 0
        return ()

    def before_loss(self, batch: Any, samples: int) -> Iterator[Finding]:  # noqa: ARG002
        """Compare with the end of the last update, in the first shard of a step."""
        self._before_loss = Marks(parameters_of(self._model))
        self._in_loss, self._stepped = True, False
        updated, self._updated = self._updated, None
        changed = updated.changed(Marks(state_of(self._model))) if updated is not None else []
        if changed:
            yield Finding(
                f"{listed(changed)} of the model changed between two steps, outside of the optimizer",
                "a change between steps comes at other moments in a resumed run: do it in forward, or in the optimizer",
            )

    def after_loss(self) -> Iterator[Finding]:
        """Compare with before."""
        self._losses += 1
        self._in_loss = False
        if self._stepped:
            yield Finding(
                "the loss is expected to leave the optimizer alone, but called its step()",
                "drop backward(), step() and zero_grad() from it: return the loss, and the step does the rest",
                fatal=True,
                at_once=True,
            )
            return
        changed = self._before_loss.changed(Marks(parameters_of(self._model)))
        if changed:
            yield Finding(
                f"the loss changes weights of the model itself: {listed(changed)}",
                "a rank calls it once a shard, so fewer ranks change them more often: do it in the optimizer, or in "
                "a parametrization of the layer, or keep them by register_buffer",
                fatal=self._losses > 1,
            )

    def forget(self) -> None:
        """Weights and buffers are those of the earlier state."""
        self._updated, self._in_loss = None, False

    def close(self) -> None:
        """Take the hook away."""
        self._hook.remove()

    def _on_updated(self, *_: Any) -> None:
        if self._in_loss:
            self._stepped = True
            return
        self._updated = Marks(state_of(self._model))


def unchanged(name: str, function: Callable[[Any, Any], Any], calls: int | None) -> Callable[[Any, Any], Any]:
    """A metric that must leave the model as it was, watched in its first `calls` calls, None for all.

    Raises:
        UsageError: from the call, if it did not.
    """
    left = calls

    @functools.wraps(function, updated=())
    def watched(model: Any, batch: Any) -> Any:
        nonlocal left
        if left == 0:
            return function(model, batch)
        left = None if left is None else left - 1
        before = Marks(state_of(model))
        result = function(model, batch)
        changed = before.changed(Marks(state_of(model)))
        if changed:
            raise UsageError(
                f"evaluation is expected to leave the model as it is, but the metric {name} changed {listed(changed)}",
                "drop model.train() and changes of weights from it; BatchNorm in training mode changes its statistics",
            )
        return result

    return watched
