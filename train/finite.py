"""Steps whose loss or gradient is NaN or infinite: seen by all ranks in the same step, before the optimizer runs.

A loss that is not finite starts its backward from NaN instead of one, so that its gradient, and with it the sum over
all shards that every rank holds, is not finite either: no rank has to ask another one. torch's own check for GradScaler
then looks at the sum once. With `--precision fp16` the scaler leaves such steps out, and nothing is checked here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, SupportsFloat

import torch
from torch import Tensor

from samestep.launcher.contract import RefusedStepError, RunDir
from samestep.train.data.cut import empty_batch, has_no_rows
from samestep.train.data.sampler import SameOrderSampler
from samestep.train.finite_gradients import any_not_finite
from samestep.train.parallel.group import Group, gather_json
from samestep.train.parallel.shards import StepPlan
from samestep.train.recipe import Outcome, is_mean_of_nothing

MOST_IN_A_ROW = 10  # a run that leaves out more steps than that one after another learns nothing any more
_SHOWN = 12  # sample ids in a sentence; the file has all

Rows = Sequence[Sequence[SupportsFloat]]  # of this rank's shards in a step, the loss first (see StepTally)


def start_of_backward(loss: Tensor, number: float | None = None) -> Tensor:
    """What backward starts from: exactly one, or NaN where `loss`, a scalar, is not finite, as `number` if it was read.

    Without a number it is read from a CPU and nowhere else: nothing waits for a device.
    """
    if number is None:
        if loss.device.type != "cpu":
            return torch.add(_one(loss.dtype, loss.device), loss.detach(), alpha=0)
        number = loss.item()
    return _filled(1.0 if math.isfinite(number) else math.nan, loss.dtype, loss.shape)


@lru_cache(maxsize=16)
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


@lru_cache(maxsize=16)
def _filled(value: float, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.full(shape, value, dtype=dtype)


@dataclass(frozen=True, slots=True)
class BadStep:
    """A step that is not finite; equal on every rank.

    `samples` are those of the shards whose loss is not finite, on `ranks`. Where it is the gradient alone, `ranks` is
    empty, and the samples are those of the whole step.
    """

    step: int  # counted from 1
    epoch: int  # counted from 1
    ranks: tuple[int, ...]
    samples: tuple[int, ...]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.samples[:_SHOWN])) + (", ..." if len(self.samples) > _SHOWN else "")
        what = f"loss of step {self.step} on rank {', '.join(map(str, self.ranks))}"
        what = what if self.ranks else f"gradient of step {self.step}"
        return f"the {what} is not finite: NaN or infinity came from among samples {shown}"


class RewindError(Exception):
    """Every rank is to go back to the last checkpoint, and to pass over `bad.step` when it comes there again."""

    def __init__(self, bad: BadStep) -> None:
        super().__init__(str(bad))
        self.bad = bad


@dataclass(slots=True)
class Investigation:
    """Finds out whose loss it was, and writes that down. Calling it is a collective."""

    group: Group
    sampler: SameOrderSampler
    run_dir: RunDir
    hint: str = "look at these samples and at the learning rate; --nan-policy skip leaves such batches out"

    def __call__(self, plan: StepPlan, rows: Rows) -> BadStep:
        """Look at the losses of this rank's shards, and at what the others found."""
        shards = plan.present(self.sampler.owned)
        mine = [shard for shard, row in zip(shards, rows, strict=True) if not math.isfinite(float(row[0]))]
        by_rank = gather_json(self.group, mine)
        guilty = [shard for found in by_rank for shard in found] or range(plan.shards)
        samples = tuple(sample for shard in guilty for sample in self.sampler.samples_of(plan, shard))
        bad = BadStep(plan.step + 1, plan.epoch + 1, tuple(r for r, found in enumerate(by_rank) if found), samples)
        if self.group.rank == 0:
            self._write(bad)
        return bad

    def require_rows(self, batch: Any, outcome: Outcome, plan: StepPlan, shard: int) -> None:
        """Judge a loss over a batch in which nothing is left of the shard's samples; its gradient may be 0.

        Raises:
            UsageError: it is a mean over nothing.
        """
        if has_no_rows(batch) and is_mean_of_nothing(outcome):
            raise empty_batch(self.sampler.samples_of(plan, shard))

    def _write(self, bad: BadStep) -> None:
        about = {"step": bad.step, "epoch": bad.epoch, "ranks": bad.ranks, "samples": bad.samples}
        self.run_dir.errors.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.run_dir.not_finite(bad.step).write_text(json.dumps(about) + "\n")


