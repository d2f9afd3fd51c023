"""A look at what user code left when it failed, on the rank that `samestep run --pdb` has given the terminal."""

from __future__ import annotations

import bdb
import pdb
import sys
from collections.abc import Mapping

from samestep.launcher.contract import ENV_PDB
from samestep.train import leave
from samestep.train.cause import cause_of


def look(error: BaseException, environ: Mapping[str, str], rank: int) -> BaseException:
    """Enter pdb where `error` was raised, if it is this rank's own; give it back when its user has seen enough."""
    wanted = environ.get(ENV_PDB) == str(rank) and not isinstance(error, bdb.BdbQuit)
    if wanted and not leave.is_consequence(error):
        cause = cause_of(error)
        sys.stderr.write(f"samestep: rank {rank} raised {cause.kind}: {cause.message}; q goes on\n")
        pdb.post_mortem(error.__traceback__)
    return error
