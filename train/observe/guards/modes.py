"""Modules that are not in training mode when they train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from samestep.train.observe.guards.check import Check, Finding, Subject, listed
from samestep.train.parallel.shards import StepPlan


class TrainingMode(Check):
    """The loop calls `model.train()`; whoever switches a module later changes the shards that come after."""

    def __init__(self, subject: Subject) -> None:
        self._model = subject.model
        self._evaluated = False  # the loss has run the model in eval mode, with gradients
        self._training = False
        self._expected: dict[str, bool] | None = None
        self._before: dict[str, bool] = {}
        self._hooks = [module.register_forward_pre_hook(self._on_forward) for _, module in subject.hooked[:1]]

    def before_step(self, plan: StepPlan) -> Iterator[Finding]:  # noqa: ARG002
        """Compare with the first step."""
        now = _modes(self._model)
        if self._expected is None:
            self._expected = now
            still = [name for name, training in now.items() if not training]
            if still:
                yield Finding(
                    f"{listed(still)} of the model stays in eval mode while it trains",
                    "fine if its train() is overridden on purpose, such as for frozen BatchNorm",
                )
        elif now != self._expected:
            yield Finding(
                f"{_named(self._expected, now)} of the model changed between steps from training to eval mode or back",
                "evaluation switches modes itself: drop model.eval() and model.train() elsewhere",
            )
            self._expected = now

    def before_loss(self, batch: Any, samples: int) -> tuple[()]:  # noqa: ARG002
        """Remember the modes."""
        self._before, self._training, self._evaluated = _modes(self._model), True, False
        return ()

    def after_loss(self) -> Iterator[Finding]:
        """Every shard has to find the model as the one before did."""
        self._training = False
        now = _modes(self._model)
        if now != self._before:
            yield Finding(
                f"the loss is expected to leave modules in the mode they were in, but {_named(self._before, now)} "
                "changed between training and eval mode",
                "drop model.eval() and model.train() from the loss: the next shards would train in another mode",
                fatal=True,
            )
        elif self._evaluated:
            yield Finding(
                "the loss runs the model in eval mode, with gradients: Dropout and BatchNorm do not train",
                "drop model.eval() from the loss",
            )

    def close(self) -> None:
        """Take the hook away."""
        for hook in self._hooks:
            hook.remove()

    def _on_forward(self, module: nn.Module, inputs: Any) -> None:  # noqa: ARG002
        self._evaluated |= self._training and not module.training and torch.is_grad_enabled()


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name or type(model).__name__: module.training for name, module in model.named_modules()}


def _named(before: dict[str, bool], now: dict[str, bool]) -> str:
    return listed(name for name in now if before.get(name) != now[name])
