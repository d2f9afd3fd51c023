"""A shard in several parts, one after the other, where a device's memory is too small for its whole batch.

The number of parts moves bits, so all ranks must have the same from the same step on. A rank that runs out of memory
therefore fails like any other, but first leaves a note in the run directory: the next start, from the newest
checkpoint, begins with twice as many parts on every rank. Global batch and weights stay as they are.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from samestep.launcher.contract import ErrorRecord
from samestep.train import last_start
from samestep.train.data.cut import cut, obstacle
from samestep.train.parallel.group import Group, gather_json
from samestep.train.parallel.shards import MicroBatch, smallest_shard

_ACTIVE = ("forward", "backward", "sync")  # where activations are in memory, which smaller batches make smaller


@dataclass(frozen=True, slots=True)
class Agreed:
    """The number of parts of a shard on all ranks; `why` is empty where nothing ran out of memory."""

    count: int = 1
    why: str = ""


def agree(asked: int | Literal["auto"], stored: dict[str, Any], note: Path, group: Group) -> Agreed:
    """What rank zero finds: the option, else the last start's number, or the one noted since then. A collective.

    Raises:
        UsageError: the note was edited into none.
    """
    found = last_start.settings(note)
    count = max(stored.get("micro_batches", 1), found.get("micro_batches", 1))
    mine = [count, str(found.get("why", ""))] if asked == "auto" else [asked, ""]
    count, why = gather_json(group, mine)[0]
    return Agreed(count, why)


def warnings(agreed: Agreed, stored: dict[str, Any], model: nn.Module) -> list[str]:
    """Sentences at a start whose bits are not those of one part a shard, or of the last start."""
    before = stored.get("micro_batches", agreed.count)
    changed = [f"micro-batches changed from {before} to {agreed.count} since the last start"] * (before != agreed.count)
    reason = [agreed.why] * (agreed.count > 1 and bool(agreed.why))
    if not changed and not reason:
        return []
    text = (
        f"{', '.join([*reason, *changed])}: each shard runs in {agreed.count} parts, with the same samples and "
        "weights, but the bits of the following steps can differ"
    )
    if has_batch_norm(model):
        text += (
            "; BatchNorm's statistics are those of a part (GroupNorm and LayerNorm do not depend on how a batch is cut)"
        )
    return [text]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the model looks at several samples at once."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def largest_count(model: nn.Module, samples: int, global_batch_size: int, shards: int) -> int:
    """Parts beyond which nothing gets smaller, or a BatchNorm1d, which fails on a single sample, could get one."""
    if any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        return max(1, smallest_shard(samples, global_batch_size, shards) // 2)
    return -(-min(samples, global_batch_size) // shards)


@dataclass(slots=True)
class MicroBatches:
    """Cuts batches, and knows what to do about a lack of memory.

    Attributes:
        agreed: the parts of a shard.
        halving: whether their number may grow.
        most: see `largest_count`.
        note: file that the next start reads.
    """

    agreed: Agreed
    halving: bool
    most: int
    note: Path
    _whole: str | None = None  # why batches can't be cut; None: none was looked at

    def cut(self, batch: Any, part: MicroBatch, samples: int) -> Any:
        """The part's samples of a shard's batch.

        Raises:
            UsageError: the batch can't be cut.
        """
        if self._whole is None:
            self._whole = obstacle(batch, samples)
        return cut(batch, part, samples)

    def after(self, error: BaseException, record: ErrorRecord) -> ErrorRecord:
        """The record of an error with what the next start does about it, if that can be done here."""
        if not isinstance(error, torch.OutOfMemoryError) or record.phase not in _ACTIVE:
            return record
        count, reason = min(2 * self.agreed.count, self.most), self._why_not()
        if not reason:
            why = f"rank {record.rank} ran out of memory in step {record.step + 1}"
            try:
                temporary = self.note.with_suffix(f".tmp-{os.getpid()}")
                temporary.write_text(json.dumps({"micro_batches": count, "why": why}) + "\n")
                temporary.rename(self.note)
            except OSError as problem:
                reason = f"{self.note} can't be written ({problem.strerror}); pass --micro-batches {count}"
        if reason:
            return replace(record, hint=reason)
        return replace(record, remedied=True, hint=f"the next start cuts each shard's batch into {count} micro-batches")

    def _why_not(self) -> str:
        less = "activation checkpointing or --precision bf16 need less memory"
        if not self.halving:
            return f"--micro-batches auto, or more than {self.agreed.count}, needs less memory"
        if self._whole:
            return f"a batch can't be cut into micro-batches ({self._whole}); more --shards, {less}"
        if self.agreed.count >= self.most:
            return f"{self.agreed.count} micro-batches a shard are as many as its samples allow; more --shards, {less}"
        return ""
