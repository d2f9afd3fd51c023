"""`Components.ema`: weights that follow the model's, on every rank alike."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from samestep.launcher.contract import UsageError
from samestep.train.state.held import HeldParts


class MovingAverage(AveragedModel):
    """torch's exponential moving average, with the same bits; buffers are kept as the model's.

    torch brings the number of updates to the GPU in each of them, for which the host waits, and does not use it there.

    Raises:
        ValueError: `decay` is not between 0 and 1.
        UsageError: the model can't be copied; names the module.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._follow = get_ema_multi_avg_fn(decay)
        held = HeldParts(model)
        try:
            super().__init__(model, multi_avg_fn=self._follow)
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            raise _not_copied(model) from error
        self._held = held

    def update_parameters(self, model: nn.Module) -> None:
        """Go a step after the model's weights; the first time, copy them.

        Raises:
            UsageError: a forward has made the model into one with other weights.
        """
        try:
            self._update(model)
        except (ValueError, RuntimeError):
            self._held.require_same()
            raise

    def _update(self, model: nn.Module) -> None:
        if not int(self.n_averaged):  # on the host
            for average, weight in zip(self.module.parameters(), model.parameters(), strict=True):
                average.detach().copy_(weight.detach())
            self._take_buffers(model)
            self.n_averaged += 1
            return
        kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for average, weight in zip(self.module.parameters(), model.parameters(), strict=True):
            averages, weights = kinds.setdefault(average.dtype, ([], []))
            averages.append(average.detach())
            weights.append(weight.detach())
        for averages, weights in kinds.values():
            self._follow(averages, weights, 0)
        self._take_buffers(model)
        self.n_averaged += 1

    def _take_buffers(self, model: nn.Module) -> None:
        """As the model has them now; a forward may have put one of another shape there, or a layer without weights."""
        ours = dict(self.module.named_modules())
        for path, its in model.named_modules():
            if path not in ours:
                continue
            mine = ours[path]
            for name, buffer in its._buffers.items():
                own = mine._buffers.get(name)
                if buffer is None or own is None or own.shape != buffer.shape or 0 in own.stride():
                    mine._buffers[name] = None if buffer is None else buffer.detach().clone()
                else:
                    own.copy_(buffer)


def _not_copied(model: nn.Module) -> UsageError:
    """Which module is to blame: one without such a child."""
    name, module = "", model
    while inner := [child for child in module.named_children() if not _copies(child[1])]:
        name, module = f"{name}.{inner[0][0]}".lstrip("."), inner[0][1]
    return UsageError(
        f"the model is expected to be one that copy.deepcopy copies, since Components.ema keeps an average of it, but "
        f"{name or 'the whole of it'} ({type(module).__name__}) is not",
        "leave ema out; for torch.nn.utils.weight_norm, take torch.nn.utils.parametrizations.weight_norm",
    )


def _copies(module: nn.Module) -> bool:
    try:
        copy.deepcopy(module)
    except Exception:  # noqa: BLE001 (whatever a class raises)
        return False
    return True