class FiniteGuard(Protocol):
    """Asked before each update."""

    investigate: Investigation
    keeps_buffers: bool  # the model's buffers may have to be brought back to the begin of a step

    def admits(self, plan: StepPlan, gradients: Sequence[Tensor], rows: Rows) -> bool:
        """Whether the optimizer may use the gradients; `rows` are those of this rank's shards."""

    def settle(self) -> None:
        """Judge what was not read from the device yet."""


@dataclass(slots=True)
class Unguarded:
    """Where a GradScaler looks already."""

    investigate: Investigation
    keeps_buffers: bool = False

    def admits(self, plan: StepPlan, gradients: Sequence[Tensor], rows: Rows) -> bool:  # noqa: ARG002
        """It may."""
        return True

    def settle(self) -> None:
        """Nothing is open."""


@dataclass(slots=True)
class Stopper:
    """`stop`: the first bad step ends the run.

    On a GPU the flag is read at log intervals and before saves, so that no step waits for the device. An update from a
    bad step is then in memory already; it goes with the process and is never saved.
    """

    investigate: Investigation
    keeps_buffers: bool = False
    _open: list[tuple[StepPlan, Tensor, Rows]] = field(default_factory=list)

    def admits(self, plan: StepPlan, gradients: Sequence[Tensor], rows: Rows) -> bool:
        """It may, or RefusedStepError is raised now or by `settle`."""
        found = any_not_finite(gradients)
        if found.device.type == "cpu":
            self._judge(plan, found.item(), rows)
        else:
            self._open.append((plan, found, rows))
        return True

    def settle(self) -> None:
        """Raise for the first bad step.

        Raises:
            RefusedStepError: on every rank.
        """
        opened, self._open = self._open, []
        flags = torch.cat([found for _, found, _ in opened]).tolist() if opened else []
        for (plan, _, rows), found in zip(opened, flags, strict=True):
            self._judge(plan, found, rows)

    def _judge(self, plan: StepPlan, found: float, rows: Rows) -> None:
        if found:
            raise refused(self.investigate(plan, rows), self.investigate)


@dataclass(slots=True)
class Skipper:
    """`skip` and, with `go_back`, `rewind`; reads the flag in each step, as GradScaler does.

    `passed_over` are steps, counted from 1, whose batch is left out; part of the run's state.
    """

    investigate: Investigation
    passed_over: set[int]
    warn: Callable[[str], None]
    go_back: bool = False
    keeps_buffers: bool = True

    def admits(self, plan: StepPlan, gradients: Sequence[Tensor], rows: Rows) -> bool:
        """False for a step that is left out.

        Raises:
            RewindError: the step is bad, and it is not known yet.
            RefusedStepError: so were the steps before it.
        """
        step = plan.step + 1
        if step in self.passed_over:
            return False
        if not bool(any_not_finite(gradients)):
            return True
        bad = self.investigate(plan, rows)
        if self.passed_over.issuperset(range(step - MOST_IN_A_ROW, step)):
            raise refused(bad, self.investigate, f", and neither were the {MOST_IN_A_ROW} steps before it")
        if self.go_back:
            raise RewindError(bad)
        self.passed_over.add(step)
        self.warn(f"{bad}; no update in this step")
        return False

    def settle(self) -> None:
        """Nothing is open."""


def refused(bad: BadStep, by: Investigation, more: str = "") -> RefusedStepError:
    """The error that ends the run: of the rank whose loss it was, or of rank zero."""
    return RefusedStepError(
        f"{bad}{more}",
        by.hint,
        consequence=by.group.rank not in (bad.ranks or (0,)),
    )


def guard(policy: str, investigate: Investigation, passed_over: set[int], warn: Callable[[str], None]) -> FiniteGuard:
    """What `--nan-policy` names."""
    if policy == "stop":
        return Stopper(investigate)
    return Skipper(investigate, passed_over, warn, go_back=policy == "rewind")
