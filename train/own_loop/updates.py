"""Updates in a loop of one's own come after a pass and find its gradients; others are named, for they train nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from samestep.launcher.contract import UsageError
from samestep.train import direct
from samestep.train.own_loop.gradients import ShardGradients


def watch_updates(
    keep: Mapping[str, Any], gradients: Sequence[ShardGradients], warn: Callable[[str], None]
) -> list[Callable[[], None]]:
    """Look at each `step()` of the optimizers in `keep` before it begins; the answer's functions end that.

    The update itself is torch's, without the entry that would import its compiler for the first one (see `direct`).
    """
    parts = [(name, part) for name, part in keep.items() if isinstance(part, Optimizer)]
    return [_Watched(name, part, gradients, warn).end for name, part in parts]


class _Watched:
    """Stands in an optimizer's place for `step`."""

    def __init__(
        self, name: str, optimizer: Optimizer, gradients: Sequence[ShardGradients], warn: Callable[[str], None]
    ) -> None:
        self._name, self._optimizer, self._gradients, self._warn = name, optimizer, gradients, warn
        self._warned = False
        self._own = optimizer.__dict__.get("step")  # a scheduler's, which notes that it was called
        self._before: Callable[..., Any] = optimizer.step
        if hasattr(self._own, "_wrapped_by_lr_sched"):
            self._wrapped_by_lr_sched = True  # schedulers look for it
        optimizer.step = self  # type: ignore[method-assign]

    def end(self) -> None:
        """Put back what was there, unless somebody else has put something there since."""
        if self._optimizer.__dict__.get("step") is self:
            del self._optimizer.step
            if self._own is not None:
                self._optimizer.step = self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(each.under_way for each in self._gradients):
            raise UsageError(
                f"keep[{self._name!r}] is expected to step after a pass, but did so between its batches",
                f"move {self._name}.step() out of the for over the batches: gradients are there when it is through",
            )
        if args or kwargs:
            return self._before(*args, **kwargs)
        self._look_for_gradients()
        direct.step_as(self._optimizer, self._own)
        return None

    def _look_for_gradients(self) -> None:
        if self._warned or any(each.weightless for each in self._gradients):
            return
        if all(parameter.grad is None for group in self._optimizer.param_groups for parameter in group["params"]):
            self._warned = True
            self._warn(
                f"keep[{self._name!r}] steps without gradients, and so changes nothing: leave out zero_grad() between "
                "a pass and the step; none is needed"
            )
