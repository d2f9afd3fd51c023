"""State trees (what `state_dict()` returns) as JSON plus tensors, without pickle.

Dicts with string keys, lists, strings, booleans, None, integers and floats are JSON as they are (Python writes floats
so that they read back to the same bits). Other containers and tensors become `{"$kind": payload}`: `$tensor` names a
tensor kept beside, `$tuple` a tuple, `$set` a sorted set, `$map` a dict with any keys as pairs, `$counter` a Counter as
pairs. Anything else is refused by name.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from samestep.launcher.contract import UsageError

_STORED = frozenset(safetensors.torch._TYPES.values())


def encode(tree: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """JSON value and the tensors it refers to; `name` is the root of their names and of error messages.

    Raises:
        UsageError: something in the tree could only be saved with pickle; says where.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(tree, name, tensors), tensors


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:  # noqa: C901, PLR0911 (one case a type)
    if isinstance(value, Tensor):
        while path in tensors:  # {"a": {"b": …}, "a.b": …} and {1: …, "1": …} are different places
            path += "'"
        if value.dtype not in _STORED:
            raise UsageError(
                f"{path} is expected to have a dtype that safetensors stores, but is {value.dtype}",
                "keep real and imaginary part in tensors of their own (torch.view_as_real)"
                if value.is_complex()
                else "",
            )
        tensors[path] = value.detach()
        return {"$tensor": path}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float) and not isinstance(value, np.generic):
        return value
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return value.item()
    if isinstance(value, list):
        return [_encode(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
    if type(value) is tuple:
        return {"$tuple": [_encode(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, set | frozenset):
        return {"$set": [_encode(item, path, tensors) for item in sorted(value)]}
    if type(value) in (dict, OrderedDict, defaultdict, Counter):
        counts = type(value) is Counter
        if not counts and all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, f"{path}.{key}", tensors) for key, item in value.items()}
        pairs = [
            [_encode(key, f"{path}.key", tensors), _encode(item, f"{path}.{key}", tensors)]
            for key, item in value.items()
        ]
        return {"$counter" if counts else "$map": pairs}
    raise UsageError(
        f"{path} is expected to be made of tensors, numbers, strings and containers of them, "
        f"but holds a {type(value).__module__}.{type(value).__qualname__}",
        "it could only be saved with pickle; keep it out of state_dict(), or write it as numbers there",
    )


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: PLR0911 (one case a kind)
    """Inverse of `encode`; dict subclasses other than Counter come back as dict.

    Raises:
        ValueError: an unknown kind.
        KeyError: a tensor is missing.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (kind := next(iter(value))).startswith("$"):
        payload = value[kind]
        match kind:
            case "$tensor":
                return tensors[payload]
            case "$tuple":
                return tuple(decode(item, tensors) for item in payload)
            case "$set":
                return {decode(item, tensors) for item in payload}
            case "$map":
                return {decode(key, tensors): decode(item, tensors) for key, item in payload}
            case "$counter":
                return Counter({decode(key, tensors): decode(item, tensors) for key, item in payload})
        raise ValueError(f"unknown kind {kind!r} in a saved state")
    tree = {key: decode(item, tensors) for key, item in value.items()}
    if isinstance(tree.get("milestones"), dict):  # MultiStepLR's, from before `$counter`
        tree["milestones"] = Counter(tree["milestones"])
    return tree


def unshared(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each distinct tensor once, under its first name, and which other names stand for it."""
    first: dict[tuple[Any, ...], str] = {}
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        kept[name] = tensor
    return kept, aliases


def not_finite(tensors: Mapping[str, Tensor], known: Mapping[str, Tensor] | None = None) -> str:
    """Name of the first tensor that holds NaN or infinity, or an empty string.

    `known` is where some of them may: by name, a bool of the tensor's shape on its device.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
            continue
        allowed = (known or {}).get(name)
        if allowed is None or allowed.shape != tensor.shape or bool((~torch.isfinite(tensor) & ~allowed).any()):
            return name
    return ""
