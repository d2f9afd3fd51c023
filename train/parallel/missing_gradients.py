"""Parameters that a step leaves without a gradient, and hooks that it does not call, though it should: as sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor
from torch.autograd.graph import Node

from samestep.launcher.contract import UsageError

_LEAF = "torch::autograd::AccumulateGrad"
_MODULE_HOOK = "BackwardHookFunctionBackward"  # around the inputs of a module with a register_full_backward_hook
_REENTRANT = "CheckpointFunctionBackward"  # torch.utils.checkpoint's node, and those that were copied from it


def refuse_reentrant_checkpoints(total: Tensor) -> None:
    """Look through the graph of a loss for activations whose block runs its own backward to compute them again.

    torch.autograd.grad asks for the gradients of given parameters, and does not see those inside such a block.

    Raises:
        UsageError: there are some.
    """
    if any(node.name() == _REENTRANT for node in _nodes(total)):
        raise UsageError(
            "activation checkpointing is expected not to be reentrant where gradients of several shards or ranks "
            "are summed, but the loss holds a checkpoint with use_reentrant=True, whose parameters would get none",
            "pass use_reentrant=False to torch.utils.checkpoint.checkpoint; the gradients are the same",
        )


def refuse_uncalled_hooks(total: Tensor, parameters: Iterable[Tensor]) -> None:
    """Look through the graph of a loss for hooks that torch.autograd.grad does not come to: no parameter is there.

    DDP comes to them, but may have sent the buffers before that they change. A hook of a tensor in between, which was
    computed from such inputs alone, leaves no trace in the graph: see `leads_to`.

    Raises:
        UsageError: a tensor that requires a gradient and is no parameter has one, or a module that gets it.
    """
    known = {id(parameter) for parameter in parameters}
    nodes = list(_nodes(total))
    leaves: list[tuple[Node, Tensor]] = [(node, node.variable) for node in nodes if node.name() == _LEAF]  # type: ignore[attr-defined]
    hooked = [tensor for _, tensor in leaves if id(tensor) not in known and _has_hook(tensor)]
    above = _above(nodes, [node for node, tensor in leaves if id(tensor) in known])
    in_vain = any(node.name() == _MODULE_HOOK and node not in above for node in nodes)
    if hooked or in_vain:
        what = f"a tensor of shape {tuple(hooked[0].shape)}" if hooked else "a module with register_full_backward_hook"
        raise UsageError(
            "a hook of backward is expected to lie between the loss and a parameter where gradients of several shards "
            f"or ranks are summed, since backward goes nowhere else there, but that of {what} does not",
            "register it with a result of the first layer; or ask torch.autograd.grad for that gradient in the loss",
        )


def leads_to(tensor: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether backward comes from `tensor` to one of the parameters."""
    known = {id(parameter) for parameter in parameters}
    return any(node.name() == _LEAF and id(node.variable) in known for node in _nodes(tensor))  # type: ignore[attr-defined]


def _has_hook(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def _nodes(total: Tensor) -> Iterator[Node]:
    """The graph of a loss, each node once."""
    pending = [total.grad_fn]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node is None:
            continue
        yield node
        fresh = {following for following, _ in node.next_functions} - seen
        seen |= fresh
        pending += fresh


def _above(nodes: Sequence[Node], ends: Sequence[Node]) -> set[Node]:
    """Those of the nodes from which backward comes to one of `ends`."""
    calling: dict[Node, list[Node]] = {}
    for node in nodes:
        for following, _ in node.next_functions:
            if following is not None:
                calling.setdefault(following, []).append(node)
    pending, seen = list(ends), set(ends)
    while pending:
        fresh = set(calling.get(pending.pop(), [])) - seen
        seen |= fresh
        pending += fresh
    return seen


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
