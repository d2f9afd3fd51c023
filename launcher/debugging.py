"""Pure: what `--pdb RANK` implies. One rank has the terminal and stops there; nobody else may grow impatient."""

from __future__ import annotations

from dataclasses import replace

from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import UsageError

_PATIENCE_SECONDS = 7 * 24 * 3600.0  # finite, since torch counts milliseconds in 32 bits here and there


def settled(config: LaunchConfig) -> LaunchConfig:
    """The configuration with all that follows from `--pdb`; itself without it."""
    if config.pdb is None:
        return config
    return replace(config, hang_timeout="off", join_timeout=_PATIENCE_SECONDS, max_restarts=0)


def check(config: LaunchConfig, world_size: int, *, one_machine: bool) -> None:
    """See that the rank is one that gets this terminal.

    Raises:
        UsageError: there is no such rank, or it may run elsewhere.
    """
    if config.pdb is None:
        return
    if not one_machine:
        raise UsageError(
            "--pdb is expected to be used on one machine, but there are several",
            "the bits are the same on one: leave --nnodes out, and pass --shards of the run",
        )
    if config.pdb >= world_size:
        raise UsageError(
            f"--pdb is expected to be a rank below {world_size}, but is {config.pdb}",
            "--pdb 0, or start more ranks with --nproc-per-node",
        )
