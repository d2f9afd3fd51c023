"""The ranks of a run as one object: a process group, or the null object of a single process.

Both have the same methods, so nothing above asks whether there are other ranks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from samestep.train.parallel.shared_memory import LETTER_BYTES, Arena

# torch 2.13 gave the collective a new name and warns about the old one.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group(Protocol):
    """What the parts need of the other ranks. Every method is a collective: all ranks call it in the same order."""

    rank: int
    world_size: int

    @property
    def arena(self) -> Arena | None:
        """Memory of all ranks, where they compute on the CPU of one host."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Equal-shaped tensors of all ranks, stacked: shape (world_size, *tensor.shape)."""

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Any bytes of each rank, without pickle."""

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def collectives(self) -> int:
        """How many collectives this rank has entered, whoever called them. Not a collective."""


def gather_json(group: Group, value: Any) -> list[Any]:
    """What each rank brings, in the order of the ranks. A collective.

    Args:
        group: all ranks call with the same one.
        value: what JSON can write. It comes back as JSON reads it, also on the rank that brought it: tuples are lists.
    """
    return [json.loads(data) for data in group.gather_bytes(json.dumps(value).encode())]


@dataclass(slots=True)
class SoloGroup:
    """One process that talks to nobody."""

    rank: int = 0
    world_size: int = 1
    arena: None = None

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensor itself, with a leading dimension of one."""
        return tensor.unsqueeze(0)

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """The bytes themselves."""
        return [data]

    def barrier(self) -> None:
        """Nobody to wait for."""

    def collectives(self) -> int:
        """None."""
        return 0


@dataclass(slots=True)
class RankGroup:
    """The default process group of torch.distributed; tensors live on `device`."""

    rank: int
    world_size: int
    device: torch.device
    arena: Arena | None = None

    def gather(self, tensor: Tensor) -> Tensor:
        """One all_gather."""
        if self.arena is not None and tensor.numel() * tensor.element_size() <= LETTER_BYTES:
            return self.arena.gather(tensor)
        out = tensor.new_empty((self.world_size, *tensor.shape))
        all_gather(out.view(-1), tensor.contiguous().view(-1))
        return out

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Two all_gathers: lengths, then bytes padded to the longest."""
        lengths = self.gather(torch.tensor([len(data)], device=self.device)).flatten().tolist()
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8, device=self.device)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        rows = self.gather(padded).cpu().numpy()
        return [rows[rank, : lengths[rank]].tobytes() for rank in range(self.world_size)]

    def barrier(self) -> None:
        """Smallest gather: also works where a backend's own barrier would pick another device.

        It is read, since NCCL makes the device wait for others, and not the host.
        """
        self.gather(torch.zeros(1, device=self.device)).cpu()

    def collectives(self) -> int:
        """The backend's own count, 0.14 us, and that of meetings."""
        group: Any = dist.group.WORLD
        meetings = self.arena.meetings if self.arena is not None else 0
        return int(group._get_sequence_number_for_group()) + meetings
