"""`supervised(criterion)`: the loss of batches `(x, y)`, weighed as the criterion itself weighs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from samestep.launcher.contract import UsageError
from samestep.train.recipe import LossOutput, Weighted

_OF_TORCH = (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)


class supervised:  # noqa: N801 (used like a function)
    """`loss(model, batch)` for batches `(x, y)` and a criterion of torch, a module or its functional form.

    Reduction `mean` weighs a batch by its samples, or by the criterion's true denominator where class weights or
    `ignore_index` make that another number; `none` averages the other dimensions of each sample. A criterion with a
    forward of its own has a mean over samples, whatever class it is derived from.

    Raises:
        UsageError: the criterion sums, so the weight of a batch can't be known, or it is none; a batch is no pair.
    """

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        _require_criterion(criterion)
        self.criterion = _as_module(criterion)
        self._device: torch.device | None = None
        given = getattr(self.criterion, "keywords", {})  # of a functools.partial
        if getattr(self.criterion, "reduction", given.get("reduction", "mean")) == "sum":
            raise UsageError(
                f"supervised() is expected to get a criterion with reduction 'mean' or 'none', "
                f"but {type(self.criterion).__name__} has 'sum'",
                "pass reduction='mean' (or 'none'); samestep itself weighs batches exactly",
            )
        self._summed = _sum_form(self.criterion)

    def __call__(self, model: Any, batch: Any) -> LossOutput:
        """Run the model on x and compare with y."""
        if isinstance(batch, Tensor | Mapping) or (isinstance(batch, tuple | list) and len(batch) != 2):
            raise _no_pair(batch)
        x, y = batch
        output = model(x)
        if isinstance(output, Tensor) and output.device != self._device:
            self._follow(output.device)
        if self._summed is not None:
            return Weighted(self._summed(output, y), _denominator(self._summed, y))
        loss: Tensor = self.criterion(output, y)
        return loss.flatten(1).mean(1) if loss.dim() > 1 else loss

    def _follow(self, device: torch.device) -> None:
        """Class weights go where the model is."""
        self._device = device
        if isinstance(self.criterion, nn.Module):
            self.criterion.to(device)


def _require_criterion(criterion: object) -> None:
    if isinstance(criterion, type) or not callable(criterion):
        what = f"the class {criterion.__name__}" if isinstance(criterion, type) else type(criterion).__name__
        raise UsageError(
            f"supervised() is expected to get a criterion of (output, y), but got {what}",
            "make one: supervised(nn.MSELoss()), or pass a function such as F.mse_loss",
        )


def _as_module(criterion: Any) -> Any:
    """Functional forms whose mean is not over samples as the module that says what it is over."""
    function, options = criterion, {}
    if isinstance(criterion, functools.partial) and not criterion.args:
        function, options = criterion.func, criterion.keywords
    if function is F.cross_entropy:
        return nn.CrossEntropyLoss(**options)
    return nn.NLLLoss(**options) if function is F.nll_loss else criterion


def _sum_form(criterion: Any) -> nn.Module | None:
    """Criteria whose mean is not over samples are summed instead: 0/0 has no mean, but a sum and a weight of zero.

    A subclass with a forward of its own need not heed `reduction`, nor divide as torch does: its mean is over samples.
    """
    if not isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss) or criterion.reduction != "mean":
        return None
    if getattr(criterion.forward, "__func__", None) not in _OF_TORCH:
        return None
    summed = copy.copy(criterion)
    summed.reduction = "sum"
    return summed


def _denominator(criterion: Any, y: Tensor) -> Tensor | int:
    """What torch divides by for reduction `mean` (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss: section Shape)."""
    if y.is_floating_point():  # class probabilities: the mean is over samples and positions, weights are inside
        return y.numel() // y.shape[1] if y.dim() > 1 else 1
    counted: Tensor = y != criterion.ignore_index
    if criterion.weight is None:
        return counted.sum()
    return torch.where(counted, criterion.weight.to(y.device)[y.where(counted, 0)], 0.0).sum(dtype=torch.float64)


def _no_pair(batch: Any) -> UsageError:
    count = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
    return UsageError(
        f"supervised() is expected to get a batch (x, y), but the batch is a {type(batch).__name__}{count}",
        "write the loss yourself: def loss(model, batch): … return F.cross_entropy(model(batch['x']), batch['y'])",
    )
