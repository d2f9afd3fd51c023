"""What can be judged before anything is started or created, and the facts that come of it."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

from samestep.launcher import host, recipe_file, run_dir
from samestep.launcher.cluster.layout import layout, timeouts
from samestep.launcher.command_line.argv import Recipe
from samestep.launcher.config import DEFAULT_MAX_RESTARTS, LaunchConfig, ranks_named
from samestep.launcher.contract import UsageError
from samestep.launcher.plan import Facts
from samestep.launcher.supervise import policy


def _check_ranks(config: LaunchConfig, environ: Mapping[str, str], local_world_size: int) -> None:
    """Judge options that name ranks of this machine, and one that names how many there are to be.

    Raises:
        UsageError: there are not so many.
    """
    for flag, ranks in ranks_named(config).items():
        if ranks and max(ranks) >= local_world_size:
            raise UsageError(
                f"{flag} is expected to name ranks below {local_world_size}, but names {max(ranks)}",
                "ranks of a machine count from 0, up to --nproc-per-node",
            )
    too_many = config.min_ranks is not None and config.min_ranks > local_world_size
    if too_many and layout(config, environ) is None:
        raise UsageError(
            f"--min-ranks is expected to be at most the number of ranks, {local_world_size}, but is {config.min_ranks}",
            "leave it out to keep all ranks",
        )
    timeouts(config.rdzv_conf)


def facts_of(config: LaunchConfig, recipe: Recipe, environ: Mapping[str, str]) -> tuple[Facts, Path]:
    """What is to be planned, and the run directory.

    Raises:
        UsageError: no such recipe, more ranks than devices, or a place that can't be written to.
    """
    recipe_file.check(recipe)
    ours = recipe_file.trains(recipe)
    on_cpu = (
        config.cpu
        or (ours and recipe.device == "cpu")
        or environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    )
    world_size = host.count_ranks(config.nproc_per_node, host.inspect(environ), on_cpu=on_cpu)
    _check_ranks(config, environ, world_size)
    path = recipe.run_dir(environ, ours=ours)
    run_dir.check(path)
    if config.log_dir:
        run_dir.check(Path(config.log_dir), logs=True)
    python = environ.get("PYTHON_EXEC") or sys.executable
    restarts = config.max_restarts
    facts = Facts(
        world_size,
        run_id=uuid.uuid4().hex,
        python=python,
        environ=environ,
        resumes=ours,
        forks=ours and not config.no_warm,
        max_restarts=(DEFAULT_MAX_RESTARTS if ours else 0) if restarts is None else restarts,
        grace=policy.grace(config.grace_seconds, config.shutdown_timeout, saves=ours),
    )
    return facts, path
