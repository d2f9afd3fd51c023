"""What a check is: it looks before and after each loss and each step, and says what it found.

A finding that can't be meant is fatal; all others are warnings, told once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from samestep.train.parallel.shards import StepPlan


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence on what is wrong and one with the fix; `text` is the same in each step in which it is found.

    `at_once`: a fatal one of a loss after which backward may fail, in words of torch's own that name another mistake.
    """

    text: str
    hint: str
    fatal: bool = False
    at_once: bool = False


Findings = Iterable[Finding]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at: the model that was built, not the one wrapped for other ranks."""

    model: nn.Module
    optimizer: Optimizer
    loss: Any = None
    scheduler: Any = None
    scheduler_interval: str = "step"
    collate_fn: Any = None

    @property
    def hooked(self) -> list[tuple[str, nn.Module]]:
        """Modules whose forward may be hooked: none of a compiled model, whose graphs and bits hooks would change."""
        modules = list(self.model.named_modules())
        compiled = any(_is_compiled(module) for _, module in modules)
        return [] if compiled else modules


def _is_compiled(module: nn.Module) -> bool:
    """By `module.compile()` or by `torch.compile(module)`."""
    return module._compiled_call_impl is not None or "OptimizedModule" in type(module).__name__


class Check:
    """Looks nowhere and finds nothing; a check overrides the moments that it needs."""

    def before_step(self, plan: StepPlan) -> Findings:  # noqa: ARG002
        """Nothing of the step has been done."""
        return ()

    def before_loss(self, batch: Any, samples: int) -> Findings:  # noqa: ARG002
        """A shard's batch is on the device, its random streams are seeded."""
        return ()

    def after_loss(self) -> Findings:
        """The loss has returned; there was no backward yet."""
        return ()

    def after_step(self, plan: StepPlan) -> Findings:  # noqa: ARG002
        """The weights are updated, the gradients are still there."""
        return ()

    def forget(self) -> None:
        """The run went back to an earlier state: the next step does not follow on the last one."""

    def conclude(self) -> Findings:
        """As many steps as a conclusion needs have been looked at since the last one."""
        return ()

    def close(self) -> None:
        """Nothing will be looked at any more: take hooks away."""


class _NoHook:
    """Of an optimizer that takes none, since it left out Optimizer.__init__."""

    def remove(self) -> None:
        """Nothing."""


def hooked_update(register: Callable[[Any], Any], hook: Callable[..., None]) -> Any:
    """What `register_step_pre_hook` or `register_step_post_hook` of an optimizer returns, where it works."""
    try:
        return register(hook)
    except AttributeError:
        return _NoHook()


def listed(names: Iterable[str], most: int = 3) -> str:
    """`a, b, c and 4 more`."""
    known = list(names)
    rest = len(known) - most
    return ", ".join(known[:most]) + (f" and {rest} more" if rest > 0 else "")
