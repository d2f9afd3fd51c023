"""`train(build)`: configuration, joining, building, the loop, leaving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from samestep.launcher.command_line import stdout
from samestep.launcher.contract import ExitCode
from samestep.train import environment, preemption, replay, rewind, start, without_compiler
from samestep.train.announce import announce
from samestep.train.called import check_call
from samestep.train.checks import check_among_ranks, check_components
from samestep.train.config import TrainConfig
from samestep.train.data.rng import seed_everything
from samestep.train.finish import Result, already_closed, close
from samestep.train.joined import Call, Joined, called, meet
from samestep.train.loop import require_schedule
from samestep.train.prepared import Prepared, prepare
from samestep.train.recipe import Components

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
    with called(lambda: check_call(build, config_type), config_type, argv) as call:
        return _train(build, call) if call.config.replay is None else _replay(build, call)


def _replay(build: Callable[[Any], Components], call: Call) -> Result:
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


def _train(build: Callable[[Any], Components], call: Call) -> Result:
    joined = meet(call)
    found = start.find_state(call.run_dir, call.config, joined.member)
    call.progress(0, "build")
    components, told = environment.keeping_threads(lambda: _built(build, joined), joined.member.device)
    prepared = prepare(components, joined, found, told)
    run = prepared.run
    if prepared.is_over:
        digest = already_closed(run, call.run_dir, joined.member, prepared.changed)
    else:
        require_schedule(run)
        announce(prepared, joined)
        digest = _to_the_end(prepared, joined)
    return Result(digest, run.state.step, run.state.metrics, call.run_dir.path)


def _built(build: Callable[[Any], Components], joined: Joined) -> Components:
    without_compiler.keep_unloaded()
    seed_everything(joined.call.config.seed)
    try:
        components = check_components(build(joined.call.config))
    finally:
        stdout.open_all()
    check_among_ranks(components.model, joined.shards, joined.member.env.world_size)
    return components


def _to_the_end(prepared: Prepared, joined: Joined) -> str:
    """Train, save, export. Who asks to stop after the last step waits for the rest, and finds it done. A collective."""
    run, member, run_dir = prepared.run, joined.member, joined.call.run_dir
    with prepared.signals:
        with environment.long_lived_objects_set_aside():
            rewind.run_with_rewinds(run, member, run_dir)
            preemption.leave_if_stopped(run, run_dir)
        return close(run, run_dir, member)
