"""Batches that are not what the plan says: positions left out or repeated, samples lost in collating."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from samestep.train.observe.guards.check import Check, Finding
from samestep.train.parallel.shards import StepPlan


class PlannedBatches(Check):
    """Each step begins where the one before ended, and each shard's batch has as many samples as planned."""

    def __init__(self) -> None:
        self._last: StepPlan | None = None

    def before_step(self, plan: StepPlan) -> Iterator[Finding]:
        """Compare with the step before."""
        last, self._last = self._last, plan
        if last is None:
            return
        begin = last.end if plan.epoch == last.epoch else 0
        if plan.begin != begin or plan.step != last.step + 1:
            yield Finding(
                f"step {plan.step + 1} is expected to begin at sample {begin} of the epoch's order, "
                f"but begins at {plan.begin}",
                "something moved the sampler or the state between steps: leave both to the loop",
                fatal=True,
            )

    def forget(self) -> None:
        """The next step may begin anywhere."""
        self._last = None

    def before_loss(self, batch: Any, samples: int) -> Iterator[Finding]:
        """Count, where all tensors of a batch agree on how many samples there are; packed ones do not."""
        lengths = {len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
        if len(lengths) == 1 and lengths != {samples}:
            yield Finding(
                f"a batch of {samples} samples was planned, but collating made one of {lengths.pop()}",
                "collate_fn, or the dataset's __getitems__, drops or repeats samples; for packed batches this is fine: "
                "return Weighted(total, weight)",
            )
