"""What a launcher has to start, and with what: the same on the machine that decides and on the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from samestep.launcher.command_line.argv import Recipe
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import RunDir
from samestep.launcher.supervise.console import Console
from samestep.launcher.supervise.starter import Starter
from samestep.launcher.supervise.supervisor import Supervisor


@dataclass(frozen=True, slots=True)
class Job:
    """Who starts, watches and speaks."""

    config: LaunchConfig
    recipe: Recipe
    directory: RunDir
    environ: Mapping[str, str]
    supervisor: Supervisor
    starter: Starter
    console: Console
