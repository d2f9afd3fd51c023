"""Evaluation over the whole of a dataset, each sample exactly once, with the same bits on any world size."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from samestep.launcher.contract import UsageError
from samestep.train.data.cut import empty_batch, has_no_rows
from samestep.train.data.device import wait_for
from samestep.train.data.loader import Loader
from samestep.train.data.rng import seed_evaluation
from samestep.train.data.sampler import SameOrderSampler
from samestep.train.observe.evaluation import Evaluation, EvaluationWatch
from samestep.train.observe.tally import Value, Values, table
from samestep.train.parallel.group import Group
from samestep.train.parallel.shards import Span, StepPlan, owned_span
from samestep.train.recipe import Components, Loss, is_mean_of_nothing, weigh
from samestep.train.state_metrics import StateMetrics


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """model.eval() without gradients; afterwards each module is back in the mode it was in."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def _gradients_named(name: str) -> Iterator[None]:
    """Say why a function that differentiates by itself fails here."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise UsageError(
            f"{name} is expected to work in evaluations, which compute no gradients, but asks for some: {error}",
            "branch on torch.is_grad_enabled() in it, or leave eval_data out",
        ) from error


@dataclass(slots=True)
class Evaluator:
    """Averages the loss and the metrics over a dataset. Calling it is a collective."""

    functions: dict[str, Loss]
    state_metrics: StateMetrics
    loader: Loader
    sampler: SameOrderSampler
    group: Group
    device: torch.device
    seed: int
    autocast: AbstractContextManager[None]
    tell: Callable[[str], None]  # a sign of life for each batch
    now: Callable[[], float] = field(default_factory=lambda: time.perf_counter)
    _watch: EvaluationWatch = field(default_factory=EvaluationWatch)

    def __call__(self, model: nn.Module) -> Evaluation:
        """One value a function, in float64: sum of totals over sum of weights, in the dataset's order."""
        begin = self.now()
        rows: list[Values] = []
        self.state_metrics.begin()
        with evaluation_mode(model):
            batches = iter(self.loader)
            for number, plan in enumerate(self.sampler.plans()):
                for shard in plan.present(self.sampler.owned):
                    self.tell("evaluation")
                    batch = next(batches)
                    seed_evaluation(self.seed, plan.step, shard)
                    rows.append(self._row(model, batch, plan, shard))
                    with self.autocast:
                        self.state_metrics.add(model, batch, number * self.sampler.shards + shard)
        wait_for(self.device)
        spans, counts = self._shards_by_rank()
        own_seconds, by_rank = self._gather(rows, self.now() - begin, max(counts))
        sums = self._in_order(by_rank, spans).cumsum(0)[-1].tolist()
        values = {}
        for index, name in enumerate(self.functions):
            total, weight = sums[2 * index : 2 * index + 2]
            values[name] = total / weight if weight else float("nan")
        values |= self.state_metrics.values()
        slow = self._watch.add(own_seconds, counts)
        return Evaluation(values, self.sampler.samples, self.now() - begin, own_seconds, slow)

    def _row(self, model: nn.Module, batch: Any, plan: StepPlan, shard: int) -> Values:
        values: list[Value] = []
        with self.autocast:
            for name, function in self.functions.items():
                with _gradients_named(name):
                    outcome = weigh(function(model, batch), plan.size(shard), name)
                if has_no_rows(batch) and is_mean_of_nothing(outcome):
                    raise empty_batch(self.sampler.samples_of(plan, shard), name)
                weight = outcome.weight.reshape(()) if isinstance(outcome.weight, Tensor) else outcome.weight
                values += [outcome.total.reshape(()), weight]
        return [values]

    def _shards_by_rank(self) -> tuple[list[Span], list[int]]:
        """Which shards each rank has, and through how many batches it goes by that."""
        ranks = range(self.group.world_size)
        spans = [owned_span(rank, len(ranks), self.sampler.shards) for rank in ranks]
        return spans, [sum(len(plan.present(span)) for plan in self.sampler.plans()) for span in spans]

    def _gather(self, rows: list[Values], own_seconds: float, most: int) -> tuple[list[float], Tensor]:
        """Of each rank: seconds of its own work, and its rows, shape (world_size, most, 2 a function); on the host."""
        mine = torch.zeros(1 + most, 2 * len(self.functions), dtype=torch.float64, device=self.device)
        mine[0, 0] = own_seconds
        if rows:
            mine[1 : 1 + len(rows)] = table(rows, 1, mine.shape[1], self.device)[:, 0]
        gathered = self.group.gather(mine).cpu()
        return gathered[:, 0, 0].tolist(), gathered[:, 1:]

    def _in_order(self, by_rank: Tensor, spans: list[Span]) -> Tensor:
        """Rows of all ranks, in the order of steps and shards, whoever computed them."""
        coming = [iter(rows) for rows in by_rank]
        plans = self.sampler.plans()
        return torch.stack([next(coming[r]) for plan in plans for r, s in enumerate(spans) for _ in plan.present(s)])


def require_metrics(components: Components, best: str | None, names: Collection[str]) -> None:
    """Refuse a name of a metric, wherever one is given, that the evaluation will not have.

    Raises:
        UsageError: `--best` or `plateau_metric` names none, or there is no evaluation for them.
    """
    known = ", ".join(names)
    if best is not None and (components.eval_data is None or best.partition(":")[2] not in names):
        there = known if components.eval_data is not None else "none without eval_data"
        raise UsageError(f"--best is expected to name a metric of the evaluation ({there}), but is {best}")
    if not isinstance(components.scheduler, ReduceLROnPlateau):
        return
    if components.eval_data is None:
        raise UsageError(
            "eval_data is expected, since ReduceLROnPlateau is stepped after each evaluation, but there is none",
            "pass eval_data to Components, or another scheduler",
        )
    if components.plateau_metric not in names:
        named = components.plateau_metric
        raise UsageError(f"plateau_metric is expected to name a metric of the evaluation ({known}), but is {named}")
