"""What a recipe hands to `train`: plain PyTorch objects, and a loss that says how much each batch weighs.

A step's objective is sum(w_i * l_i) / sum(w_i) over the global batch, exactly, however the batch is cut: a loss
therefore returns its unnormalised total together with its weight, or something from which both follow (`weigh`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from samestep.launcher.contract import UsageError

Number = int | float | bool


@dataclass(slots=True)
class Weighted:
    """A batch's unnormalised loss and its weight.

    Attributes:
        total: scalar tensor with gradient, sum of w_i * l_i over the batch.
        weight: sum of w_i: a number, or an int, bool or float scalar tensor; 0 for a batch without anything to learn,
            never below. A tensor is judged where losses are read (see Ledger), so that no step waits for it.
        log: extra scalars to report, averaged over the global batch with the same weights.
    """

    total: Tensor
    weight: Tensor | Number
    log: Mapping[str, Tensor | Number] = field(default_factory=dict)


@dataclass(slots=True)
class SampleWeighted:
    """Weighed by the number of samples, which every rank can compute without asking.

    Attributes:
        weight: the samples.
        output: what the loss returned: a mean, from which backward starts with one shard as in any loop, or its sum.
        is_mean: which of the two.
    """

    weight: int
    output: Tensor
    is_mean: bool
    log: ClassVar[Mapping[str, Tensor | Number]] = {}

    @property
    def total(self) -> Tensor:
        """As that of Weighted; that of a mean is float64 and has no gradient."""
        return self.output.detach().double() * self.weight if self.is_mean else self.output

    def read(self) -> float:
        """The same number, read from the device."""
        value: float = self.output.item()
        return value * self.weight if self.is_mean else value


Outcome = Weighted | SampleWeighted
LossOutput = Tensor | Weighted
Loss = Callable[[Any, Any], LossOutput]


@dataclass(kw_only=True)
class Components:
    """What `build(config)` returns.

    Attributes:
        model: on any device; it is moved, and wrapped in DistributedDataParallel.
        loss: `loss(model, batch)` gets the model itself, on any number of ranks, and returns per-sample losses
            `(n,)`, a scalar mean over the batch, or `Weighted`.
        optimizer: any torch optimizer over parameters of `model`, used as written.
        train_data: a map-style dataset (`__len__` and `__getitem__`), or a tensor or numpy array.
        eval_data: the same, for evaluation; every sample counts exactly once.
        collate_fn: list of samples -> batch; torch's `default_collate` if None.
        scheduler: any torch scheduler; None for a constant learning rate.
        scheduler_interval: when `scheduler.step()` is called: after each optimizer step or each epoch.
            ReduceLROnPlateau is always stepped after an evaluation, with `plateau_metric`.
        plateau_metric: "loss" or a name of `metrics`.
        metrics: name -> function of (model, batch) with the loss's return forms, averaged over `eval_data`; or a
            torchmetrics metric, updated with `(model(x), y)` (see `StateMetric` for other batches).
        ema: decay of an exponential moving average of the weights, which is then what is evaluated and exported.
        find_unused_parameters: whether some step may leave a parameter without gradient; None: found in the first step.
    """

    model: nn.Module
    loss: Loss
    optimizer: Optimizer
    train_data: Dataset[Any] | Any
    eval_data: Dataset[Any] | Any | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    scheduler: LRScheduler | None = None
    scheduler_interval: Literal["step", "epoch"] = "step"
    plateau_metric: str = "loss"
    metrics: Mapping[str, Any] = field(default_factory=dict)
    find_unused_parameters: bool | None = None
    ema: float | None = None


def weigh(output: LossOutput, samples: int, name: str = "loss") -> Outcome:
    """Bring what a loss or metric returned for a batch of `samples` into the form total and weight.

    Raises:
        UsageError: it is no tensor, has the wrong shape, is complex, holds more than numbers in its `log`, or weighs
            less than nothing.
    """
    if isinstance(output, Tensor):
        _require_real(output, name)
        return _by_samples(output, samples, name)
    if not isinstance(output, Weighted):
        raise UsageError(
            f"{name} is expected to return a tensor or Weighted, but returned {type(output).__name__}",
            _way_back(output),
        )
    for part, value in (("total", output.total), ("weight", output.weight)):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise UsageError(f"{name}: Weighted.{part} is expected to be a scalar, but has shape {tuple(value.shape)}")
    if not isinstance(output.total, Tensor):
        raise UsageError(
            f"{name}: Weighted.total is expected to be a tensor, but is {type(output.total).__name__}",
            "pass the summed loss itself, without .item()",
        )
    _require_real(output.total, f"{name}: Weighted.total")
    weight = _weight(output.weight, name)
    if weight is output.weight and not output.log:
        return output
    return Weighted(output.total, weight, _scalars(output.log, name))


def _way_back(output: object) -> str:
    if output is None:
        return "return the criterion's tensor at its end"
    if isinstance(output, tuple | list | Mapping):
        return "return the loss alone; what else is to be reported goes into Weighted(total, weight, log={…})"
    return "return the criterion's tensor itself, without .item()"


def _weight(weight: object, name: str) -> Tensor | Number:
    """The same; a number of numpy as Python's."""
    if isinstance(weight, Tensor):
        return weight
    if isinstance(weight, int | float):
        if not 0 <= weight < math.inf:
            raise unusable_weight(weight, name)
        return weight
    if not isinstance(weight, Real):
        raise UsageError(
            f"{name}: Weighted.weight is expected to be a number or a tensor, but is {type(weight).__name__}",
            "it is what the mean divides by, such as the number of samples or tokens",
        )
    return _weight(float(weight), name)


