"""One start of all ranks after another: supervise, diagnose, and again if a restart is left."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from samestep.launcher import manifest, run_dir
from samestep.launcher.cluster.follower import Follower, FollowerJob
from samestep.launcher.cluster.head import Head
from samestep.launcher.cluster.layout import Layout
from samestep.launcher.cluster.team import Alone, NotStartedError, Team
from samestep.launcher.cluster.wide_watch import FarRanks, Reporting, watch_all
from samestep.launcher.command_line.argv import Recipe
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import EXIT_MEANING, ExitCode, RunDir, UsageError
from samestep.launcher.diagnosis import evidence
from samestep.launcher.diagnosis.diagnose import Failure, describe, diagnose, hung, is_consequence
from samestep.launcher.lock import RunLock
from samestep.launcher.plan import Command, Facts, fork_server_environment, plan
from samestep.launcher.supervise import policy, terminal
from samestep.launcher.supervise.console import Console
from samestep.launcher.supervise.hang_watch import NoWatch
from samestep.launcher.supervise.job import Job
from samestep.launcher.supervise.outcome import Generation, RankEnd
from samestep.launcher.supervise.signals import SignalSocket
from samestep.launcher.supervise.starter import Starter
from samestep.launcher.supervise.supervisor import Supervisor


@dataclass(frozen=True, slots=True)
class LaunchResult:
    """How a run ended; `failure` is that of its last generation."""

    exit_code: int
    run_dir: Path
    generations: int
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """What was taken for the run before, and is given back by who took it; `place` and `listener` are None if alone."""

    directory: RunDir
    lock: RunLock
    signals: SignalSocket
    starter: Starter
    place: Layout | None
    listener: socket.socket | None


def lead(config: LaunchConfig, recipe: Recipe, environ: Mapping[str, str], facts: Facts, held: Held) -> LaunchResult:
    """On the machine that decides."""
    directory, place, signals, starter = held.directory, held.place, held.signals, held.starter
    far, times = FarRanks(), place.timeouts if place else None
    watch = watch_all(facts.world_size, config.hang_timeout, directory, times, far) if facts.resumes else NoWatch()
    facts = replace(facts, heartbeat_fd=watch.fd)
    with terminal.kept(lent=config.pdb is not None):
        stdout = sys.stderr.fileno() if config.json else None  # stdout then holds the answer alone
        console = Console(stdout=stdout, asked=signals.asked)
        about = (config, directory, console, signals, watch, starter, facts.grace)
        supervisor = Supervisor(*about, saves=facts.resumes)
        listener = held.listener
        head = Head(place, listener, directory, supervisor, console, environ, far) if place and listener else None
        team = head or Alone(config)
        try:
            run = _Run(config, recipe, directory, environ, supervisor, starter, console, held.lock, team)
            result = _generations(run, facts)
            team.stop(result.exit_code)
        finally:
            if head is not None:
                head.close()
            supervisor.close()
            watch.close()
            console.close()
        if facts.resumes and result.exit_code == ExitCode.DONE and not config.no_report:
            with signals.interrupting():
                _report(directory, console)
    return result


def follow(
    config: LaunchConfig, recipe: Recipe, environ: Mapping[str, str], facts: Facts, path: Path, place: Layout
) -> LaunchResult:
    """The same on a machine where another one decides."""
    if config.log_dir:
        run_dir.prepare_logs(Path(config.log_dir))
    directory = RunDir(path)
    reporting = Reporting(facts.world_size, directory) if facts.resumes else None
    watch = reporting or NoWatch()
    facts = replace(facts, heartbeat_fd=watch.fd)
    with SignalSocket() as signals, Starter() as starter:
        console = Console(asked=signals.asked)
        about = (config, directory, console, signals, watch, starter, facts.grace)
        supervisor = Supervisor(*about, saves=facts.resumes)
        job = FollowerJob(config, recipe, directory, environ, supervisor, starter, console, reporting)
        follower = Follower(job, place, facts)
        try:
            return LaunchResult(follower.obey(), path, follower.generations)
        finally:
            supervisor.close()
            watch.close()
            console.close()


@dataclass(frozen=True, slots=True)
class _Run(Job):
    lock: RunLock
    team: Team


def _generations(run: _Run, facts: Facts) -> LaunchResult:
    memory = policy.Memory(manifest.newest_step(run.directory.checkpoints))
    while True:
        if facts.forks:
            run.starter.prepare_forks(facts.python, fork_server_environment(facts))
        try:
            commands, ended = _one_generation(run, facts)
        except NotStartedError as error:
            run.console.say(f"samestep: {error}")
            return LaunchResult(error.exit_code, run.directory.path, facts.generation)
        if ended.stopped_by is None and run.team.reshaped() and ended.signum is None:
            run.console.say(f"samestep: going on from the newest checkpoint: {run.team.reshaped()}")
            facts = replace(facts, generation=facts.generation + 1)
            continue
        failure = _failure(run, commands, ended)
        code = None if failure is None else policy.meant(failure.exit_code, ours=failure.told or _ours(run, facts))
        memory = memory.after(manifest.newest_step(run.directory.checkpoints), _signature(failure))
        remedied = failure is not None and failure.remedied
        final = failure is not None and (failure.final or policy.never_began(failure.cause, failure.phase))
        verdict = policy.decide(
            failure_code=code,
            stopped=_stopped(run, facts, ended, ended.signum),
            restarts_left=policy.restarts_left(facts.max_restarts, memory, final=final, remedied=remedied),
            fruitless=0 if remedied else memory.fruitless,
            repeated=memory.repeated and facts.resumes,
        )
        number = facts.generation + 1
        if isinstance(verdict, policy.Restart):
            assert failure is not None
            memory = memory.restarted(remedied=remedied)
            _tell_restart(run, facts, failure, memory, verdict.delay)
            stopped = _stopped(run, facts, ended, run.supervisor.pause(verdict.delay) if verdict.delay else None)
            if stopped is not None:
                _tell_stopped(run, stopped)
                return LaunchResult(stopped, run.directory.path, number, failure)
            facts = replace(_without_lost_device(run, facts, failure), generation=number)
            continue
        if ended.signum is not None or verdict.exit_code in policy.PREEMPTED:
            _tell_stopped(run, verdict.exit_code)
        if failure is not None and not failure.told and code not in policy.PREEMPTED:
            _tell(run, failure, verdict.exit_code)
            if verdict.exit_code == ExitCode.NO_PROGRESS and memory.repeated:
                run.console.say("samestep: the same failure twice, and no checkpoint in between: it would come again")
        return LaunchResult(verdict.exit_code, run.directory.path, number, failure)


def _failure(run: _Run, commands: tuple[Command, ...], ended: Generation) -> Failure | None:
    if ended.hang is not None:
        return hung(ended.hang, str(commands[ended.hang.rank].log), len(commands))
    if ended.stopped_by is not None:
        return None
    return run.team.missing() or diagnose(evidence.gather(ended, commands, run.directory), ended.memory)


def _without_lost_device(run: _Run, facts: Facts, failure: Failure) -> Facts:
    """One rank fewer where its device is gone; shards stay as they are, and so do the bits."""
    left = policy.fewer_ranks(facts.world_size, run.config.min_ranks, failure.cause)
    if left == facts.world_size or not facts.resumes or failure.rank >= facts.world_size:  # of another machine
        return facts
    visible = facts.devices or facts.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = policy.devices_left(visible, facts.world_size, failure.rank)
    run.console.say(f"samestep: the device of rank {failure.rank} is gone: going on with {left} of {left + 1} ranks")
    return replace(facts, world_size=left, devices=devices)


def _stopped(run: _Run, facts: Facts, ended: Generation, signum: int | None) -> ExitCode | None:
    if signum is None:
        return None
    ours, committed = _ours(run, facts), manifest.newest_step(run.directory.checkpoints) >= 0
    codes = [policy.meant(end.returncode, ours=ours) for end in ended.ends]
    trained = facts.generation > 0 or any(end.step for end in ended.ends)
    about = {"forced": ended.forced, "committed": committed, "trained": trained}
    return policy.after_stop(signum, codes, saves=facts.resumes, **about)


def _ours(run: _Run, facts: Facts) -> bool:
    """Whether the statuses of the ranks are those of our table."""
    return facts.resumes or run_dir.holds_training(run.directory)


def _tell_stopped(run: _Run, exit_code: int) -> None:
    if run.config.quiet or exit_code == ExitCode.DONE:
        return
    step = manifest.newest_step(run.directory.checkpoints)
    newest = f" (step {step})" if exit_code in policy.PREEMPTED and step >= 0 else ""
    run.console.say(f"samestep: {EXIT_MEANING[ExitCode(exit_code)]}{newest}; exit code {int(exit_code)}")


def _report(directory: RunDir, console: Console) -> None:
    """Leave the page of a run; without one, it is done all the same."""
    from samestep.launcher.report.command import at_the_end

    problem = at_the_end(directory)
    if problem:
        console.say(f"samestep: no report: {problem}")


def _signature(failure: Failure | None) -> tuple[object, ...] | None:
    if failure is None or failure.remedied:
        return None
    return policy.signature(
        rank=failure.rank, cause=failure.cause, frame=failure.frame, step=failure.step, recorded=failure.recorded
    )


def _tell_restart(run: _Run, facts: Facts, failure: Failure, memory: policy.Memory, delay: float) -> None:
    evidence.note_failure(failure, failure.exit_code, run.directory)
    what = f"restart {memory.fruitless} of {facts.max_restarts}" + (f" in {delay:g} s" if delay else "")
    if memory.committed < 0 and failure.step and run_dir.holds_training(run.directory):
        what += "; no checkpoint was saved yet, so that its steps are trained again"
    run.console.say(
        f"samestep: rank {failure.rank} failed: {failure.cause}; {failure.hint if failure.remedied else what}"
    )


def _one_generation(run: _Run, facts: Facts) -> tuple[tuple[Command, ...], Generation]:
    """Fresh ports, fresh processes."""
    assembled = run.team.assemble(replace(facts, fence=run.lock.next_generation()))
    facts, place, store = assembled.facts, assembled.place, assembled.store
    with store:
        commands = plan(run.config, run.recipe, run.directory, place, facts)
        everyone = plan(run.config, run.recipe, run.directory, place, replace(facts, local_world_size=None))

        def is_victim(end: RankEnd) -> bool:
            victim = is_consequence(evidence.of_rank(end, commands[end.rank], run.directory, facts.generation))
            run.team.failed(policy.meant(end.returncode, ours=_ours(run, facts)), is_victim=victim)
            return victim

        try:
            # once rank zero has the store's socket, ours would only keep its port open after it
            ended = run.supervisor.run(
                facts.generation, commands, run.environ, started=store.close, is_victim=is_victim
            )
        except TimeoutError:
            raise  # ranks that can't be ended: nobody's wrong option
        except OSError as error:
            raise UsageError(
                f"{commands[0].argv[0]} is expected to start, but: {error.strerror or error}",
                "a script needs a #! line for --no-python",
            ) from None
        return everyone, run.team.finish(ended)


def _tell(run: _Run, failure: Failure, exit_code: int) -> None:
    evidence.note_failure(failure, exit_code, run.directory)
    for line in describe(failure, exit_code):
        run.console.say(line)
