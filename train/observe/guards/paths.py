"""Ranks that run other code than their neighbours: another way through the model, or collectives of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

from samestep.train.observe.guards.check import Check, Finding, Subject
from samestep.train.parallel.group import Group
from samestep.train.parallel.shards import StepPlan


class SamePath(Check):
    """Which modules run in a shard; ranks may differ now and then, by their data, but not in every step alike."""

    def __init__(self, subject: Subject, group: Group) -> None:
        self._group = group
        self._here: list[str] = []
        self._steps: list[list[set[str]]] = []  # a step, a rank: modules that ran
        watched = subject.hooked if group.world_size > 1 else []
        self._hooks = [module.register_forward_pre_hook(self._noting(name)) for name, module in watched]

    def before_step(self, plan: StepPlan) -> tuple[()]:  # noqa: ARG002
        """Begin a list."""
        self._here = []
        return ()

    def after_step(self, plan: StepPlan) -> tuple[()]:  # noqa: ARG002
        """Exchange the lists. A collective."""
        if self._group.world_size > 1:
            rows = self._group.gather_bytes("\n".join(sorted(set(self._here))).encode())
            self._steps.append([set(row.decode().split("\n")) - {""} for row in rows])
        return ()

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def conclude(self) -> Iterator[Finding]:
        """A rank that differs from rank zero in the same modules in every step."""
        steps, self._steps = self._steps, []
        for rank in range(1, self._group.world_size):
            ways = [(step[0], step[rank]) for step in steps if step[0] and step[rank]]
            apart = [first ^ other for first, other in ways]
            always: set[str] = set.intersection(*apart) if apart else set()
            if len(apart) > 1 and always:
                name = min(always)
                runs, not_runs = (0, rank) if name in ways[0][0] else (rank, 0)
                yield Finding(
                    f"in every step so far rank {runs} ran {name} of the model, and rank {not_runs} did not",
                    "code that asks for the rank, or for data that only one rank has, gives other weights on another "
                    "number of ranks",
                )
                return

    def _noting(self, name: str) -> Any:
        def note(module: nn.Module, inputs: Any) -> None:  # noqa: ARG001
            self._here.append(name or type(module).__name__)

        return note


class NoCollectives(Check):
    """A loss that talks to other ranks by itself; looked at in the first step, where DDP does not talk in forward."""

    def __init__(self, group: Group) -> None:
        self._counts = group.world_size > 1
        self._before = 0

    def before_loss(self, batch: Any, samples: int) -> tuple[()]:  # noqa: ARG002
        """Note how many collectives there were."""
        self._before = _collectives() if self._counts else 0
        return ()

    def after_loss(self) -> Iterator[Finding]:
        """Compare."""
        made = _collectives() - self._before if self._counts else 0
        if made:
            yield Finding(
                f"the loss calls collectives of torch.distributed itself, {made} in a shard",
                "a rank calls it once a shard, and ranks can have other numbers of shards: return Weighted(total, "
                "weight), and samestep sums over all ranks",
            )

    def after_step(self, plan: StepPlan) -> tuple[()]:  # noqa: ARG002
        """Once."""
        self._counts = False
        return ()


def _collectives() -> int:
    group: Any = dist.group.WORLD
    return int(group._get_sequence_number_for_group())