def unusable_weight(weight: float, name: str) -> UsageError:
    """What the mean can't divide by: the run would maximise, or stand still."""
    return UsageError(
        f"{name}: Weighted.weight is expected to be 0 or more and finite, but is {weight}",
        "it is what the mean divides by, such as the number of samples or tokens; to maximise, negate the total",
    )


def _scalars(log: Mapping[str, Any], name: str) -> dict[str, Tensor | Number]:
    """The same; numbers of numpy as Python's."""
    if not isinstance(log, Mapping):
        raise UsageError(
            f"{name}: Weighted.log is expected to be a dict from names to scalars, but is {type(log).__name__}"
        )
    for key, value in log.items():
        if isinstance(value, Tensor):
            wrong = f"has shape {tuple(value.shape)}" if value.numel() != 1 else ""
        else:
            wrong = "" if isinstance(value, Real) else f"is {type(value).__name__}"
        if wrong:
            raise UsageError(
                f"{name}: Weighted.log[{key!r}] is expected to be a scalar, but {wrong}", "log the mean over the batch"
            )
    return {key: value if isinstance(value, Tensor | int | float) else float(value) for key, value in log.items()}


def _require_real(output: Tensor, name: str) -> None:
    if output.is_complex():
        raise UsageError(
            f"{name} is expected to be real, but is {output.dtype}",
            "take its .abs() or .real: complex numbers have no order",
        )


def _by_samples(output: Tensor, samples: int, name: str) -> SampleWeighted:
    if output.dim() == 0:
        return SampleWeighted(samples, output, is_mean=True)
    if output.shape == (samples,):
        return SampleWeighted(samples, _floating(output).sum(), is_mean=False)
    raise UsageError(
        f"{name} is expected to return shape ({samples},), a scalar mean or Weighted, "
        f"but returned shape {tuple(output.shape)}",
        "average the other dimensions, or return Weighted(total, weight)",
    )


def _floating(output: Tensor) -> Tensor:
    return output if output.is_floating_point() else output.double()


def objective(outcome: Outcome, batch_samples: int) -> Tensor:
    """What backward of one shard starts from.

    Where samples are the weights, their sum over the global batch is known and divides here, which costs nothing; other
    weights are known only after the forward of all shards, so the total stays as it is and the gradient is divided.
    """
    if isinstance(outcome, Weighted):
        return outcome.total
    if not outcome.is_mean:
        return outcome.output / batch_samples
    return outcome.output if outcome.weight == batch_samples else outcome.output * (outcome.weight / batch_samples)


def is_mean_of_nothing(outcome: Outcome) -> bool:
    """Whether what was returned for a batch without rows is a mean over them, which is NaN."""
    return isinstance(outcome, SampleWeighted) and not outcome.output.isfinite().all()


def require_gradient(total: Tensor) -> None:
    """Refuse a loss that can't be learned from.

    Raises:
        UsageError: the loss does not depend on any parameter.
    """
    if not total.requires_grad:
        raise UsageError(
            "loss is expected to depend on the model's parameters, but its result has no gradient",
            "look for .item(), .detach(), .data or torch.no_grad() between the model and the loss",
        )
