"""The recipe as it was started: its name, its flags, and whether a notebook runs it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from samestep.launcher.command_line import options
from samestep.train.config import TrainConfig

Config = TypeVar("Config", bound=TrainConfig)


def load(config_type: type[Config], argv: Sequence[str], rank: int) -> Config:
    """The configuration; only rank zero answers to --help."""
    with contextlib.redirect_stdout(sys.stdout if rank == 0 else io.StringIO()):
        return options.load(config_type, argv, os.environ, program=Path(name()).name)


def name() -> str:
    """The recipe as it was started."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name not in ("__main__", "ipykernel_launcher"):
        return str(spec.name).removesuffix(".__main__")
    return "notebook" if in_notebook() else (sys.argv[0] or "run")


def arguments(argv: Sequence[str] | None) -> Sequence[str]:
    """The flags that were given to `train`, or else to the process."""
    if argv is not None:
        return argv
    return [] if in_notebook() else sys.argv[1:]


def in_notebook() -> bool:
    """Whether a notebook's kernel runs it."""
    return "ipykernel" in sys.modules and Path(sys.argv[0]).name == "ipykernel_launcher.py"
