"""The lists of samples that a rank fetches: its shards of every global batch, in the one order of the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from samestep.launcher.contract import UsageError
from samestep.train.data.order import permute
from samestep.train.parallel.shards import StepPlan, owned_span, slice_of

_CHUNK = 1 << 16  # positions permuted at once: enough to hide numpy's overhead, little memory


class ShardSamples(list[int]):
    """Sample ids of one shard, with the epoch they are drawn in; an ordinary list for any dataset."""

    epoch: int = 0


def epoch_plans(
    samples: int, global_batch_size: int, shards: int, epoch: int, cursor: int, step: int, micro_batches: int = 1
) -> Iterator[StepPlan]:
    """The remaining steps of an epoch, from position `cursor` and after `step` completed optimizer steps."""
    while cursor < samples:
        end = min(cursor + global_batch_size, samples)
        yield StepPlan(step, epoch, cursor, end, shards, micro_batches)
        cursor, step = end, step + 1


class SameOrderSampler(DistributedSampler[Any]):
    """DistributedSampler whose order and batches do not depend on the number of ranks, workers or restarts.

    Iterating gives one list of sample ids for each of this rank's non-empty shards of each global batch: pass it as
    `batch_sampler=`. No sample is padded, repeated or dropped. `state_dict()` is the epoch and the cursor, counted in
    samples of finished batches, and can be loaded with any other number of ranks.

    Args:
        dataset: anything with a length.
        num_replicas: world size; that of the default process group if None, as in the base class.
        rank: this process; that of the default process group if None.
        shuffle: False keeps the dataset's own order.
        seed: with the epoch, the key of the order.
        drop_last: only False; accepted for compatibility.
        global_batch_size: samples of one optimizer step over all ranks.
        shards: V, the number of slices of a global batch; `num_replicas` if None.

    Raises:
        UsageError: global_batch_size or shards below 1, or drop_last.
        ValueError: rank outside [0, num_replicas), from the base class.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        *,
        global_batch_size: int,
        shards: int | None = None,
    ) -> None:
        super().__init__(cast("Dataset[Any]", dataset), num_replicas, rank, shuffle, seed, drop_last)
        if drop_last:
            raise UsageError("drop_last is expected to be False: every sample is used once an epoch", "leave it out")
        self.samples = len(cast(Sized, dataset))
        self.global_batch_size = _at_least_one("global_batch_size", global_batch_size)
        self.shards = _at_least_one("shards", self.num_replicas if shards is None else shards)
        self.owned = owned_span(self.rank, self.num_replicas, self.shards)
        self.cursor = 0

    def plans(self) -> Iterator[StepPlan]:
        """Steps that remain in this epoch, for all ranks alike; `step` counts from 0 in this iteration."""
        return epoch_plans(self.samples, self.global_batch_size, self.shards, self.epoch, self.cursor, 0)

    def samples_of(self, plan: StepPlan, shard: int) -> list[int]:
        """Sample ids of one shard of any step, of whatever rank."""
        positions = np.arange(*slice_of(plan.begin, plan.end, shard, self.shards), dtype=np.int64)
        ids = permute(positions, self.samples, self.seed, plan.epoch) if self.shuffle else positions
        return list(ids.tolist())

    def __iter__(self) -> Iterator[ShardSamples]:
        """Lists of this rank's remaining shards in this epoch."""
        epoch = self.epoch
        for ids in self.arrays():
            samples = ShardSamples(ids.tolist())
            samples.epoch = epoch
            yield samples

    def arrays(self) -> Iterator[npt.NDArray[np.int64]]:
        """The same lists as arrays, for datasets that are indexed by them."""
        ids, begin = np.empty(0, np.int64), self.cursor
        for plan in self.plans():
            if plan.end > begin + len(ids):
                begin = plan.begin
                positions = np.arange(begin, min(max(plan.end, begin + _CHUNK), self.samples), dtype=np.int64)
                ids = permute(positions, self.samples, self.seed, self.epoch) if self.shuffle else positions
            for shard in plan.present(self.owned):
                lo, hi = slice_of(plan.begin, plan.end, shard, self.shards)
                yield ids[lo - begin : hi - begin]

    def __len__(self) -> int:
        """Lists that iterating gives now."""
        remaining = max(0, self.samples - self.cursor)
        full, tail = divmod(remaining, self.global_batch_size)
        sizes = [(full, self.global_batch_size), (1, tail)]
        return sum(count * len(StepPlan(0, 0, 0, size, self.shards).present(self.owned)) for count, size in sizes)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch's order."""
        super().set_epoch(epoch)
        self.cursor = 0

    def state_dict(self) -> dict[str, int]:
        """Epoch and cursor; the caller moves the cursor when a batch is done."""
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken, with any number of ranks.

        Raises:
            UsageError: the cursor lies outside the dataset.
        """
        if not 0 <= state["cursor"] <= self.samples:
            raise UsageError(
                f"the dataset is expected to have at least {state['cursor']} samples, but has {self.samples}",
                "resume with the dataset that the checkpoint was made with",
            )
        super().set_epoch(state["epoch"])
        self.cursor = state["cursor"]


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise UsageError(f"{name} is expected to be at least 1, but is {value}")
    return value
