"""Where the elements of a parameter lie in a flat buffer: in the order of its own memory, as DDP lays out its buckets.

DDP's buckets follow the strides of a parameter that fills its memory, and hold a complex one as pairs of real numbers
(torch/csrc/distributed/c10d/reducer.cpp, initialize_bucket_views). `GradBucket.gradients()` does not: its views have
the shape of the parameter, whatever its strides, so with `channels_last` they name other elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samestep.launcher.contract import UsageError


def dense(name: str, gradient: Tensor) -> Tensor:
    """The gradient, which has to have all its elements.

    Raises:
        UsageError: it is sparse.
    """
    if gradient.layout != torch.strided:
        raise UsageError(
            f"gradients are expected to be dense, but that of {name} is {gradient.layout}",
            "build the layer with sparse=False",
        )
    return gradient


def flat(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """One gradient after the other, each laid out as its parameter: real, of shape (numbers,)."""
    return torch.cat([_in_memory_order(g, p) for g, p in zip(gradients, parameters, strict=True)])


def views(buffer: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """What `flat` laid out there, each of the shape and strides of its parameter; all are of one dtype."""
    parts = buffer.split([numbers(parameter) for parameter in parameters])
    return [_as_parameter(part, parameter) for part, parameter in zip(parts, parameters, strict=True)]


def numbers(parameter: Tensor) -> int:
    """Real numbers that a parameter has."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient with the strides that plain backward gives it: a norm adds up in memory order.

    They are those of its parameter, or row by row for one with gaps (torch/csrc/autograd/utils/grad_layout_contract.h).
    """
    if not fills_its_memory(parameter):
        return gradient.contiguous()
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)


def _in_memory_order(gradient: Tensor, parameter: Tensor) -> Tensor:
    if not parameter.is_contiguous():
        gradient = gradient.permute(_dimensions(parameter))
    if parameter.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    return gradient.reshape(-1)


def _as_parameter(part: Tensor, parameter: Tensor) -> Tensor:
    if parameter.is_complex():
        part = torch.view_as_complex(part.view(-1, 2))
    if parameter.is_contiguous():
        return part.view(parameter.shape)
    dimensions = _dimensions(parameter)
    back = sorted(range(len(dimensions)), key=dimensions.__getitem__)
    return part.view([parameter.shape[d] for d in dimensions]).permute(back)


def _dimensions(parameter: Tensor) -> list[int]:
    """From the one with the widest stride to the one whose elements are neighbours."""
    dimensions = list(range(parameter.dim()))
    if fills_its_memory(parameter):
        # a dimension of one element may have any stride
        dimensions.sort(key=lambda d: (parameter.stride(d), parameter.shape[d] > 1), reverse=True)
    return dimensions


def fills_its_memory(parameter: Tensor) -> bool:
    """Without gaps or overlaps: then, and only then, torch copies the strides."""
    return torch.empty_like(parameter, device="meta").stride() == parameter.stride()
