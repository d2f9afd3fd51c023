"""The order of a run. Read this first.

A run is epochs of steps. Between steps, on all ranks at once: losses are read and reported, the model is evaluated,
the state is saved. Nothing here asks which rank it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from samestep.train.config import TrainConfig
from samestep.train.data.loader import Loader
from samestep.train.data.sampler import SameOrderSampler, epoch_plans
from samestep.train.evaluate import Evaluator
from samestep.train.observe.guards.watch import Guards
from samestep.train.observe.ledger import Ledger
from samestep.train.observe.reporter import Reporter
from samestep.train.observe.tally import Values
from samestep.train.parallel.agreement import Agreement
from samestep.train.parallel.bucket_trial import Buckets
from samestep.train.parallel.shards import StepPlan
from samestep.train.recipe import Components
from samestep.train.schedule import advance, require_length
from samestep.train.state.held import HeldParts
from samestep.train.state.saver import Saver
from samestep.train.state.train_state import TrainState
from samestep.train.step import OptimizerStep


@dataclass(slots=True)
class Run:
    """Everything that a run is made of; see `assemble`."""

    config: TrainConfig
    components: Components
    state: TrainState
    loader: Loader
    sampler: SameOrderSampler
    step: OptimizerStep
    ledger: Ledger
    evaluator: Evaluator | None
    evaluated_model: nn.Module
    saver: Saver
    agreement: Agreement
    buckets: Buckets
    reporter: Reporter
    guards: Guards
    held: HeldParts
    progress: Callable[[int, str], None]  # told step and phase, for error records

    @property
    def max_steps(self) -> int:
        """Steps after which the run is over, counted from what is left: batches may have had another size before."""
        samples, size, state = self.sampler.samples, self.config.global_batch_size, self.state
        whole = state.step
        if state.epoch < self.config.epochs:
            whole += -(-(samples - state.cursor) // size) - (-samples // size) * (self.config.epochs - state.epoch - 1)
        if self.config.replay is not None:
            whole = min(whole, self.config.replay)
        whole = whole if self.config.max_steps is None else min(whole, self.config.max_steps)
        return max(whole, self.state.step)


def require_schedule(run: Run) -> None:
    """See whether the scheduler lasts until the end.

    Raises:
        UsageError: it was made for fewer steps, or epochs.
    """
    scheduler, done = run.components.scheduler, run.state
    if run.components.scheduler_interval == "step":
        require_length(scheduler, done.step, run.max_steps - done.step, "steps")
    elif run.config.max_steps is None and run.config.replay is None:
        require_length(scheduler, done.epoch, run.config.epochs - done.epoch, "epochs")


def run_to_the_end(run: Run) -> None:
    """Train until the last step, or the one after which all ranks agreed to stop; return when its state is saved."""
    for plan, batches, last in steps_to_go(run):
        run.guards.before_step(plan)
        rows = run.step(plan, batches)
        run.guards.after_step(plan)
        after_step(run, plan, rows, last=last)
    save_the_end(run)


def steps_to_go(run: Run) -> Iterator[tuple[StepPlan, Iterator[Any], bool]]:
    """The steps of all epochs from where the state is: plan, the epoch's batches, and whether it is the last one."""
    config, state = run.config, run.state
    while state.step < (max_steps := run.max_steps) and not run.agreement.stop:
        run.progress(state.step, "loading")
        run.step.clock.skip()
        run.sampler.load_state_dict({"epoch": state.epoch, "cursor": state.cursor})
        batches = iter(run.loader)
        run.components.model.train()
        cut = (config.global_batch_size, run.sampler.shards, state.epoch, state.cursor, state.step)
        for plan in epoch_plans(run.sampler.samples, *cut, run.step.micro_batches.agreed.count):
            run.progress(plan.step, "step")
            last = plan.step + 1 >= max_steps
            yield plan, batches, last
            if last or run.agreement.stop:
                break


def after_step(run: Run, plan: StepPlan, rows: Values, *, last: bool) -> None:
    """Count a step with these losses as done, and do what is due: report, evaluate, end the epoch, save."""
    config, state = run.config, run.state
    run.held.after_step()
    run.ledger.add(plan, rows, run.step.clock.take())
    state.advance(plan)
    run.saver.tell(run.reporter)
    epoch_done = state.cursor == run.sampler.samples
    evaluate, due = _evaluation_due(run, epoch_done), run.saver.due(state.step) or last
    if state.step % config.log_every == 0 or epoch_done or evaluate or due:
        _report(run)
    better = evaluate and _evaluate(run)
    if epoch_done:
        _end_epoch(run)
    if due or better:
        run.progress(state.step, "checkpoint")
        run.saver.save(state, run.reporter)
        run.step.clock.skip()


def save_the_end(run: Run) -> None:
    """No batch is wanted any more; return when the state is on disk."""
    run.loader.close()
    if run.evaluator is not None:
        run.evaluator.loader.close()
    run.progress(run.state.step, "checkpoint")
    run.saver.save(run.state, run.reporter)
    run.saver.wait(run.reporter)


def _report(run: Run) -> None:
    run.held.require_same()
    run.step.guard.settle()
    run.state.buffers.settle()
    run.ledger.epoch = run.state.sums
    records = run.ledger.flush(run.step.shards.tally.extras or [])
    if records is None:
        return
    run.state.useful_seconds += sum(records.walls)
    run.reporter.steps(records)
    if slow := run.ledger.slow_rank:
        run.reporter.warning(str(slow), rank=slow.rank, phase=slow.phase)
    if decided := run.buckets.took(records.plans[0].step, records.walls):
        run.reporter.note(decided)


def _evaluation_due(run: Run, epoch_done: bool) -> bool:
    if run.evaluator is None:
        return False
    every = run.config.eval_every
    return epoch_done if every is None else run.state.step % every == 0


def _evaluate(run: Run) -> bool:
    """Evaluate; True where the state is now the best by the metric of `--best`."""
    evaluator, state = run.evaluator, run.state
    assert evaluator is not None
    run.progress(state.step, "evaluation")
    evaluation = evaluator(run.evaluated_model)
    state.metrics = evaluation.metrics
    run.step.clock.skip()
    run.reporter.evaluated(state.step, state.epoch, evaluation)
    if slow := evaluation.slow_rank:
        run.reporter.warning(str(slow), rank=slow.rank, phase=slow.phase)
    scheduler = run.components.scheduler
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(state.metrics[run.components.plateau_metric])
    return state.note_best(run.config.best)


def _end_epoch(run: Run) -> None:
    scheduler = run.components.scheduler
    if run.components.scheduler_interval == "epoch" and not isinstance(scheduler, ReduceLROnPlateau | None):
        advance(scheduler)
    run.reporter.epoch(run.state.epoch, run.state.sums)
    run.state.end_epoch()
