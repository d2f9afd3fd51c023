"""What a loop of one's own has in its checkpoints: named models, and named parts with a state_dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from samestep.launcher.contract import UsageError
from samestep.train.recipe import Components


class Together:
    """Parts under their names that are saved and loaded as one."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = dict(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all optimizers, one after the other."""
        return [group for part in self.parts.values() for group in getattr(part, "param_groups", [])]

    def state_dict(self) -> dict[str, Any]:
        """By name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give each part its own.

        Raises:
            ValueError: the parts there have other names.
        """
        if state.keys() != self.parts.keys():
            here, there = (", ".join(sorted(names)) or "nothing" for names in (self.parts, state))
            raise ValueError(f"keep has {here} here and {there} there")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def components_of(keep: object, data: Any, collate_fn: Any) -> Components:
    """The parts of `keep` in the form that everything around a loop takes.

    Raises:
        UsageError: `keep` is no dict of names and parts that can be saved, or has no model or no optimizer for one.
    """
    if not isinstance(keep, Mapping):
        raise UsageError(
            f"keep is expected to be a dict from names to models, optimizers and what else has state, but is "
            f"{type(keep).__name__}",
            'keep={"model": model, "optimizer": optimizer}',
        )
    for name, part in keep.items():
        _require_savable(name, part)
    models = nn.ModuleDict({name: part for name, part in keep.items() if isinstance(part, nn.Module)})
    others = {name: part for name, part in keep.items() if not isinstance(part, nn.Module)}
    schedulers = {name: part for name, part in others.items() if isinstance(part, LRScheduler)}
    rest = Together({name: part for name, part in others.items() if name not in schedulers})
    _require_its_parameters(models, rest)
    return Components(
        model=models,
        loss=_no_loss,
        optimizer=cast(Optimizer, rest),
        scheduler=cast(LRScheduler, Together(schedulers)) if schedulers else None,
        train_data=data,
        collate_fn=collate_fn,
    )


def _require_savable(name: object, part: object) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise UsageError(
            f"names in keep are expected to be those of Python's variables, but one is {name!r}",
            'keep={"model": model, "optimizer": optimizer}: files of a checkpoint have names made of them',
        )
    if isinstance(part, DistributedDataParallel):
        raise UsageError(
            f"keep[{name!r}] is expected to be the model itself, but is a DistributedDataParallel",
            "leave DDP(…) out: loop.gradients sums over the ranks",
        )
    if not callable(getattr(part, "state_dict", None)) or not callable(getattr(part, "load_state_dict", None)):
        raise UsageError(
            f"keep[{name!r}] is expected to have state_dict and load_state_dict, but is a {type(part).__name__}",
            "numbers belong to an object with these two methods, or can be told from step.number",
        )


def _require_its_parameters(models: nn.ModuleDict, rest: Together) -> None:
    if not any(parameter.requires_grad for parameter in models.parameters()):
        raise UsageError(
            "keep is expected to have a model that trains, but has no trainable parameter",
            'keep={"model": model, "optimizer": optimizer}: a checkpoint has what keep names, and nothing else',
        )
    known = {id(parameter) for parameter in models.parameters()}
    for name, part in rest.parts.items():
        held: list[Tensor] = [p for group in getattr(part, "param_groups", []) for p in group["params"]]
        if strangers := [tuple(p.shape) for p in held if id(p) not in known]:
            raise UsageError(
                f"keep[{name!r}] is expected to hold parameters of models in keep, but {len(strangers)} of "
                f"{len(held)} are not, the first of shape {strangers[0]}",
                "name their model in keep as well, or it begins anew where the run goes on",
            )


def _no_loss(model: Any, batch: Any) -> Tensor:  # noqa: ARG001 (the form of a loss)
    raise AssertionError("the loop computes its losses itself")
