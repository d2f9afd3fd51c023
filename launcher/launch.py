"""Launching, from top to bottom: check what is cheap, take the run directory, begin to import torch, and supervise.

The order is for speed: what supervises takes a tenth of a second to import, and is imported while a process that will
fork the ranks imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from samestep.launcher import debugging, meeting, run_dir
from samestep.launcher.cheap_checks import facts_of
from samestep.launcher.cluster.layout import layout
from samestep.launcher.command_line.argv import Recipe
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import RunDir
from samestep.launcher.plan import Meeting, fork_server_environment, plan, render
from samestep.launcher.supervise.signals import SignalSocket
from samestep.launcher.supervise.starter import Starter

if TYPE_CHECKING:
    from samestep.launcher.generations import LaunchResult


def dry_run(config: LaunchConfig, recipe: Recipe, environ: Mapping[str, str]) -> str:
    """What `launch` would start, as shell commands; creates nothing.

    Raises:
        UsageError: `launch` would refuse too.
    """
    config = debugging.settled(config)
    facts, path = facts_of(config, recipe, environ)
    debugging.check(config, facts.world_size, one_machine=True)
    return render(plan(config, recipe, RunDir(path), _preview(config), facts))


def launch(config: LaunchConfig, recipe: Recipe, environ: Mapping[str, str]) -> LaunchResult:
    """Run the recipe on every rank until it is done or given up; failures are printed.

    Raises:
        UsageError: what was asked can't be done; nothing has been started or created.
    """
    config = debugging.settled(config)
    facts, path = facts_of(config, recipe, environ)
    place, listener = layout(config, environ), None
    debugging.check(config, facts.world_size, one_machine=place is None)
    if place is None:
        _preview(config)
    else:
        from samestep.launcher.cluster.headship import open_head
        from samestep.launcher.generations import follow

        listener = open_head(place)
        if listener is None:
            return follow(config, recipe, environ, facts, path, place)
    directory, lock = run_dir.own(path)
    try:
        if config.log_dir:
            run_dir.prepare_logs(Path(config.log_dir))
        with SignalSocket() as signals, Starter() as starter:
            if facts.forks:
                starter.prepare_forks(facts.python, fork_server_environment(facts))
            from samestep.launcher.generations import Held, lead

            return lead(config, recipe, environ, facts, Held(directory, lock, signals, starter, place, listener))
    finally:
        lock.release()


def _preview(config: LaunchConfig) -> Meeting:
    return meeting.preview(config.master_addr or meeting.LOOPBACK, config.master_port)
