"""Graphs that outlive their step: tensors with a history, more of them after every step, and who holds them."""

from __future__ import annotations

import gc
import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from samestep.train.observe.guards.check import Check, Finding, Subject
from samestep.train.parallel.shards import StepPlan

_STEPS = 3  # counted after so many steps: one more each time is growth, a constant number is a cache
_DEPTH = 4  # containers between a tensor and a name


class KeptGraphs(Check):
    """Counts tensors with a grad_fn after a step; all of this step's are gone by then, unless somebody keeps them."""

    def __init__(self, subject: Subject) -> None:
        self._model = subject.model
        self._counts: list[int] = []

    def after_step(self, plan: StepPlan) -> Iterator[Finding]:  # noqa: ARG002
        """Count; where the first count is zero nothing is kept, and no other is needed: it looks at every object."""
        if self._counts[:1] == [0]:
            return
        self._counts.append(len(_with_history()))
        if len(self._counts) == _STEPS and _grows(self._counts):
            gc.unfreeze()  # training sets aside what was there before it, and that may hold the graphs
            gc.collect()  # what is only waiting for the collector is no leak
            kept = _with_history()
            if len(kept) >= _STEPS:
                shape = tuple(kept[-1].shape)
                yield Finding(
                    f"the graph of every step is kept in memory, through {holder(kept[-1], self._model)}: tensors of "
                    f"shape {shape} there, and more of them after each step",
                    "keep tensor.detach(), or float(tensor) for a number, instead of the tensor itself",
                )

    def conclude(self) -> tuple[()]:
        """Begin to count again."""
        self._counts = []
        return ()


def _grows(counts: list[int]) -> bool:
    return all(later > earlier for earlier, later in itertools.pairwise(counts))


def _with_history() -> list[Tensor]:
    return [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.grad_fn is not None]


def holder(tensor: Tensor, model: nn.Module) -> str:
    """A name for what keeps `tensor` alive: an attribute, a global, a variable of a function."""
    modules = {id(module): f"{name or type(model).__name__}" for name, module in model.named_modules()}
    level: list[Any] = [tensor]
    seen = {id(tensor), id(level)}
    for _ in range(_DEPTH):
        above = [r for thing in level for r in gc.get_referrers(thing) if _counts(r, seen)]
        for referrer in above:
            name = _name(referrer, level, modules)
            if name:
                return name
        seen |= {id(level), id(above)} | {id(thing) for thing in above}
        level = above
    return "an object without a name"


def _counts(thing: Any, seen: set[int]) -> bool:
    return id(thing) not in seen and not isinstance(thing, types.FrameType | types.GeneratorType)


def _name(referrer: Any, level: list[Any], modules: dict[int, str]) -> str:
    """`losses of module __main__`, `history of layer2`, `seen in function build.<locals>.loss`; empty if none."""
    held = {id(thing) for thing in level}
    if isinstance(referrer, types.CellType):
        return _of_closure(referrer)
    inside = referrer if isinstance(referrer, dict) else getattr(referrer, "__dict__", None)
    if not isinstance(inside, dict):
        return ""
    key = next((key for key, value in list(inside.items()) if id(value) in held), None)
    if key is None:
        return ""
    if inside is not referrer:
        return f"{key} of {modules.get(id(referrer), type(referrer).__name__)}"
    for owner in gc.get_referrers(inside):
        if not isinstance(owner, type) and getattr(owner, "__dict__", None) is inside:
            return f"{key} of {modules.get(id(owner), type(owner).__name__)}"
    module = next((name for name, module in list(sys.modules.items()) if vars(module) is inside), None)
    return f"{key} of module {module}" if module else ""


def _of_closure(cell: types.CellType) -> str:
    for tuple_ in gc.get_referrers(cell):
        for function in gc.get_referrers(tuple_) if isinstance(tuple_, tuple) else ():
            if isinstance(function, types.FunctionType) and function.__closure__ is tuple_:
                position = [id(one) for one in function.__closure__ or ()].index(id(cell))
                name = function.__code__.co_freevars[position]
                return f"{name} of function {function.__qualname__}"
    return ""
