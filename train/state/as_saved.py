"""What a state goes on with is what was saved: of an optimizer's tensors also the dtypes, and of all the strides.

safetensors keeps tensors row by row. An optimizer's state has the strides of its parameter, and torch's fused updates
pair the elements of both in the order of memory, whatever the strides say. And `Optimizer.load_state_dict` brings a
floating state to the dtype of its parameter (torch/optim/optimizer.py, _process_value_according_to_param_policy),
though NAdam, RAdam and ASGD keep float32 scalars for every dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from samestep.train.parallel.layout import fills_its_memory


def strides_of(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Of the tensors that fill their memory in another order than row by row."""
    return {name: list(t.stride()) for name, t in tensors.items() if not t.is_contiguous() and fills_its_memory(t)}


def laid_out(tensors: Mapping[str, Tensor], strides: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The tensors, those of `strides` in memory as they were."""
    turned = {
        name: torch.empty_strided(tensors[name].shape, s, dtype=tensors[name].dtype) for name, s in strides.items()
    }
    return {**tensors, **{name: tensor.copy_(tensors[name]) for name, tensor in turned.items()}}


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """`optimizer.load_state_dict(saved)`, with the dtypes of `saved`, also of optimizers inside of it.

    Raises:
        ValueError: it has other parameters or groups (from torch), is of another kind, or has lost what was saved.
    """
    options = [
        group.keys() & getattr(optimizer, "defaults", {}).keys() for group in getattr(optimizer, "param_groups", [])
    ]
    optimizer.load_state_dict(saved)
    for names, group in zip(options, getattr(optimizer, "param_groups", []), strict=False):
        if gone := sorted(names - group.keys()):
            raise ValueError(f"{type(optimizer).__name__} needs {gone[0]}, which the saved optimizer did not have")
    others = _other(optimizer.state_dict(), saved)
    for holder, key, value in others:
        holder[key] = value.to(holder[key].device)  # the dicts that hold a parameter's state are the optimizer's own
    for _, key, _ in _other(optimizer.state_dict(), saved) if others else ():
        raise ValueError(f"{type(optimizer).__name__}.load_state_dict does not bring back what was saved as {key!r}")


def described(optimizer: Optimizer, model: nn.Module) -> list[Any]:
    """Its kind, and the names of the parameters in each of its groups, by whose places its state is kept."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = getattr(optimizer, "param_groups", [])
    kind = getattr(optimizer, "kind", type(optimizer).__name__)
    return [kind, [[names.get(id(p), "") for p in group["params"]] for group in groups]]


def require_same_optimizer(now: list[Any], saved: list[Any]) -> None:
    """Compare what `described` tells.

    Raises:
        ValueError: it is of another kind, or its parameters are others or in another order.
    """
    (kind, groups), (kind_there, groups_there) = now, saved
    if kind != kind_there:
        raise ValueError(f"the optimizer is {kind}, there it is {kind_there}")
    for number, (here, there) in enumerate(zip(groups, groups_there, strict=False)):
        for place, (name, name_there) in enumerate(zip(here, there, strict=False)):
            if name != name_there:
                where = f"parameter {place}" + (f" of group {number}" if len(groups) > 1 else "")
                raise ValueError(f"{where} of the optimizer is {name or 'none of the model'}, there it is {name_there}")


def require_same_dtypes(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Compare weights and buffers; loading would round them, or leave an optimizer with state of another type.

    Raises:
        ValueError: they have other dtypes.
    """
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and name in saved and tensor.dtype != saved[name].dtype:
            raise ValueError(f"{name} is {tensor.dtype}, there it is {saved[name].dtype}")


def _other(now: Any, saved: Any) -> list[tuple[Any, Any, Tensor]]:
    """Tensors of `saved` that are other bits in `now`: what holds them there, under which key, and as saved."""
    pairs: list[tuple[Any, Any, Any]]
    if isinstance(saved, Mapping) and isinstance(now, dict):
        pairs = [(now, key, value) for key, value in saved.items() if key in now]
    elif isinstance(saved, list | tuple) and isinstance(now, list) and len(saved) == len(now):
        pairs = [(now, index, value) for index, value in enumerate(saved)]
    else:
        return []
    found = []
    for holder, key, value in pairs:
        if not isinstance(value, Tensor):
            found += _other(holder[key], value)
        elif type(holder[key]) in (Tensor, nn.Parameter) and not same_bits(holder[key], value):
            found.append((holder, key, value))
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same wherever they are, NaNs too."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (each.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(one, other)


def make_writable(model: nn.Module, names: Collection[str]) -> None:
    """Give the buffers `names` memory for each element: what was expanded, or is held twice, can't be loaded apart."""
    held = set()
    for path, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is None or f"{path}.{key}".lstrip(".") not in names:
                continue
            if 0 in buffer.stride() or id(buffer) in held:
                module._buffers[key] = buffer.clone(memory_format=torch.contiguous_format)
            held.add(id(buffer))
