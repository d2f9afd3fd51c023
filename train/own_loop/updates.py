"""Updates in a loop of one's own come after a pass and find its gradients; others are named, for they train nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from samestep.launcher.contract import UsageError
from samestep.train.own_loop.gradients import ShardGradients


def watch_updates(
    keep: Mapping[str, Any], gradients: Sequence[ShardGradients], warn: Callable[[str], None]
) -> list[Callable[[], None]]:
    """Look at each `step()` of the optimizers in `keep` before it begins; the answer's functions end that."""
    parts = [(name, part) for name, part in keep.items() if isinstance(part, Optimizer)]
    return [part.register_step_pre_hook(_Watch(name, gradients, warn)).remove for name, part in parts]


class _Watch:
    def __init__(self, name: str, gradients: Sequence[ShardGradients], warn: Callable[[str], None]) -> None:
        self._name, self._gradients, self._warn = name, gradients, warn
        self._warned = False

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(each.under_way for each in self._gradients):
            raise UsageError(
                f"keep[{self._name!r}] is expected to step after a pass, but did so between its batches",
                f"move {self._name}.step() out of the for over the batches: gradients are there when it is through",
            )
        with_closure = bool(args) or kwargs.get("closure") is not None
        if self._warned or with_closure or any(each.weightless for each in self._gradients):
            return
        if all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"]):
            self._warned = True
            self._warn(
                f"keep[{self._name!r}] steps without gradients, and so changes nothing: leave out zero_grad() between "
                "a pass and the step; none is needed"
            )
