"""Buffers that the forward of a shard changes (BatchNorm's running statistics) come out the same on any world size.

Every shard, and every micro-batch of one, starts from the step's buffers. Afterwards only buffers that some shard
changed are combined: floating-point ones to their sample-weighted mean over the shards, summed in float64 along the
tree (see StepSums); integer ones have to agree. A step of a single shard in one part keeps what that shard left, which
float64 carries to other ranks without loss. Unchanged buffers are not touched: a mean of equal values can alter bits.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from samestep.launcher.contract import UsageError
from samestep.train.parallel.group import Group
from samestep.train.parallel.shards import MicroBatch, StepPlan, owned_span

_NOTHING = torch.empty(0, dtype=torch.float64)


class BufferCombiner:
    """Used as begin, (before, after) for each micro-batch, `of_shard` after each shard, finish with their sum."""

    def __init__(self, model: nn.Module, group: Group, shards: int, *, keep: bool = False) -> None:
        # Where each buffer is kept, not the tensor: wrapping the model, and user code, can put another one there.
        self._places = {name: _place(model, name) for name, _ in model.named_buffers()}
        self.buffers: dict[str, Tensor] = {}
        self.group = group
        self.shards = shards
        self.keep = keep  # a step's buffers may be asked back for
        self.owned = owned_span(group.rank, group.world_size, shards)
        self.changing: list[str] | None = None  # agreed by all ranks in the first step
        self._base: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._leaf: Tensor | None = None  # of the shard's parts so far, weighed by their samples

    def begin(self, plan: StepPlan) -> None:
        """Remember the step's buffers where a later shard has to start from them."""
        self._plan = plan
        self._read()
        self._single = min(plan.samples, self.shards) == 1 and len(plan.parts(0)) == 1
        self._leaf = None
        self._changed: set[str] = set()
        self._names = list(self.buffers) if self.changing is None else self.changing
        stay = self._single and self.group.world_size == 1  # what the one shard leaves is right, and here
        self.width = 0 if stay else sum(self.buffers[name].numel() for name in self._names)
        if self.changing is None or self.keep or len(plan.present(self.owned)) > 1 or plan.micro_batches > 1:
            for name in self._names:
                if name in self._base:
                    self._base[name].copy_(self.buffers[name])
                else:
                    self._base[name] = self.buffers[name].clone()
        self._first = True

    def before(self, part: MicroBatch) -> None:  # noqa: ARG002 (the same for all parts)
        """Bring the step's buffers back."""
        if not self._first:
            for name, value in self._base.items():
                self.buffers[name].copy_(value)
        self._first = False
        self._versions = {name: buffer._version for name, buffer in self.buffers.items()}

    def after(self, part: MicroBatch) -> None:
        """Take what a part of a shard left in the buffers that it changed."""
        if self.changing is None:
            # By value: batch_norm writes running statistics without raising the tensor's version.
            self._changed |= {
                name for name, buffer in self.buffers.items() if not torch.equal(buffer, self._base[name])
            }
        else:
            self._refuse_new()
        if self.width:
            weighed = self._flat() if self._single else self._flat() * part.samples
            self._leaf = weighed if part.first or self._leaf is None else self._leaf + weighed

    def of_shard(self) -> Tensor:
        """What the shard that is over adds to the sum: float64, shape (width,)."""
        leaf, self._leaf = self._leaf, None
        return _NOTHING if leaf is None else leaf

    def finish(self, total: Tensor) -> None:
        """Leave the combined buffers on every rank; `total` is the sum over all shards, `width` numbers."""
        self._read()
        if self.changing is None:
            self._agree()
        if not self.changing or not self.width:
            return
        combined = total if self._single else total / self._plan.samples
        sizes = [self.buffers[name].numel() for name in self._names]
        for name, value in zip(self._names, combined.split(sizes), strict=True):
            if name in self.changing:
                self.buffers[name].copy_(value.view_as(self.buffers[name]))

    def undo(self) -> None:
        """Bring the step's buffers back, where `keep` was asked for: the step has not taken place."""
        for name, value in self._base.items():
            self.buffers[name].copy_(value)

    def _read(self) -> None:
        self.buffers = {name: kept[key] for name, (kept, key) in self._places.items()}

    def _refuse_new(self) -> None:
        for name, buffer in self.buffers.items():
            if buffer._version != self._versions[name] and name not in (self.changing or []):
                raise UsageError(
                    f"buffers are expected to change in every step or never, but {name} "
                    f"changed first in step {self._plan.step + 1}",
                    "change it in every step, or keep it out of the model",
                )

    def _flat(self) -> Tensor:
        return torch.cat([self.buffers[name].detach().reshape(-1).double() for name in self._names])

    def _agree(self) -> None:
        """All ranks learn which buffers change, and that integer ones change alike."""
        integers = {
            name: self.buffers[name].tolist()
            for name in self._ordered(self._changed)
            if not self.buffers[name].is_floating_point()
        }
        record = json.dumps({"changed": self._ordered(self._changed), "integers": integers}).encode()
        records = [json.loads(part) for part in self.group.gather_bytes(record)]
        self.changing = self._ordered({name for part in records for name in part["changed"]})
        seen: dict[str, object] = {}
        for part in records:
            for name, value in part["integers"].items():
                if seen.setdefault(name, value) != value:
                    raise UsageError(
                        f"integer buffer {name} is expected to change alike on every rank, "
                        f"but is {seen[name]} and {value}",
                        "make it depend on the number of steps only, or floating point so that it can be averaged",
                    )
        self._base = {name: value for name, value in self._base.items() if name in self.changing}

    def _ordered(self, names: set[str]) -> list[str]:
        return [name for name in self.buffers if name in names]


class NoBuffers:
    """What a model without buffers has."""

    width = 0

    def undo(self) -> None:
        """Nothing to bring back."""

    def begin(self, plan: StepPlan) -> None:
        """Nothing to remember."""

    def before(self, part: MicroBatch) -> None:
        """Nothing to bring back."""

    def after(self, part: MicroBatch) -> None:
        """Nothing to take."""

    def of_shard(self) -> Tensor:
        """Nothing to sum."""
        return _NOTHING

    def finish(self, total: Tensor) -> None:
        """Nothing to combine."""


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dict of the module that owns a buffer, and its key there."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path)._buffers, key
