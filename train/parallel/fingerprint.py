"""Whether all ranks still hold the same state: a few integers that ride in a gather that happens anyway."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samestep.launcher.contract import ExitCode, UsageError
from samestep.train.data.order import key
from samestep.train.parallel.group import Group, gather_json

_NAMES = ("weights", "step", "cursor", "configuration")
_HINTS = {
    "dataset": "what build draws from torch's, numpy's or Python's global random numbers is the same on all ranks, but "
    "not what it draws from a generator of its own without a seed, nor what it reads from files that differ by host or "
    "come in another order (sort them)"
}


@dataclass(slots=True)
class StateFingerprint:
    """Sums the bit patterns of the parameters; `configuration` is any text that has to be equal on all ranks."""

    model: nn.Module
    group: Group
    configuration: int

    @classmethod
    def of(cls, model: nn.Module, group: Group, settings: dict[str, Any]) -> StateFingerprint:
        """Compare settings and initial weights of all ranks.

        Raises:
            UsageError: a rank has another value; names rank, key and both values.
        """
        texts = {name: str(value) for name, value in settings.items()}
        by_rank = gather_json(group, texts)
        for rank, other in enumerate(by_rank):
            for name, value in by_rank[0].items():
                if other.get(name) != value:
                    raise UsageError(
                        f"{name} is expected to be equal on all ranks, but is {value} on rank 0 "
                        f"and {other.get(name)} on rank {rank}",
                        _HINTS.get(name, "start all ranks with the same code, options and data"),
                    )
        digest = key(*json.dumps(texts, sort_keys=True).encode()) >> 1
        fingerprint = cls(model, group, digest)
        fingerprint.compare(group.gather(fingerprint.row(0, 0)), 0)
        return fingerprint

    def row(self, step: int, cursor: int) -> Tensor:
        """This rank's fingerprint: int64, shape (4,) in the order of `_NAMES`, on the parameters' device."""
        sums = self._sums()
        rest = torch.tensor([step, cursor, self.configuration], device=sums.device)
        return torch.cat([sums.sum().reshape(1), rest])

    def compare(self, rows: Tensor, step: int) -> None:
        """Judge the gathered rows, shape (world_size, 4). A collective where they differ.

        Raises:
            UsageError: (exit code 1) a rank differs; names rank, step and key, and for weights the first tensor.
        """
        different = (rows != rows[0]).nonzero()
        if not len(different):
            return
        rank, column = different[0].tolist()
        what = _NAMES[column]
        hint = "look for code that depends on the rank: a random number, a file, an environment variable"
        if what == "weights":
            sums = self.group.gather(self._sums())
            names = [name for name, _ in self.model.named_parameters()]
            what = f"weights (first {names[int((sums[rank] != sums[0]).nonzero()[0])]})"
            if step:  # else there was no forward yet
                hint += "; or for a forward that changes weights itself, which each rank does once a shard"
        raise UsageError(
            f"all ranks are expected to hold the same state, but after step {step} rank {rank} differs in its {what}",
            hint,
            ExitCode.FAILED,
        )

    def _sums(self) -> Tensor:
        return torch.stack([sum_of_bits(parameter.detach()) for parameter in self.model.parameters()])


def sum_of_bits(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bytes as 64-bit words, modulo 2**64; a sum of narrower words takes torch 25 times as long."""
    flat = tensor.contiguous().view(-1)
    whole = flat.numel() * flat.element_size() // 8 * 8 // flat.element_size()
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    if whole == flat.numel():
        return flat.view(torch.int64).sum()
    words, rest = flat[:whole].view(torch.int64), flat[whole:].view(torch.uint8)
    return words.sum() + rest.sum(dtype=torch.int64)
