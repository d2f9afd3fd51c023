"""Parameters that a step leaves without a gradient though they should get one: why, as sentences."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from samestep.launcher.contract import UsageError

_REENTRANT = "CheckpointFunctionBackward"  # torch.utils.checkpoint's node, and those that were copied from it


def refuse_reentrant_checkpoints(total: Tensor) -> None:
    """Look through the graph of a loss for activations whose block runs its own backward to compute them again.

    torch.autograd.grad asks for the gradients of given parameters, and does not see those inside such a block.

    Raises:
        UsageError: there are some.
    """
    pending = [total.grad_fn]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node is None:
            continue
        if node.name() == _REENTRANT:
            raise UsageError(
                "activation checkpointing is expected not to be reentrant where gradients of several shards or ranks "
                "are summed, but the loss holds a checkpoint with use_reentrant=True, whose parameters would get none",
                "pass use_reentrant=False to torch.utils.checkpoint.checkpoint; the gradients are the same",
            )
        fresh = {following for following, _ in node.next_functions} - seen
        seen |= fresh
        pending += fresh


def require_some(gradients: Sequence[Tensor], step: int) -> None:
    """Refuse a step, counted from 0, after which no parameter has a gradient.

    Raises:
        UsageError: on every rank, since they hold the same sums.
    """
    if not gradients:
        raise UsageError(
            f"the loss is expected to depend on a trainable parameter of the model, but in step {step + 1} "
            "none of them got a gradient",
            "compute the loss from what the model returns; checkpoint(..., use_reentrant=True) hides parameters",
        )


def incomplete_backward(step: int, missing: Sequence[str]) -> UsageError:
    """Why backward has not been through all buckets of DDP, in a step that is counted from 0."""
    return UsageError(
        f"every parameter is expected to be used in each step as in the first one, but in step {step + 1} "
        f"this rank did not use {', '.join(missing[:3]) or 'some of them'}",
        "pass find_unused_parameters=True to Components",
    )
