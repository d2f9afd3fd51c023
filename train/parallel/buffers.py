"""Buffers that the forward of a shard changes (BatchNorm's running statistics) come out the same on any world size.

Every shard, and every micro-batch of one, starts from the step's buffers. Afterwards only buffers that some shard
changed are combined: floating-point ones to their sample-weighted mean over the shards, summed in float64 along the
tree (see StepSums). A step of a single shard in one part keeps what that shard left, which float64 carries to other
ranks without loss. Unchanged buffers are not touched: a mean of equal values can alter bits.

All others, integers above all (BatchNorm counts its batches), have no such mean. They have to end alike in all shards
and micro-batches of a step, and then their mean is that value: whoever has another one than the mean has seen that they
do not. On a GPU that is read where losses are read, so that no step waits for it. A float64 holds whole numbers up to
2**53 only, so 64-bit ones are summed as two of 32 bits.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from samestep.launcher.contract import UsageError
from samestep.train.parallel.buffer_mistakes import changed_late, gone, is_complex, reshaped, unlike
from samestep.train.parallel.group import Group, gather_json
from samestep.train.parallel.no_buffers import NOTHING, NoBuffers
from samestep.train.parallel.shards import MicroBatch, StepPlan, owned_span


class BufferCombiner:
    """Used as begin, (before, after) for each micro-batch, `of_shard` after each shard, finish with their sum.

    After `finish`, `undo` brings back what `begin` found; `settle` judges what was not read from a GPU yet.
    """

    def __init__(self, model: nn.Module, group: Group, shards: int) -> None:
        # Where each buffer is kept, not the tensor: wrapping the model, and user code, can put another one there.
        self._places = _places(model)
        self._saved = model.state_dict().keys()  # what a checkpoint of the model has
        self.buffers: dict[str, Tensor] = {}
        self.group = group
        self.shards = shards
        self.owned = owned_span(group.rank, group.world_size, shards)
        self.changing: list[str] | None = None  # agreed by all ranks in the first step
        self._base: dict[str, Tensor] = {}
        self._versions: dict[str, tuple[Tensor, int]] = {}
        self._leaf: Tensor | None = None  # of the shard's parts so far, weighed by their samples
        self._names: list[str] = []
        self._sizes: dict[str, int] = {}  # numbers of each that are summed
        self._whole: list[str] = []  # of the names, integers
        self.known: set[str] = set()  # that changed before the start of this process
        self._touched: set[str] = set()  # written or put anew in the first step, with the same values
        self._repeated: dict[str, Tensor] = {}  # their values, of those that no shard changed
        self._reshaped: set[str] = set()  # put anew in another shape or type in the first step
        self._open: list[tuple[int, Tensor, Tensor]] = []  # step, a part's integers and the mean: to be compared

    def begin(self, plan: StepPlan, *, keep: bool = False) -> None:
        """Remember the step's buffers where a later shard has to start from them, or `undo` may be called."""
        self._plan = plan
        self._read()
        self._single = min(plan.samples, self.shards) == 1 and len(plan.parts(0)) == 1
        self._leaf = None
        self._changed: set[str] = set()
        self._integers: list[Tensor] = []  # of this rank's parts
        names = self._ordered(set(self.buffers)) if self.changing is None else self.changing
        if names is not self._names:
            self._names = names
            self._sizes = {name: self.buffers[name].numel() * (1 + _is_long(self.buffers[name])) for name in names}
            self._whole = [name for name in names if self._is_integer(name)]
            self._count = sum(self._sizes[name] for name in self._whole)
        stay = self._single and self.group.world_size == 1  # what the one shard leaves is right, and here
        self.width = 0 if stay else sum(self._sizes.values())
        if self.changing is None or keep or len(plan.present(self.owned)) > 1 or plan.micro_batches > 1:
            found = [self.buffers[name] for name in self._names]
            if self._base:
                torch._foreach_copy_(list(self._base.values()), found)
            else:
                self._base = {name: value.clone() for name, value in zip(self._names, found, strict=True)}
        self._first = True

    def before(self, part: MicroBatch) -> None:  # noqa: ARG002 (the same for all parts)
        """Bring the step's buffers back."""
        self._read()
        if not self._first:
            self.undo()
        self._first = False
        self._versions = {name: (buffer, buffer._version) for name, buffer in self.buffers.items()}

    def after(self, part: MicroBatch) -> None:
        """Take what a part of a shard left in the buffers that it changed, or put in their places."""
        self._read()
        if self.changing is None:
            self._note_changes()
        else:
            self._refuse_new()
        if self.width:
            flat = self._flat()
            if self._count and not self._single:
                self._integers.append(flat[-self._count :].clone())
            weighed = flat if self._single else flat * part.samples
            self._leaf = weighed if part.first or self._leaf is None else self._leaf + weighed

    def of_shard(self) -> Tensor:
        """What the shard that is over adds to the sum: float64, shape (width,)."""
        leaf, self._leaf = self._leaf, None
        return NOTHING if leaf is None else leaf

    def finish(self, total: Tensor) -> None:
        """Leave the combined buffers on every rank; `total` is the sum over all shards, `width` numbers.

        Raises:
            UsageError: an integer buffer did not end alike in all shards.
        """
        self._read()
        first = self.changing is None
        if first:
            self._agree()
        if not self.changing or not self.width:
            return
        combined = total if self._single else total / self._plan.samples
        if self._count and not self._single and not first:
            self._compare(combined[-self._count :])
        for name, value in zip(self._names, combined.split(list(self._sizes.values())), strict=True):
            if name in self.changing:
                self.buffers[name].copy_(self._value(name, value))

    def undo(self) -> None:
        """Bring the step's buffers back, where `keep` was asked for: the step has not taken place."""
        base = self._base
        if self.changing is None:  # others may be views that can't be written to
            base = {name: value for name, value in base.items() if not torch.equal(self.buffers[name], value)}
        if base:
            torch._foreach_copy_([self.buffers[name].detach() for name in base], list(base.values()))

    def unsaved(self) -> dict[str, Tensor]:
        """Buffers that change, or may do so, and are no part of the model's state_dict (`persistent=False`)."""
        self._read()
        names = self.buffers if self.changing is None else self.changing
        return {name: self.buffers[name] for name in names if name not in self._saved}

    def settle(self) -> None:
        """Judge the integer buffers of steps that were not judged yet.

        Raises:
            UsageError: as `finish`.
        """
        opened, self._open = self._open, []
        if not opened or torch.equal(torch.stack([own for _, own, _ in opened]), torch.stack([m for *_, m in opened])):
            return
        for step, own, mean in opened:
            unlike = own.ne(mean).tolist()
            if any(unlike):
                raise self._unlike_at(unlike.index(True), step, own, mean)

    def _compare(self, mean: Tensor) -> None:
        """What each part of this rank left, or an integer where it had none, with the mean over all of them."""
        late = mean.device.type != "cpu"
        mean = mean.clone() if late else mean  # without the rest
        self._open += [(self._plan.step, own, mean) for own in self._integers or [mean.trunc()]]
        if not late:
            self.settle()

    def _unlike_at(self, place: int, step: int, own: Tensor, mean: Tensor) -> UsageError:
        ends = itertools.accumulate(self._sizes[name] for name in self._whole)
        name, end = next((name, end) for name, end in zip(self._whole, ends, strict=True) if place < end)
        begin, halves = end - self._sizes[name], 1 + _is_long(self.buffers[name])
        number = (place - begin) // halves
        one = int(self._value(name, own[begin:end]).flatten()[number])
        average = mean[begin:end].view(-1, halves)[number].tolist()
        # signed low halves of large numbers have another mean than the numbers
        small = halves == 1 or (abs(one) < 1 << 31 and average[1] == -(one < 0))
        return unlike(name, step, one, f"{average[0]:g} on average" if small else "another in others")

    def _read(self) -> None:
        places = self._places.items()
        self.buffers = {name: buffer for name, (kept, key) in places if (buffer := kept.get(key)) is not None}
        if len(self.buffers) < len(places):
            raise gone(next(name for name, _ in places if name not in self.buffers))

    def _note_changes(self) -> None:
        """By value: batch_norm writes running statistics without raising the tensor's version.

        One that is put anew in another shape or type is made from something else, such as a mask for the length of a
        batch. It is left to the forward, as is one that all shards make as it was; unless a checkpoint has it and it
        could be averaged: that is state which did not move yet, such as a spectral norm's vector.
        """
        for name, buffer in self.buffers.items():
            base, (before, version) = self._base.get(name), self._versions[name]
            if base is None or not _alike(base, buffer):
                self._base.pop(name, None)
                self._reshaped.add(name)
            elif not torch.equal(buffer, base):
                self._changed.add(name)
            elif buffer is not before or buffer._version != version:
                self._touched.add(name)

    def _refuse_new(self) -> None:
        for name, buffer in self.buffers.items():
            before, version = self._versions[name]
            if buffer is before and buffer._version == version:
                continue
            if name in self._saved and not _alike(before, buffer):
                raise reshaped(name, self._plan.step)
            if name in (self.changing or ()) or name in self._reshaped:
                continue
            constant = self._repeated.get(name)
            if constant is None or (buffer.shape == constant.shape and not torch.equal(buffer, constant)):
                raise changed_late(name, self._plan.step)

    def _flat(self) -> Tensor:
        return torch.cat([self._numbers(name) for name in self._names])

    def _numbers(self, name: str) -> Tensor:
        buffer, size = self.buffers[name].detach(), self._sizes[name]
        real = buffer.real if buffer.is_complex() else buffer  # complex ones do not change, or _agree says so
        flat = real.reshape(-1)
        if _is_long(buffer) and 2 * flat.numel() == size:
            flat = flat.contiguous().view(torch.int32)
        fits = flat.numel() == size  # else not combined
        return flat.double() if fits else flat.new_zeros(size, dtype=torch.float64)

    def _value(self, name: str, numbers: Tensor) -> Tensor:
        """Inverse of `_numbers`."""
        buffer = self.buffers[name]
        if _is_long(buffer) and len(numbers) == 2 * buffer.numel():
            numbers = numbers.to(torch.int32).view(buffer.dtype)
        return numbers[: buffer.numel()].view_as(buffer)

    def _agree(self) -> None:
        """All ranks learn which buffers change, and whether integer ones do so alike."""
        told = gather_json(self.group, [sorted(self._changed), sorted(self._touched), sorted(self._reshaped)])
        changed, touched, self._reshaped = ({name for part in told for name in part[kind]} for kind in range(3))
        for name in sorted(self._reshaped & self._saved):
            raise reshaped(name, self._plan.step)
        written = {name for name in touched & self._saved if self.buffers[name].is_floating_point()}
        self.changing = self._ordered((changed | written | self.known) - self._reshaped)
        same = touched - self._reshaped - set(self.changing)
        self._repeated = {name: self.buffers[name].detach().clone() for name in same}
        self._base = {name: self._base[name] for name in self.changing}
        shared = self.shards > 1 or self.group.world_size > 1 or self._plan.micro_batches > 1
        for name in self.changing if shared else ():
            if self.buffers[name].is_complex():
                raise is_complex(name)
        if self._single or not any(map(self._is_integer, self.changing)):
            return
        records = gather_json(self.group, self._values())
        for name in filter(self._is_integer, self.changing):
            first, *others = [value for part in records for value in part.get(name, [])]
            for other in others:
                for left, right in zip(first, other, strict=True):
                    if left != right:
                        raise unlike(name, self._plan.step, left, f"{right} in another")

    def _values(self) -> dict[str, list[Any]]:
        """What this rank's parts left in the integer buffers that change: the different values of each."""
        if not self._integers:
            return {}
        rows = torch.stack(self._integers).cpu().long()
        columns = zip(self._whole, rows.split([self._sizes[name] for name in self._whole], dim=1), strict=True)
        changing = [(name, column.unique(dim=0)) for name, column in columns if name in (self.changing or [])]
        return {name: [self._value(name, row).flatten().tolist() for row in rows] for name, rows in changing}

    def _is_integer(self, name: str) -> bool:
        return not self.buffers[name].is_floating_point()

    def _ordered(self, names: set[str]) -> list[str]:
        """Integers last."""
        return sorted((name for name in self.buffers if name in names), key=self._is_integer)


def combiner(model: nn.Module, group: Group, shards: int) -> BufferCombiner | NoBuffers:
    """What combines the buffers of `model`, where it has any."""
    return NoBuffers() if next(model.buffers(), None) is None else BufferCombiner(model, group, shards)


def _places(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """By name the dict of the module that owns a buffer, and its key there; two modules may hold one tensor."""
    return {
        f"{path}.{key}".lstrip("."): (module._buffers, key)
        for path, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    }


def _is_long(buffer: Tensor) -> bool:
    """Whether it holds whole numbers of 64 bits."""
    return buffer.dtype in (torch.int64, torch.uint64)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype
