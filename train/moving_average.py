"""`Components.ema`: weights that follow the model's, on every rank alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class MovingAverage(AveragedModel):
    """torch's exponential moving average, with the same bits; buffers are kept as the model's.

    torch brings the number of updates to the GPU in each of them, for which the host waits, and does not use it there.

    Raises:
        ValueError: `decay` is not between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._follow = get_ema_multi_avg_fn(decay)
        super().__init__(model, multi_avg_fn=self._follow)

    def update_parameters(self, model: nn.Module) -> None:
        """Go a step after the model's weights; the first time, copy them."""
        if not int(self.n_averaged):  # on the host
            super().update_parameters(model)
            return
        kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for average, weight in zip(self.module.parameters(), model.parameters(), strict=True):
            averages, weights = kinds.setdefault(average.dtype, ([], []))
            averages.append(average.detach())
            weights.append(weight.detach())
        for averages, weights in kinds.values():
            self._follow(averages, weights, 0)
        for mine, its in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(its)
        self.n_averaged += 1
