"""`train(build)`: configuration, joining, building, the loop, leaving."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch.optim.lr_scheduler import ReduceLROnPlateau

from samestep.launcher import environment_numbers, manifest, who_started
from samestep.launcher.command_line import options, stdout
from samestep.launcher.contract import (
    ENV_RUN_DIR,
    ExitCode,
    RunDir,
    UsageError,
    WorkerEnv,
    default_run_dir,
)
from samestep.launcher.diagnosis.stack_signal import tell_stacks_when_asked
from samestep.launcher.heartbeat import pulse
from samestep.launcher.liveness import end_with_agent
from samestep.train import (
    caller,
    elastic_error,
    environment,
    last_start,
    leave,
    micro_batches,
    post_mortem,
    preemption,
    program,
    replay,
    rewind,
    start,
    without_compiler,
)
from samestep.train.accelerate_settings import refuse_other_engines
from samestep.train.announce import announce
from samestep.train.assemble import Setting, assemble
from samestep.train.called import check_call
from samestep.train.checks import check_among_ranks, check_components, check_data_repeats, without_use
from samestep.train.compilation import compile_in_place
from samestep.train.config import TrainConfig
from samestep.train.data.fingerprint import look_at
from samestep.train.data.order import SPEC
from samestep.train.data.rng import seed_everything
from samestep.train.data.shield import kill_the_rest
from samestep.train.finish import Result, close, goodput
from samestep.train.loop import Run, require_schedule
from samestep.train.micro_batches import Agreed
from samestep.train.observe import profile, trackers
from samestep.train.parallel.hooks import without_effect
from samestep.train.parallel.join import Membership, join, pick_device
from samestep.train.progress import Progress
from samestep.train.recipe import Components
from samestep.train.signals import StopSignals

Config = TypeVar("Config", bound=TrainConfig)


def train(
    build: Callable[[Config], Components],
    config_type: type[Config] = TrainConfig,  # type: ignore[assignment]
    *,
    argv: Sequence[str] | None = None,
) -> Result:
    """Train what `build` makes, as flags, environment and TOML file say, on however many ranks were started.

    Args:
        build: makes the model, data and optimizer; runs on every rank, after device and seed are set.
        config_type: TrainConfig, or a dataclass derived from it with the recipe's own options.
        argv: flags without the program's name; those of the process if None (none in a notebook).

    Raises:
        SystemExit: a mistake in usage (2) or no valid checkpoint (78); printed once, without a traceback. Stopped by
            SIGTERM, SIGUSR1 or Ctrl-C after a saved step (75), or with an older checkpoint kept (76). In a notebook
            signals do what they always do there: an interrupt is a KeyboardInterrupt, and the last checkpoint stays.
        BaseException: whatever user code raised, after it was recorded for the launcher.
    """
    stdout.open_all()
    with ExitStack() as ends:
        return _called(build, config_type, argv, ends)


@dataclass(frozen=True, slots=True)
class _Call:
    """What is known before the ranks meet."""

    config: Any
    env: WorkerEnv
    run_dir: RunDir
    generation: int
    progress: Progress
    ends: ExitStack  # what is to be ended with the call, once its error is recorded: a process may live on


def _called(
    build: Callable[[Config], Components], config_type: type[Config], argv: Sequence[str] | None, ends: ExitStack
) -> Result:
    env, progress, generation, folder = WorkerEnv(), Progress(), 0, program.folder(argv)
    run_dir = RunDir(folder / (os.environ.get(ENV_RUN_DIR) or default_run_dir(program.name())))
    try:
        env = who_started.worker(os.environ)
        generation = environment_numbers.checked_generation(os.environ)
        progress.pulse = pulse(os.environ, env.rank % env.local_world_size)
        progress(0, "joining")
        end_with_agent(os.environ)
        tell_stacks_when_asked()
        check_call(build, config_type)
        config = program.load(config_type, program.arguments(argv), env.rank, folder)
        run_dir = RunDir(folder / (config.run_dir or run_dir.path))  # recipes may go to another folder
        ends.enter_context(caller.undisturbed())
        with leave.nondeterminism_named():
            run = _train if config.replay is None else _replay
            return run(build, _Call(config, env, run_dir, generation, progress, ends))
    except UsageError as error:
        record = leave.error_record(error, env.rank, generation, progress.step, progress.exact_phase)
        if leave.is_to_tell(record, env, run_dir):
            print(leave.prefix(env.rank) + str(error), file=sys.stderr, flush=True)
        raise SystemExit(int(error.exit_code)) from None
    except SystemExit as leaving:
        early = leave.early_exit(leaving, env.rank, generation, progress.step, progress.exact_phase)
        if early is not None:
            leave.write_record(early, run_dir)
        raise
    except (KeyboardInterrupt, GeneratorExit) as asked:
        leave.if_it_never_began(asked, progress.exact_phase, env.rank)
        raise
    except BaseException as seen:  # libraries have some that are no Exception, such as asyncio's CancelledError
        reason = _recorded(seen, env, progress, run_dir, generation)
        if leave.is_consequence(reason):
            print(leave.prefix(env.rank) + elastic_error.FOLLOWED, file=sys.stderr, flush=True)
            raise SystemExit(1) from reason
        if reason is not seen:
            raise reason from seen
        raise
    finally:
        progress.pulse.at(progress.step, "")


def _recorded(seen: BaseException, env: WorkerEnv, at: Progress, run_dir: RunDir, generation: int) -> BaseException:
    """What `seen` comes from, written down for the launcher."""
    with leave.deaths_of_children_unheard():
        reason = post_mortem.look(leave.loader_death(seen), os.environ, env.rank)
        at.failed(reason, env, run_dir, generation)
        kill_the_rest()
    return reason


def _replay(build: Callable[[Any], Components], call: _Call) -> Result:
    config, step = call.config, call.config.replay or 0
    replica = call.ends.enter_context(replay.shadow(call.run_dir, step, call.env.world_size))
    with replay.terminal_for_debugger(config.debug):
        if config.debug:
            call.progress.pulse = replay.Debugger(step, call.progress.pulse)
        result = _train(build, replace(call, config=replay.settings(config), run_dir=replica))
        same, sentence = replay.compare(call.run_dir, replica, step)
    print(sentence, flush=True)
    if not same:
        raise SystemExit(int(ExitCode.FAILED))
    return result


def _train(build: Callable[[Any], Components], call: _Call) -> Result:
    # --- join
    config, env, run_dir, progress = call.config, call.env, call.run_dir, call.progress
    trackers.wanted(config.trackers)  # what is not installed is said before anything is done
    start.make(run_dir)
    refuse_other_engines(os.environ)
    stored = last_start.stored_config(run_dir, config.resume)
    shards = start.choose_shards(config, stored, env.world_size)
    threads = config.threads or stored.get("threads") or environment.threads_for(shards)
    environment.pin(threads, config.allow_nondeterministic)
    device = pick_device(config.device, env)
    environment.require_default_device(device)
    member = join(env, device, run_dir.path)
    environment.pin(threads, config.allow_nondeterministic)  # joining may have set the thread count
    leave.end_hard(member)
    progress.pulse.count_by(member.group.collectives)
    if member.device.type == "cuda":
        progress.pulse.follow(progress.device)
    fence = call.ends.enter_context(start.owned(run_dir, member))
    agreed = micro_batches.agree(config.micro_batches, stored, run_dir.micro_batches, member.group)
    return _train_joined(build, _Joined(call, member, shards, fence, stored, agreed))


@dataclass(frozen=True, slots=True)
class _Joined:
    """What is known once all ranks have met."""

    call: _Call
    member: Membership
    shards: int
    fence: int
    stored: dict[str, Any]
    micro_batches: Agreed


def _train_joined(build: Callable[[Any], Components], joined: _Joined) -> Result:
    call, member, shards = joined.call, joined.member, joined.shards
    config, run_dir, progress = call.config, call.run_dir, call.progress
    run: Run
    found = start.find_state(run_dir, config, member)

    # --- build
    progress(0, "build")
    components, told = environment.keeping_threads(lambda: _built(build, config, member, shards), member.device)
    if config.weights is not None and found.snapshot is None:
        start.load_weights(components.model, config.weights)
    components.model.to(member.device)
    compiled = (components.model, member.device, member.group, lambda text: run.reporter.warning(text))
    uncompiled = compile_in_place(*compiled) if config.compile else ""
    facts = _facts(components, joined)
    signals = StopSignals(active=not program.in_notebook())
    calls = (lambda text: run.reporter.note(text)), (lambda: run.step.clock.skip())
    progress.pulse = profile.around(progress.pulse, config.profile, member.group, run_dir.path, *calls)
    place = (config, member, run_dir, shards, call.generation, facts, progress.pulse)
    setting = Setting(*place, joined.fence, signals, joined.micro_batches, call.ends)
    run = assemble(components, setting, progress)
    progress.clock, progress.micro_batches = run.step.clock, run.step.micro_batches
    if member.env.distributed:
        leave.end_hard(run)
    run.state.capture(0)  # refuses now, not hours later, what could only be saved with pickle
    run.held.require_loadable()
    warnings = [*told, *options.misspelt(type(config), os.environ), *without_use(components), *found.warnings]
    warnings += without_effect(config.comm_hook, member.env.world_size)
    warnings += micro_batches.warnings(joined.micro_batches, joined.stored, components.model)
    edited = [] if found.snapshot is None else start.restore(run, found.snapshot, found.source)
    changed = _changed(components, joined, found)
    run.state.note_not_finite()
    start.count(run, found, call.generation)

    # --- train
    if found.ended and run.state.step >= run.max_steps:
        digest = manifest.read(run_dir.checkpoint(run.state.step))["digest"]
        run.reporter.already_finished(digest, run.state.step, [*edited, *changed])
        member.group.barrier()
    else:
        require_schedule(run)
        warnings += [*edited, *(f"{what}: the bits of the following steps can differ" for what in changed)]
        announce(run, run_dir, member, (shards, call.generation, found), [uncompiled, *warnings])
        with signals:
            digest = _to_the_end(run, member, run_dir, progress)
    return Result(digest, run.state.step, run.state.metrics, run_dir.path)


def _changed(components: Components, joined: _Joined, found: start.Found) -> list[str]:
    """What is not as at the last start, where this one goes on from there."""
    config, device = joined.call.config, joined.member.device
    if found.snapshot is None and config.replay is None:
        return []
    plateau = isinstance(components.scheduler, ReduceLROnPlateau)
    now = config, joined.stored, environment.record(device)
    return last_start.changes(*now, follows_evaluations=plateau, elsewhere=found.elsewhere)


def _built(build: Callable[[Any], Components], config: Any, member: Membership, shards: int) -> Components:
    without_compiler.keep_unloaded()
    seed_everything(config.seed)
    try:
        components = check_components(build(config))
    finally:
        stdout.open_all()
    check_among_ranks(components.model, shards, member.env.world_size)
    return components


def _to_the_end(run: Run, member: Membership, run_dir: RunDir, progress: Progress) -> str:
    """Train, save, export. Who asks to stop after the last step waits for the rest, and finds it done. A collective."""
    with environment.long_lived_objects_set_aside():
        rewind.run_with_rewinds(run, member, run_dir)
        preemption.leave_if_stopped(run, run_dir)
    progress(run.state.step, "closing")
    digest = close(run, run_dir, member)
    run.reporter.finished(digest, run.state.step, run.state.restarts, goodput(run))
    member.group.barrier()
    return digest


def _facts(components: Components, joined: _Joined) -> dict[str, Any]:
    """What is kept in every checkpoint; the samples, of which it tells, and batches have to come out twice alike."""
    seed = joined.call.config.seed
    look = look_at(components.train_data, seed)
    if joined.call.config.check != "never":
        check_data_repeats(components, seed, look)
    known = {"seed": seed, "shards": joined.shards, "order": SPEC, "dataset": look.fingerprint}
    return known | {"micro_batches": joined.micro_batches.count} | environment.record(joined.member.device)
