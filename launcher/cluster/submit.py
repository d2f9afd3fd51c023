"""`samestep submit ENGINE recipe.py`: from words to a run in somebody else's cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from samestep.launcher.cluster.kubernetes_job import submit_kubernetes
from samestep.launcher.cluster.slurm_job import submit_slurm
from samestep.launcher.command_line.options import nearest_hint
from samestep.launcher.contract import UsageError

Say = Callable[[str], None]


def submit(argv: Sequence[str], environ: Mapping[str, str], say: Say) -> int:
    """Do what the words after `samestep submit` say.

    Raises:
        UsageError: no engine, no recipe, or what the engine would refuse.
    """
    engines: dict[str, Callable[[Sequence[str], Mapping[str, str], Say], int]] = {
        "kubernetes": submit_kubernetes,
        "slurm": submit_slurm,
    }
    if not argv or argv[0] not in engines:
        word = argv[0] if argv else ""
        raise UsageError(
            f"submit is expected to be followed by one of {', '.join(engines)}, but is followed by {word or 'nothing'}",
            nearest_hint(word, set(engines)) or f"samestep submit {next(iter(engines))} [options] recipe.py",
        )
    return engines[argv[0]](argv[1:], environ, say)
