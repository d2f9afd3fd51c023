"""From what `build` made to a run at the place where training begins or goes on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from samestep.launcher.command_line import options
from samestep.train import environment, last_start, leave, micro_batches, program, start
from samestep.train.assemble import Setting, assemble
from samestep.train.checks import check_data_repeats, without_use
from samestep.train.compilation import compile_in_place
from samestep.train.data.fingerprint import look_at
from samestep.train.data.order import SPEC
from samestep.train.joined import Joined
from samestep.train.loop import Run
from samestep.train.observe import profile
from samestep.train.parallel.hooks import without_effect
from samestep.train.recipe import Components
from samestep.train.signals import StopSignals


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run, and what is to be said about it before its first step.

    Attributes:
        found: where it goes on.
        warnings: whatever comes of it.
        changed: what the run so far was trained with, and this start was not given.
        setting: what its parts have in common.
        signals: to be entered while it trains.
    """

    run: Run
    found: start.Found
    warnings: list[str]
    changed: list[str]
    setting: Setting
    signals: StopSignals

    @property
    def is_over(self) -> bool:
        """Whether the run got to its end before, and has nothing left to do."""
        return self.found.ended and self.run.state.step >= self.run.max_steps


def prepare(
    components: Components, joined: Joined, found: start.Found, told: list[str], *, guarded: bool = True
) -> Prepared:
    """Move the model to its device, connect the parts and load what was found. A collective.

    Raises:
        UsageError: something does not fit; says what.
    """
    call, member = joined.call, joined.member
    config, run_dir, progress = call.config, call.run_dir, call.progress
    run: Run
    if config.weights is not None and found.snapshot is None:
        start.load_weights(components.model, config.weights)
    components.model.to(member.device)
    compiled = (components.model, member.device, member.group, lambda text: run.reporter.warning(text))
    uncompiled = compile_in_place(*compiled) if config.compile else ""
    facts = _facts(components, joined)
    signals = StopSignals(active=not program.in_notebook())
    calls = (lambda text: run.reporter.note(text)), (lambda: run.step.clock.skip())
    progress.pulse = profile.around(progress.pulse, config.profile, member.group, run_dir.path, *calls)
    place = (config, member, run_dir, joined.shards, call.generation, facts, progress.pulse)
    setting = Setting(*place, joined.fence, signals, joined.micro_batches, call.ends, guarded)
    run = assemble(components, setting, progress)
    progress.clock, progress.micro_batches = run.step.clock, run.step.micro_batches
    if member.env.distributed:
        leave.end_hard(run)
    run.state.capture(0)  # refuses now, not hours later, what could only be saved with pickle
    run.held.require_loadable()
    warnings = [uncompiled, *told, *options.misspelt(type(config), os.environ), *without_use(components)]
    warnings += [*found.warnings, *without_effect(config.comm_hook, member.group.world_size)]
    warnings += micro_batches.warnings(joined.micro_batches, joined.stored, components.model)
    edited = [] if found.snapshot is None else start.restore(run.state, found.snapshot, found.source)
    changed = _changed(components, joined, found)
    run.state.note_not_finite()
    start.count(run.state, found, call.generation)
    warnings += [*edited, *(f"{what}: the bits of the following steps can differ" for what in changed)]
    return Prepared(run, found, warnings, [*edited, *changed], setting, signals)


def _changed(components: Components, joined: Joined, found: start.Found) -> list[str]:
    """What is not as at the last start, where this one goes on from there."""
    config, device = joined.call.config, joined.member.device
    if found.snapshot is None and config.replay is None:
        return []
    plateau = isinstance(components.scheduler, ReduceLROnPlateau)
    now = config, joined.stored, environment.record(device)
    return last_start.changes(*now, follows_evaluations=plateau, elsewhere=found.elsewhere)


def _facts(components: Components, joined: Joined) -> dict[str, Any]:
    """What is kept in every checkpoint; the samples, of which it tells, and batches have to come out twice alike."""
    seed = joined.call.config.seed
    look = look_at(components.train_data, seed)
    if joined.call.config.check != "never":
        check_data_repeats(components, seed, look)
    known = {"seed": seed, "shards": joined.shards, "order": SPEC, "dataset": look.fingerprint}
    return known | {"micro_batches": joined.micro_batches.count} | environment.record(joined.member.device)
