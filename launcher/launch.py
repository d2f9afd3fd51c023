"""Launching, from top to bottom: check what is cheap, plan, supervise, diagnose, and again if a restart is left."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from samestep.launcher import evidence, host, meeting, recipe_file, run_dir
from samestep.launcher.argv import Recipe
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import RunDir, UsageError
from samestep.launcher.diagnose import Failure, describe, diagnose, is_consequence
from samestep.launcher.plan import Command, Facts, plan, render
from samestep.launcher.supervise.console import Console
from samestep.launcher.supervise.outcome import Generation, RankEnd
from samestep.launcher.supervise.policy import Restart, decide
from samestep.launcher.supervise.signals import SignalSocket
from samestep.launcher.supervise.supervisor import Supervisor


@dataclass(frozen=True, slots=True)
class LaunchResult:
    """How a run ended; `failure` is that of its last generation."""

    exit_code: int
    run_dir: Path
    generations: int
    failure: Failure | None = None


def dry_run(config: LaunchConfig, recipe: Recipe, environ: Mapping[str, str]) -> str:
    """What `launch` would start, as shell commands; creates nothing.

    Raises:
        UsageError: `launch` would refuse too.
    """
    facts, path = _check(config, recipe, environ)
    return render(plan(config, recipe, RunDir(path), meeting.preview(config.master_addr, config.master_port), facts))


def launch(config: LaunchConfig, recipe: Recipe, environ: Mapping[str, str]) -> LaunchResult:
    """Run the recipe on every rank until it is done or given up; failures are printed.

    Raises:
        UsageError: what was asked can't be done; nothing has been started or created.
    """
    facts, path = _check(config, recipe, environ)
    meeting.preview(config.master_addr, config.master_port)
    directory = run_dir.prepare(path)
    if config.log_dir:
        run_dir.prepare_logs(Path(config.log_dir))
    console = Console()
    with SignalSocket() as signals:
        supervisor = Supervisor(config, directory, console, signals)
        try:
            return _generations(_Run(config, recipe, directory, environ, supervisor, console), facts)
        finally:
            supervisor.close()
            console.close()


@dataclass(frozen=True, slots=True)
class _Run:
    config: LaunchConfig
    recipe: Recipe
    directory: RunDir
    environ: Mapping[str, str]
    supervisor: Supervisor
    console: Console


def _check(config: LaunchConfig, recipe: Recipe, environ: Mapping[str, str]) -> tuple[Facts, Path]:
    recipe_file.check(recipe)
    on_cpu = (
        config.cpu or recipe.device == "cpu" or environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    )
    world_size = host.count_ranks(config.nproc_per_node, host.inspect(environ), on_cpu=on_cpu)
    path = recipe.run_dir(environ)
    run_dir.check(path)
    if config.log_dir:
        run_dir.check(Path(config.log_dir))
    python = environ.get("PYTHON_EXEC") or sys.executable
    return Facts(world_size, run_id=uuid.uuid4().hex, python=python, environ=environ), path


def _generations(run: _Run, facts: Facts) -> LaunchResult:
    while True:
        commands, ended = _one_generation(run, facts)
        failure = diagnose(evidence.gather(ended, commands, run.directory)) if ended.stopped_by is None else None
        verdict = decide(
            failure_code=None if failure is None else failure.exit_code,
            stopped_by=ended.stopped_by,
            own_codes=frozenset(end.returncode for end in ended.ends if end.returncode >= 0),
            restarts_left=0 if ended.interrupted else run.config.max_restarts - facts.generation,
        )
        number = facts.generation + 1
        if isinstance(verdict, Restart):
            assert failure is not None
            evidence.note_failure(failure, failure.exit_code, run.directory)
            run.console.say(
                f"samestep: rank {failure.rank} failed: {failure.cause}; restart {number} of {run.config.max_restarts}"
            )
            facts = Facts(facts.world_size, facts.run_id, facts.python, number, facts.environ)
            continue
        if failure is not None and not failure.told:
            _tell(run, failure, verdict.exit_code)
        return LaunchResult(verdict.exit_code, run.directory.path, number, failure)


def _one_generation(run: _Run, facts: Facts) -> tuple[tuple[Command, ...], Generation]:
    """Fresh ports, fresh processes."""
    place, store = meeting.open_store(run.config.master_addr, run.config.master_port)
    with store:
        commands = plan(run.config, run.recipe, run.directory, place, facts)

        def is_victim(end: RankEnd) -> bool:
            return is_consequence(evidence.of_rank(end, commands[end.rank], run.directory, facts.generation))

        try:
            # once rank zero has the store's socket, ours would only keep its port open after it
            ended = run.supervisor.run(
                facts.generation, commands, run.environ, started=store.close, is_victim=is_victim
            )
        except OSError as error:
            raise UsageError(
                f"{commands[0].argv[0]} is expected to start, but: {error.strerror or error}",
                "a script needs a #! line for --no-python; a log folder must be writable",
            ) from None
        return commands, ended


def _tell(run: _Run, failure: Failure, exit_code: int) -> None:
    evidence.note_failure(failure, exit_code, run.directory)
    for line in describe(failure, exit_code):
        run.console.say(line)
