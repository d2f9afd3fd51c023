"""From a call to ranks that have met: options, device, process group, and a run directory that is theirs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from samestep.launcher import environment_numbers, who_started
from samestep.launcher.command_line import stdout
from samestep.launcher.contract import ENV_RUN_DIR, RunDir, WorkerEnv, default_run_dir
from samestep.launcher.diagnosis.stack_signal import tell_stacks_when_asked
from samestep.launcher.heartbeat import pulse
from samestep.launcher.liveness import end_with_agent
from samestep.train import caller, environment, last_start, leave, micro_batches, program, start
from samestep.train.accelerate_settings import refuse_other_engines
from samestep.train.config import TrainConfig
from samestep.train.failure import Whereabouts
from samestep.train.micro_batches import Agreed
from samestep.train.observe import trackers
from samestep.train.parallel.join import Membership, join, pick_device
from samestep.train.progress import Progress


@dataclass(frozen=True, slots=True)
class Call:
    """What is known before the ranks meet."""

    config: Any
    env: WorkerEnv
    run_dir: RunDir
    generation: int
    progress: Progress
    ends: ExitStack  # what is to be ended with the call, once its error is recorded: a process may live on


@contextmanager
def called(
    check: Callable[[], None], config_type: type[TrainConfig], argv: Sequence[str] | None = None
) -> Iterator[Call]:
    """Read the options of a call that `check` has judged; what fails inside is told and recorded.

    Raises:
        SystemExit: see Whereabouts.failures_told.
        BaseException: likewise.
    """
    stdout.open_all()
    folder = program.folder(argv)
    run_dir = RunDir(folder / (os.environ.get(ENV_RUN_DIR) or default_run_dir(program.name())))
    here = Whereabouts(run_dir)
    with ExitStack() as ends, here.failures_told():
        here.env = env = who_started.worker(os.environ)
        here.generation = environment_numbers.checked_generation(os.environ)
        here.progress.pulse = pulse(os.environ, env.rank % env.local_world_size)
        here.progress(0, "joining")
        end_with_agent(os.environ)
        tell_stacks_when_asked()
        check()
        config = program.load(config_type, program.arguments(argv), env.rank, folder)
        here.run_dir = RunDir(folder / (config.run_dir or run_dir.path))  # recipes may go to another folder
        ends.enter_context(caller.undisturbed())
        with leave.nondeterminism_named():
            yield Call(config, env, here.run_dir, here.generation, here.progress, ends)


@dataclass(frozen=True, slots=True)
class Joined:
    """What is known once all ranks have met."""

    call: Call
    member: Membership
    shards: int
    fence: int
    stored: dict[str, Any]
    micro_batches: Agreed


def meet(call: Call) -> Joined:
    """Make the run directory, pin what decides the bits, and join the other ranks. A collective.

    Raises:
        UsageError: an option does not fit the run directory, this machine or the other ranks.
    """
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
    return Joined(call, member, shards, fence, stored, agreed)
