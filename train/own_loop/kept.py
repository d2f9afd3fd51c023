"""What a loop of one's own has in its checkpoints: named models, and named parts with a state_dict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from samestep.launcher.contract import ExitCode, UsageError
from samestep.train.data.fingerprint import content
from samestep.train.parallel.group import Group, gather_json
from samestep.train.recipe import Components
from samestep.train.state.as_saved import load_optimizer
from samestep.train.state.codec import encode


class Together:
    """Parts under their names that are saved and loaded as one."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = dict(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all optimizers, one after the other."""
        return [group for part in self.parts.values() for group in getattr(part, "param_groups", [])]

    @property
    def kind(self) -> str:
        """What they are, for whoever compares them with those of a checkpoint."""
        return ", ".join(f"{name} {type(part).__name__}" for name, part in self.parts.items())

    @property
    def scheduled(self) -> bool:
        """Whether a scheduler moves numbers of an optimizer."""
        return any(isinstance(part, LRScheduler) for part in self.parts.values())

    def state_dict(self) -> dict[str, Any]:
        """By name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give each part its own.

        Raises:
            ValueError: the parts there have other names, or an optimizer is of another kind.
        """
        if state.keys() != self.parts.keys():
            here, there = (", ".join(sorted(names)) or "nothing" for names in (self.parts, state))
            raise ValueError(f"keep has {here} here and {there} there")
        for name, part in self.parts.items():
            load = load_optimizer if isinstance(part, Optimizer) else type(part).load_state_dict
            load(part, state[name])


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
    parts = dict(sorted(keep.items()))  # another order in the code is no other run
    models = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
    rest = Together({name: part for name, part in parts.items() if name not in models})
    _require_its_parameters(models, rest)
    return Components(
        model=models,
        loss=_no_loss,
        optimizer=cast(Optimizer, rest),
        train_data=data,
        collate_fn=collate_fn,
    )


def require_alike(keep: Mapping[str, Any], group: Group, step: int) -> None:
    """Compare what is neither model nor optimizer, and may be made of what one rank alone has seen. A collective.

    Raises:
        UsageError: (exit code 1) a part has another state on another rank.
    """
    mine = {n: _digest(part) for n, part in keep.items() if not isinstance(part, nn.Module | Optimizer)}
    if not mine:
        return
    by_rank = gather_json(group, mine)
    for rank, theirs in enumerate(by_rank):
        for name, digest in by_rank[0].items():
            if theirs.get(name) != digest:
                raise UsageError(
                    f"keep[{name!r}] is expected to be the same on all ranks, but after step {step} that of rank "
                    f"{rank} is not that of rank 0",
                    "a rank sees the batches of its own shards alone: make such state a buffer of a model in keep, "
                    "whose mean over all shards is taken, or let it follow from step.number",
                    ExitCode.FAILED,
                )


def _digest(part: Any) -> str:
    tree, tensors = encode(part.state_dict(), "state")
    sha = hashlib.sha256(json.dumps(tree, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(name.encode() + content(tensors[name]))
    return sha.hexdigest()


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
            'keep={"model": model, "optimizer": optimizer}, and look for requires_grad_(False)',
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
