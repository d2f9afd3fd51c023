"""Whether the model holds the parameters and buffers that it was built with: others are neither summed nor saved."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from samestep.launcher.contract import UsageError
from samestep.train.observe.guards.check import listed
from samestep.train.state.as_saved import same_bits

_EXTRA = "_extra_state"  # torch's name for what get_extra_state returns (torch/nn/modules/module.py)


@dataclass(slots=True)
class HeldParts:
    """Remembers `model` as it is when training begins."""

    model: nn.Module
    _parameters: dict[str, nn.Parameter] = field(init=False)
    _saved: frozenset[str] = field(init=False)
    _looked: bool = False

    def __post_init__(self) -> None:
        self._parameters = dict(self.model.named_parameters())
        self._saved = frozenset(_saved(self.model))

    def require_loadable(self) -> None:
        """Judge before the first step whether the model takes its own state_dict back, and with it all that trains.

        Raises:
            UsageError: it does not, so nothing could go on from a checkpoint, or weights would begin anew there.
        """
        state = self.model.state_dict()
        if state.keys() == self._saved and not loads_in_a_way_of_its_own(self.model):
            return
        lost = self._lost(pytree.tree_map_only(Tensor, torch.clone, dict(state)))
        if lost:
            raise UsageError(
                "Components.model is expected to bring all weights that train back from its own state_dict, but "
                f"these stay as they are: {listed(lost)}",
                "a checkpoint has what state_dict returns, so they would begin anew where a run goes on: return them "
                "from state_dict and take them in load_state_dict (_load_from_state_dict of a part), or freeze them by "
                "requires_grad_(False)",
            )

    def _lost(self, state: dict[str, Any]) -> list[str]:
        """Names of weights that train and are other ones once the model has loaded `state`; all are as before then."""
        before = {name: p.detach().clone() for name, p in self._parameters.items() if p.requires_grad}
        try:
            for name in before:
                self._parameters[name].detach().fill_(math.nan)
            self.model.load_state_dict(state)
            now = dict(self.model.named_parameters())
            return [name for name, value in before.items() if name not in now or not same_bits(now[name], value)]
        except RuntimeError as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[1:]) or str(error)
            raise UsageError(
                f"Components.model is expected to load its own state_dict, but does not: {reason[:300]}",
                "a checkpoint has what state_dict returns: leave your own state_dict out, or write a load_state_dict "
                "that fits it; a file of some weights alone can be written after train()",
            ) from None
        finally:
            for name, value in before.items():
                self._parameters[name].detach().copy_(value)

    def after_step(self) -> None:
        """Look after the first step, in which most of what a forward changes is changed.

        Raises:
            UsageError: as `require_same`.
        """
        if not self._looked:
            self._looked = True
            self.require_same()

    def require_same(self) -> None:
        """Compare.

        Raises:
            UsageError: a parameter is another one, or one or a saved buffer came or went.
        """
        now = dict(self.model.named_parameters())
        for name in (*self._parameters, *now):
            if now.get(name) is not self._parameters.get(name):
                raise UsageError(
                    "the model is expected to keep the parameters that it was built with, but "
                    f"{name} is {_what(name in self._parameters, name in now)} since training began",
                    "make all of them in build; to change one that is there, copy into it, in the optimizer",
                )
        saved = frozenset(_saved(self.model))
        if saved != self._saved:
            name = min(saved ^ self._saved)
            raise UsageError(
                "the model is expected to keep the buffers that it was built with, but "
                f"{name} is {_what(name in self._saved, name in saved)} since training began",
                "register_buffer with its values in build, for a checkpoint is loaded into what build makes; or "
                "persistent=False for what is the same however often it is made",
            )


def loads_in_a_way_of_its_own(model: nn.Module) -> bool:
    """Whether code that is not torch's decides what the model, or a module in it, takes from a state_dict."""
    for module in model.modules():
        hooks = (*module._load_state_dict_pre_hooks.values(), *module._load_state_dict_post_hooks.values())
        methods = type(module).load_state_dict, type(module)._load_from_state_dict
        if not all(_is_of_torch(getattr(called, "hook", called)) for called in (*methods, *hooks)):
            return True
    return False


def _is_of_torch(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", "")).startswith("torch.")


def bring_back(model: nn.Module, state: dict[str, Any]) -> None:
    """`model.load_state_dict(state)`, and a look where it is not torch's alone.

    Raises:
        ValueError: a tensor is another one than in `state`.
        RuntimeError: names or shapes do not fit (from torch).
    """
    model.load_state_dict(dict(state))
    if not loads_in_a_way_of_its_own(model):
        return
    now = model.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if lost := [name for name, value in tensors.items() if name not in now or not same_bits(now[name], value)]:
        raise ValueError(f"{type(model).__name__}.load_state_dict does not bring back what was saved: {listed(lost)}")


def _what(was_there: bool, is_there: bool) -> str:
    return "another one" if was_there and is_there else "gone" if was_there else "new"


def _saved(model: nn.Module) -> Iterator[str]:
    """Keys of nn.Module's own state_dict."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        yield from (prefix + name for name, parameter in module._parameters.items() if parameter is not None)
        kept = (name for name, buffer in module._buffers.items() if buffer is not None)
        yield from (prefix + name for name in kept if name not in module._non_persistent_buffers_set)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield prefix + _EXTRA
