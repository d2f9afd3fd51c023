"""What a model or a loss keeps beside parameters and buffers, as marks that are equal while nothing has changed.

Numbers, tensors without a graph, arrays, generators, and containers of these, in attributes of modules and of their
classes; and in what the functions of the loss, of modules and of their hooks close over, have as defaults, or name as
globals, and the user's functions that they call.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
import types
import zlib
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from samestep.train.parallel.fingerprint import sum_of_bits

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # `training` has a check of its own
_OF_EVERY_OPTIMIZER = frozenset({"defaults", "_opt_called", "_warned_capturable_if_run_uncaptured"})
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_MOST_BYTES = 1 << 22  # of a tensor or array that is looked at: a larger one is data rather than a state
_MOST_ITEMS = 64  # of a container, further ones count by their number
_DEPTH = 3  # of containers in containers
_MOST_FUNCTIONS = 256  # that are looked into, one calling the other


@dataclass(frozen=True, slots=True)
class Drawn:
    """Where a generator stands."""

    state: int


def of_model(model: nn.Module) -> Iterator[tuple[str, Hashable]]:
    """Attributes by path; torch's own modules may keep what they like in private ones."""
    for path, module in model.named_modules():
        of_torch = type(module).__module__.startswith("torch.")
        for key, value in vars(module).items():
            if key in _OF_EVERY_MODULE or (of_torch and key.startswith("_")):
                continue
            yield from _marked(f"{path or type(model).__name__}.{key}", value)
    for kind in _own_classes(model):
        for key, value in vars(kind).items():
            if not key.startswith("__") and (marked := mark(value)) is not None:
                yield f"{kind.__name__}.{key}", marked


def _own_classes(model: nn.Module) -> dict[type, None]:
    """Of its modules, in their order: the user's."""
    found = (kind for module in model.modules() for kind in type(module).__mro__)
    return {kind: None for kind in found if _is_the_users(kind.__module__)}


def _own_functions(model: nn.Module) -> Iterator[types.FunctionType]:
    """Methods and hooks of its modules: the user's."""
    for kind in _own_classes(model):
        yield from (value for value in vars(kind).values() if isinstance(value, types.FunctionType))
    for module in model.modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        hooks += (*module._backward_pre_hooks.values(), *module._backward_hooks.values())
        for hook in hooks:
            function = hook.func if isinstance(hook, functools.partial) else hook
            if isinstance(function, types.FunctionType) and _is_the_users(function.__module__):
                yield function


def of_late_buffers(model: nn.Module, known: Collection[str]) -> Iterator[tuple[str, Hashable]]:
    """Buffers that a forward has made, which are not combined over shards: `known` were there before."""
    late = ((name, buffer) for name, buffer in model.named_buffers() if name not in known)
    return ((name, marked) for name, buffer in late if (marked := mark(buffer)) is not None)


def of_loss(loss: Any, model: nn.Module) -> Iterator[tuple[str, Hashable]]:
    """By the names that the code has for them; the model and its parts are left out, other modules are looked into."""
    yield from _outside(model, _reached(_held(loss)))


def of_functions(model: nn.Module) -> Iterator[tuple[str, Hashable]]:
    """What the methods and hooks of its modules keep outside of them, by the names that the code has for it."""
    yield from _outside(model, _reached((function.__name__, function) for function in _own_functions(model)))


def _outside(model: nn.Module, held: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Hashable]]:
    inside = {id(module) for module in model.modules()}
    for name, value in held:
        if isinstance(value, nn.Module) and id(value) not in inside:
            state = (*value.named_buffers(), *value.named_parameters())
            yield from ((f"{name}.{key}", marked) for key, part in state if (marked := mark(part)) is not None)
            yield from ((f"{name}: {key}", marked) for key, marked in of_model(value))
        else:
            yield from _marked(name, value)


