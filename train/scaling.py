"""Half precision: where it computes, and what float16 needs so that small gradients do not vanish."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from samestep.launcher.contract import RefusedStepError
from samestep.train import direct

# A scale of one spares float16 any harm, and 2**-14, its smallest normal number, is 14 steps in a row below that.
LEAST_SCALE = 2.0**-14


def autocast_of(precision: str, device_type: str) -> AbstractContextManager[None]:
    """Around forward and loss: torch's autocast for `--precision`, or nothing."""
    if precision == "no":
        return nullcontext()
    autocast: AbstractContextManager[None] = torch.autocast(
        device_type, dtype=torch.float16 if precision == "fp16" else torch.bfloat16
    )
    return autocast


class Scaling(Protocol):
    """Used as scale, unscale, update in each step."""

    leaves_out: bool  # steps, in which the model's buffers have to be brought back

    def scale(self, loss: Tensor) -> Tensor:
        """What backward starts from."""

    def unscale(self, optimizer: Optimizer) -> None:
        """Leave the true gradients in the optimizer's parameters."""

    def update(self, optimizer: Optimizer) -> bool:
        """Let the optimizer step; False if it did not, because a gradient is not finite.

        Raises:
            RefusedStepError: no gradient has been finite for so long that none will be.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class Unscaled:
    """In float32 and bfloat16 a gradient is what it is."""

    leaves_out = False

    def scale(self, loss: Tensor) -> Tensor:
        """The loss itself."""
        return loss

    def unscale(self, optimizer: Optimizer) -> None:
        """They are true."""

    def update(self, optimizer: Optimizer) -> bool:
        """Always."""
        direct.step(optimizer)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


class LossScaling:
    """torch's GradScaler, which follows the gradients' size.

    It makes its state when it first scales a loss. A rank without a sample scales none, and unscales all the same.
    Where a step brings the optimizer no gradient there is nothing to look at, which torch's takes for a mistake.
    """

    leaves_out = True

    def __init__(self, device: str) -> None:
        self._scaler = GradScaler(device)
        self._scaler.scale(torch.zeros((), device=device))

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale of now."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide by the scale, and note whether all are finite."""
        if _has_gradients(optimizer):
            self._scaler.unscale_(optimizer)

    def update(self, optimizer: Optimizer) -> bool:
        """See Scaling; the scale falls where a step is left out.

        Raises:
            RefusedStepError: the scale fell below `LEAST_SCALE`, since no step was finite for too long.
        """
        if not _has_gradients(optimizer):
            direct.step(optimizer)
            return True
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        after = self._scaler.get_scale()
        if after < LEAST_SCALE:
            raise _never_finite(after)
        return after >= before

    def state_dict(self) -> dict[str, Any]:
        """Scale and growth."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Scaling; a run that had no scale before begins with the first one."""
        if state:
            self._scaler.load_state_dict(state)


def scaling(precision: str, device: str) -> Scaling:
    """What `--precision` needs."""
    return LossScaling(device) if precision == "fp16" else Unscaled()


def _never_finite(scale: float) -> RefusedStepError:
    return RefusedStepError(
        f"the loss scale of --precision fp16 is expected to stay above {LEAST_SCALE:.2g}, but fell to {scale:.2g}: "
        "a loss or gradient was NaN or infinite in step after step, and none of these was an update",
        "look at the samples and at the learning rate; --precision bf16 needs no scale, and has --nan-policy",
        consequence=False,
    )
