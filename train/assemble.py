"""Makes every part of a run and connects them; what is chosen here is never asked again in the loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn

from samestep.launcher.contract import RunDir, UsageError
from samestep.launcher.heartbeat import NoPulse, Pulse
from samestep.train.checks import check_shard_size
from samestep.train.config import TrainConfig, plain
from samestep.train.data.loader import Loader, build_loader
from samestep.train.data.sampler import SameOrderSampler
from samestep.train.data.watch import Tell
from samestep.train.data.worker_stream import Epochs
from samestep.train.evaluate import Evaluator, require_metrics
from samestep.train.finite import FiniteGuard, Investigation, Unguarded
from samestep.train.finite import guard as finite_guard
from samestep.train.loop import Run
from samestep.train.micro_batches import Agreed, MicroBatches, largest_count
from samestep.train.moving_average import MovingAverage
from samestep.train.observe.event_log import EventLog
from samestep.train.observe.guards.check import Subject
from samestep.train.observe.guards.watch import Guards, NullGuards, guards_for
from samestep.train.observe.ledger import Ledger
from samestep.train.observe.memory import gradient_bytes
from samestep.train.observe.phases import CudaClock, HostClock
from samestep.train.observe.reporter import RankZeroReporter, Reporter
from samestep.train.observe.tally import StepTally
from samestep.train.observe.trackers import tracked, wanted
from samestep.train.parallel.agreement import PACE_SECONDS, Agreement, exchange_of
from samestep.train.parallel.bucket_trial import bucket_trial
from samestep.train.parallel.buffers import combiner
from samestep.train.parallel.exchange import BackendExchange, Exchange, TreeExchange
from samestep.train.parallel.fingerprint import StateFingerprint
from samestep.train.parallel.group import Group
from samestep.train.parallel.hooks import compression_hook
from samestep.train.parallel.join import Membership
from samestep.train.parallel.reduction import GradientReducer
from samestep.train.parallel.shared_memory_exchange import ArenaExchange
from samestep.train.parallel.step_sums import step_sums
from samestep.train.recipe import Components
from samestep.train.scaling import Scaling, autocast_of, scaling
from samestep.train.shard_pass import ShardPass
from samestep.train.signals import StopSignals
from samestep.train.state.first_update import with_savable_state
from samestep.train.state.held import HeldParts
from samestep.train.state.saver import Clock, Saver, Schedule, WritingSaver
from samestep.train.state.train_state import TrainState
from samestep.train.state_metrics import StateMetric, StateMetrics
from samestep.train.step import OptimizerStep


@dataclass(frozen=True, slots=True)
class Setting:
    """What the parts have in common."""

    config: TrainConfig
    member: Membership
    run_dir: RunDir
    shards: int
    generation: int
    facts: dict[str, Any]  # kept in every checkpoint, compared at resume and over the ranks
    pulse: Pulse = field(default_factory=NoPulse)  # tells the launcher the phase inside a step
    fence: int | None = None  # generation of the run directory's lock that may publish checkpoints
    signals: StopSignals = field(default_factory=StopSignals)
    micro_batches: Agreed = field(default_factory=Agreed)
    ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # closed however the call ends
    guarded: bool = True  # --check watches the loss of Components; a loop of one's own has none

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.member.device


def assemble(components: Components, setting: Setting, progress: Callable[[int, str], None]) -> Run:
    """Connect the parts for one recipe. A collective: settings and initial weights of all ranks are compared.

    Raises:
        UsageError: something does not fit; says what.
    """
    config, group, device = setting.config, setting.member.group, setting.device
    sampler = _sampler(components.train_data, setting, shuffle=True)
    check_shard_size(
        components.model, sampler.samples, config.global_batch_size, setting.shards, setting.micro_batches.count
    )
    fingerprint = StateFingerprint.of(components.model, group, setting.facts)
    autocast = autocast_of(config.precision, device.type)
    scaler = scaling(config.precision, device.type)
    ema = _ema(components)
    reporter = _reporter(setting, sampler)
    guards = _guards(components, setting, reporter)
    saver, agreement = _saver(setting)
    for close in (reporter.close, guards.close, lambda: saver.close(reporter)):
        setting.ends.callback(close)
    state = TrainState(components, scaler, ema, setting.facts)
    watched = replace(components, loss=guards.loss(components.loss))
    step = _step(watched, setting, autocast, scaler, ema, _finite(setting, sampler, state, reporter), reporter)
    state.buffers = step.shards.buffers
    exact, resize = config.reduction == "exact", step.shards.reducer.replicas.resize
    return Run(
        config=config,
        components=components,
        state=state,
        loader=_loader(components.train_data, sampler, components, setting, reporter, Epochs(config.epochs - 1)),
        sampler=sampler,
        step=step,
        ledger=Ledger(group, device, setting.shards, fingerprint),
        evaluator=_evaluator(components, setting, autocast, reporter, guards),
        evaluated_model=components.model if ema is None else ema.module,
        saver=saver,
        agreement=agreement,
        buckets=bucket_trial(gradient_bytes(components.model), group.world_size, resize, exact=exact),
        reporter=reporter,
        guards=guards,
        held=HeldParts(components.model),
        progress=progress,
    )


def _finite(setting: Setting, sampler: SameOrderSampler, state: TrainState, reporter: Reporter) -> FiniteGuard:
    """What becomes of steps that are not finite; in half precision the scaler leaves them out."""
    investigate = Investigation(setting.member.group, sampler, setting.run_dir)
    if setting.config.precision == "fp16":
        return Unguarded(investigate)
    return finite_guard(setting.config.nan_policy, investigate, state.passed_over, reporter.warning)


def _saver(setting: Setting) -> tuple[Saver, Agreement]:
    """Who saves, and how all ranks agree on when."""
    config, group = setting.config, setting.member.group
    clock = Clock(config.seconds_between_checkpoints)
    pace = min(PACE_SECONDS, clock.every_seconds or PACE_SECONDS)
    exchange = exchange_of(group, setting.device)
    agreement = Agreement(group, exchange, lambda: setting.signals.signum, clock.late, pace)
    schedule = Schedule(config.checkpoint_every, clock, agreement)
    if group.rank != 0:
        return Saver(schedule), agreement
    keep, left = config.keep_checkpoints, setting.signals.seconds_left
    return WritingSaver(schedule, setting.run_dir, setting.generation, keep, setting.fence, left), agreement


def _step(
    components: Components,
    setting: Setting,
    autocast: contextlib.AbstractContextManager[None],
    scaler: Scaling,
    ema: MovingAverage | None,
    guard: FiniteGuard,
    reporter: Reporter,
) -> OptimizerStep:
    config, group, device, shards = setting.config, setting.member.group, setting.device, setting.shards
    enter = setting.pulse.enter
    clock = CudaClock(enter) if device.type == "cuda" else HostClock(time.perf_counter, enter)
    exchange = _exchange(config.reduction, group, shards, device)
    reducer = GradientReducer(
        components.model,
        group,
        exchange,
        shards,
        components.find_unused_parameters,
        compression_hook(config.comm_hook, device) if group.world_size > 1 else None,
    )
    reducer.flights.enter = clock.enter
    sums = step_sums(group, exchange, shards, device)
    return OptimizerStep(
        components=components,
        seed=config.seed,
        clip_grad_norm=config.clip_grad_norm,
        autocast=autocast,
        scaling=scaler,
        shards=ShardPass(reducer, combiner(components.model, group, shards), StepTally(group, device), sums, clock),
        guard=guard,
        micro_batches=_micro_batches(components, setting),
        follow=with_savable_state(components.optimizer, _nobody if ema is None else ema.update_parameters),
        warn=reporter.warning,
    )


def _exchange(reduction: str, group: Group, shards: int, device: torch.device) -> Exchange:
    """How partial sums become totals: through memory where ranks share it, else through the backend."""
    if reduction != "exact":
        return BackendExchange(group.rank, group.world_size, shards)
    aside = torch.cuda.Stream(device) if device.type == "cuda" else None
    tree = TreeExchange(group.rank, group.world_size, shards, aside)
    return tree if group.arena is None else ArenaExchange(group.arena, group.world_size, shards, tree)


def _micro_batches(components: Components, setting: Setting) -> MicroBatches:
    config = setting.config
    samples = len(cast(Sized, components.train_data))
    most = largest_count(components.model, samples, config.global_batch_size, setting.shards)
    return MicroBatches(setting.micro_batches, config.micro_batches == "auto", most, setting.run_dir.micro_batches)


def _evaluator(
    components: Components,
    setting: Setting,
    autocast: contextlib.AbstractContextManager[None],
    reporter: Reporter,
    guards: Guards,
) -> Evaluator | None:
    kept = {name: StateMetric.of(function) for name, function in components.metrics.items()}
    functions = {"loss": components.loss, **components.metrics}
    require_metrics(components, setting.config.best, functions)
    if components.eval_data is None:
        return None
    sampler = _sampler(components.eval_data, setting, shuffle=False)
    loader = _loader(components.eval_data, sampler, components, setting, reporter, Epochs(None))
    group, device = setting.member.group, setting.device
    states = StateMetrics({name: metric for name, metric in kept.items() if metric is not None}, group, device)
    watched = {name: guards.metric(name, function) for name, function in functions.items() if kept.get(name) is None}
    return Evaluator(
        watched, states, loader, sampler, group, device, setting.config.seed, autocast, setting.pulse.enter
    )


def _guards(components: Components, setting: Setting, reporter: Reporter) -> Guards:
    if not setting.guarded:
        return NullGuards()
    beside = components.scheduler, components.scheduler_interval, components.collate_fn
    subject = Subject(components.model, components.optimizer, components.loss, *beside)
    place = setting.member.group, setting.shards, setting.device
    return guards_for(setting.config.check, subject, *place, reporter.warning)


def _nobody(model: nn.Module) -> None:
    """No average follows."""


def _ema(components: Components) -> MovingAverage | None:
    decay: object = components.ema
    if decay is None:
        return None
    if not isinstance(decay, float | int) or not 0 < decay < 1:
        raise UsageError(f"Components.ema is expected to be between 0 and 1, but is {decay!r}")
    return MovingAverage(components.model, decay)


def _sampler(dataset: Any, setting: Setting, *, shuffle: bool) -> SameOrderSampler:
    return SameOrderSampler(
        dataset,
        num_replicas=setting.member.group.world_size,
        rank=setting.member.group.rank,
        shuffle=shuffle,
        seed=setting.config.seed,
        global_batch_size=setting.config.global_batch_size,
        shards=setting.shards,
    )


def _loader(
    dataset: Any,
    sampler: SameOrderSampler,
    components: Components,
    setting: Setting,
    reporter: Reporter,
    epochs: Epochs,
) -> Loader:
    return build_loader(
        dataset,
        sampler,
        collate_fn=components.collate_fn,
        num_workers=setting.config.num_workers,
        device=setting.device,
        epochs=epochs,
        ranks_here=setting.member.env.local_world_size,
        tell=Tell(lambda choice, text: reporter.loader(choice.workers, choice.prefetch, text), reporter.warning),
    )


def _reporter(setting: Setting, sampler: SameOrderSampler) -> Reporter:
    if setting.member.group.rank:
        return Reporter()
    config = setting.config
    reporter = RankZeroReporter(
        log=EventLog(setting.run_dir.events, time.time),
        epochs=config.epochs,
        samples=sampler.samples,
        global_batch_size=config.global_batch_size,
        log_every=config.log_every,
    )
    rhythm = (sampler.samples, config.global_batch_size, config.log_every)
    return tracked(reporter, wanted(config.trackers), setting.run_dir.path, plain(config), rhythm)
