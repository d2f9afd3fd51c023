"""The parts of `Components`, each judged by its kind alone: what it is, and whether it can be called as it will be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import nn
from torch.optim import Optimizer

from samestep.launcher.contract import UsageError
from samestep.train.recipe import Components
from samestep.train.state_metrics import StateMetric


def check_parts(components: Components) -> None:
    """Judge all but the model and the data.

    Raises:
        UsageError: one is of another kind than Components says.
    """
    check_loss("Components.loss", components.loss)
    if not isinstance(components.optimizer, Optimizer):
        raise UsageError(
            f"Components.optimizer is expected to be a torch optimizer, but is {kind(components.optimizer)}",
            "make one from the model: torch.optim.Adam(model.parameters(), lr=1e-3); it may have parameter groups",
        )
    _check_scheduler(components.scheduler, components.optimizer)
    if components.collate_fn is not None:
        if not callable(components.collate_fn):
            raise UsageError(
                f"Components.collate_fn is expected to be a function, but is {kind(components.collate_fn)}",
                "def collate(samples): … makes a batch of a list of samples; None is torch's default_collate",
            )
        require_arguments("collate_fn", components.collate_fn, "samples")
    if not isinstance(components.metrics, Mapping):
        raise UsageError(
            f"Components.metrics is expected to be a dict from names to functions, but is {kind(components.metrics)}",
            "metrics={'accuracy': accuracy}",
        )
    for name, function in components.metrics.items():
        if not isinstance(name, str):
            raise UsageError(f"a name in Components.metrics is expected to be a string, but is {name!r}")
        if name == "loss":
            raise UsageError(
                "a name in Components.metrics is expected to be another one than loss, which evaluations have already",
                "leave it out, or call it after what it measures",
            )
        if (keeps := StateMetric.of(function)) is not None:
            keeps.refuse_states_elsewhere(name)
        else:
            check_loss(f"metric {name}", function)


def check_loss(name: str, function: object) -> None:
    """Judge a function of model and batch.

    Raises:
        UsageError: it is none, or one of outputs and targets, as criteria are.
    """
    if isinstance(function, type) or not callable(function):
        raise UsageError(
            f"{name} is expected to be a function of (model, batch), but is {kind(function)}",
            "wrap a criterion: supervised(nn.MSELoss())",
        )
    if isinstance(function, nn.modules.loss._Loss) or getattr(function, "__module__", "") == F.__name__:
        criterion = getattr(function, "__name__", f"{type(function).__name__}()")
        raise UsageError(
            f"{name} is expected to be a function of (model, batch), but is the criterion {criterion}",
            f"wrap it for batches (x, y): supervised({criterion})",
        )
    require_arguments(name, function, "model", "batch")


def require_arguments(name: str, function: Callable[..., Any], *arguments: str) -> None:
    """See whether `function` can be called with so many positional arguments; what tells no signature passes.

    Raises:
        UsageError: it can't.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        wanted = ", ".join(arguments)
        raise UsageError(
            f"{name} is expected to be called with ({wanted}), but takes {signature}",
            f"take just these: def {_own_name(function)}({wanted}): …",
        ) from None


def _own_name(function: object) -> str:
    name = getattr(function, "__name__", "")
    return name if name.isidentifier() else "function"


def kind(value: object) -> str:
    """`the class Net`, `an object of Net`, or `None`."""
    if value is None:
        return "None"
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of {type(value).__name__}"


def _check_scheduler(scheduler: Any, optimizer: Optimizer) -> None:
    if scheduler is None:
        return
    if isinstance(scheduler, type) or not callable(getattr(scheduler, "step", None)):
        raise UsageError(
            f"Components.scheduler is expected to be a torch scheduler, but is {kind(scheduler)}",
            "make one from the optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10); several are one SequentialLR",
        )
    for method in ("state_dict", "load_state_dict"):
        if not callable(getattr(scheduler, method, None)):
            raise UsageError(
                f"Components.scheduler is expected to have {method}, but {type(scheduler).__name__} has none: "
                "a resumed run would begin its schedule anew",
                "derive it from torch.optim.lr_scheduler.LRScheduler, or write state_dict() and load_state_dict(state)",
            )
    other = getattr(scheduler, "optimizer", None)
    if not isinstance(other, Optimizer):
        return
    if not {id(group) for group in other.param_groups} & {id(group) for group in optimizer.param_groups}:
        raise UsageError(
            f"Components.scheduler is expected to set the learning rates of Components.optimizer, but "
            f"{type(scheduler).__name__} was made from another {type(other).__name__}",
            "make the scheduler from the optimizer that Components gets",
        )
