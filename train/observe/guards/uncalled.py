"""Hooks of tensors in between that backward does not come to among several shards, since no parameter is behind them.

Those of inputs and modules leave a trace in the graph (see missing_gradients), these are seen when registered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from samestep.train.observe.guards.check import Check, Finding, Subject
from samestep.train.parallel.missing_gradients import leads_to
from samestep.train.parallel.shards import StepPlan

_register: Callable[..., Any] = Tensor.register_hook


class UncalledHooks(Check):
    """Listens to `Tensor.register_hook` while a loss is computed."""

    def __init__(self, subject: Subject) -> None:
        self._model = subject.model
        self._compiled = not subject.hooked
        self._single = True
        self._hooked: list[Tensor] = []

    def before_step(self, plan: StepPlan) -> tuple[()]:
        """One shard has the backward of torch."""
        self._single = plan.shards == 1
        return ()

    def before_loss(self, batch: Any, samples: int) -> tuple[()]:  # noqa: ARG002
        """Listen."""
        if not (self._single or self._compiled):
            hooked = self._hooked

            def noting(tensor: Tensor, hook: Callable[..., Any]) -> Any:
                hooked.append(tensor)
                return _register(tensor, hook)

            torch.Tensor.register_hook = noting  # type: ignore[method-assign]
        return ()

    def after_loss(self) -> Iterator[Finding]:
        """Judge those that are no leaves."""
        self.close()
        hooked = [tensor for tensor in self._hooked if tensor.grad_fn is not None]
        self._hooked.clear()
        parameters = list(self._model.parameters()) if hooked else []
        if not all(leads_to(tensor, parameters) for tensor in hooked):
            yield Finding(
                "backward does not come to hooks of tensors that depend on no parameter, where gradients of several "
                "shards are summed, but the loss registers one",
                "register it with a result of the first layer, or ask torch.autograd.grad for that gradient in the "
                "loss; fine where that alone is to call the hook",
            )

    def close(self) -> None:
        """Listen no more."""
        torch.Tensor.register_hook = _register  # type: ignore[method-assign]