def _reached(held: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What is held, and what the user's functions in it hold, and so on."""
    seen: set[int] = set()
    waiting = deque(held)
    while waiting:
        name, value = waiting.popleft()
        if not isinstance(value, types.FunctionType):
            yield name, value
        elif id(value) not in seen and len(seen) < _MOST_FUNCTIONS and _is_the_users(value.__module__):
            seen.add(id(value))
            waiting.extend(_of_function(value))


def of_groups(optimizer: Optimizer) -> Iterator[tuple[str, Hashable]]:
    """Learning rates and other settings of an optimizer's groups."""
    groups = getattr(optimizer, "param_groups", [])
    for number, group in enumerate(groups):
        where = f" of group {number}" if len(groups) > 1 else ""
        settings = ((key, mark(value)) for key, value in group.items() if key != "params")
        yield from ((f"{key}{where}", marked) for key, marked in settings if marked is not None)


def beside_state_dict(part: Any) -> Iterator[tuple[str, Hashable]]:
    """Attributes of an optimizer or scheduler that its state_dict leaves out; torch's own keep what they need."""
    if part is None or type(part).__module__.startswith("torch."):
        return
    saved, here = part.state_dict(), getattr(part, "__dict__", {})
    if not saved.keys() <= here.keys():  # it saves under names of its own, so what is left out can't be told
        return
    for key, value in here.items():
        if key not in saved and key not in _OF_EVERY_OPTIMIZER:
            yield from _marked(f"{type(part).__name__}.{key}", value)


def _marked(name: str, value: Any) -> Iterator[tuple[str, Hashable]]:
    """A value that can be marked, or else what an object of the user's own classes has in its attributes."""
    if (marked := mark(value)) is not None:
        yield name, marked
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
        )
        for key, item in itertools.islice(items, _MOST_ITEMS):
            yield from _of_object(f"{name}[{key!r}]", item)
    else:
        yield from _of_object(name, value)


def _of_object(name: str, thing: Any) -> Iterator[tuple[str, Hashable]]:
    kind = type(thing)
    if isinstance(thing, nn.Module | Optimizer | type | types.ModuleType) or not _is_the_users(kind.__module__):
        return
    for key, value in getattr(thing, "__dict__", {}).items():
        if (marked := mark(value)) is not None:
            yield f"{name}.{key}", marked


@functools.lru_cache(maxsize=1024)
def _is_the_users(module: str) -> bool:
    """Neither of Python nor installed: loggers, progress bars and their like count too, and no loss depends on them."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__":
        return True
    if file is None or module.startswith("samestep.") or module.partition(".")[0] in sys.stdlib_module_names:
        return False
    return _INSTALLED.isdisjoint(Path(file).parts)


def _held(loss: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(loss, functools.partial):
        yield from _held(loss.func)
        yield from ((str(name), value) for name, value in loss.keywords.items())
        yield from ((f"argument {number}", value) for number, value in enumerate(loss.args))
    elif isinstance(loss, types.MethodType):
        yield from _attributes(loss.__self__)
        yield from _held(loss.__func__)
    elif isinstance(loss, types.FunctionType):
        yield from _of_function(loss)
    else:
        yield from _attributes(loss)


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    """Of an object; a module among them is looked into by the caller."""
    if isinstance(thing, nn.Module):
        yield type(thing).__name__, thing
    else:
        yield from ((f"{type(thing).__name__}.{key}", value) for key, value in getattr(thing, "__dict__", {}).items())


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from ((name, function.__globals__[name]) for name in code.co_names if name in function.__globals__)
    yield from (("a default", value) for value in function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()


def mark(value: Any, depth: int = _DEPTH) -> Hashable | None:
    """Equal for equal values; None for what is no state, or can't be told."""
    if isinstance(value, int | float):
        return "NaN" if value != value else value
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, np.ndarray | np.generic):
        known = value.dtype.kind in "biufc" and value.nbytes <= _MOST_BYTES
        return (value.shape, zlib.crc32(np.ascontiguousarray(value).tobytes())) if known else None
    state = _of_generator(value)
    if state is not None:
        return Drawn(zlib.crc32(state))
    return _of_container(value, depth) if depth else None


def _of_generator(value: Any) -> bytes | None:
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state).encode()
    if isinstance(value, np.random.RandomState):
        return str(value.get_state(legacy=False)).encode()
    return repr(value.getstate()).encode() if isinstance(value, random.Random) else None


def _of_tensor(tensor: Tensor) -> Hashable | None:
    """One with a graph is this step's: whoever keeps that is told by another check."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_conj()
    if (
        not plain
        or tensor.is_meta
        or tensor.grad_fn is not None
        or tensor.numel() * tensor.element_size() > _MOST_BYTES
    ):
        return None
    return tuple(tensor.shape), int(sum_of_bits(tensor.detach()))


def _of_container(value: Any, depth: int) -> Hashable | None:
    """By its length and first items; other mappings than dicts may read a file for each value."""
    if not isinstance(value, dict | list | tuple | deque | set):
        return None
    first = [*itertools.islice(value.values() if isinstance(value, dict) else value, _MOST_ITEMS)]
    if any(isinstance(item, Tensor) and item.grad_fn is not None for item in first):
        return None
    return len(value), *(mark(item, depth - 1) for item in first)
