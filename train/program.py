"""The recipe as it was started: its name, its flags, and whether a notebook runs it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from samestep.launcher.command_line import options
from samestep.launcher.contract import ENV_STARTED_IN, UsageError
from samestep.train.config import TrainConfig

Config = TypeVar("Config", bound=TrainConfig)


def load(config_type: type[Config], argv: Sequence[str], rank: int, folder: Path) -> Config:
    """The configuration, whose paths count from `folder`: build may go elsewhere. Only rank zero answers to --help."""
    with contextlib.redirect_stdout(sys.stdout if rank == 0 else io.StringIO()):
        config = options.load(config_type, argv, os.environ, program=Path(name()).name, folder=folder)
    config.weights = config.weights and folder / config.weights
    if config.resume not in ("auto", "never") and folder != Path.cwd():  # else it is named as it was typed
        config.resume = str(folder / config.resume)
    return config


def folder(argv: Sequence[str] | None) -> Path:
    """From where relative paths count: where the command was typed, also if the recipe has gone elsewhere since.

    Our launcher tells. Else the interpreter has made the script's path absolute as it began; where that was typed as an
    absolute one, or a module's name, it can't be known. Flags that code passes to `train` are meant from where it is.
    """
    if argv is None and not in_notebook():
        if told := os.environ.get(ENV_STARTED_IN):
            return Path(told)
        path, typed = str(getattr(sys.modules.get("__main__"), "__file__", None)), sys.argv[0]
        if typed in sys.orig_argv and not typed.startswith("/") and path.endswith(f"/{typed}"):
            return Path(path.removesuffix(typed))
    return Path.cwd()


def name() -> str:
    """The recipe as it was started; a notebook by its file, where the editor or server tells it."""
    if _in_cell():
        return _notebook()
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name != "__main__" and not in_notebook():
        return str(spec.name).removesuffix(".__main__")
    return "run" if sys.argv[0] in ("", "-", "-c") else sys.argv[0]  # typed in, piped in, or a word of a shell


def arguments(argv: Sequence[str] | None) -> Sequence[str]:
    """The flags that were given to `train`, or else to the process; a notebook's are its kernel's.

    Raises:
        UsageError: they are no list of words.
    """
    if argv is not None:
        if not isinstance(argv, list | tuple) or not all(isinstance(word, str) for word in argv):
            raise UsageError(
                f"argv is expected to be a list of words, but is {argv!r}", 'train(build, argv=["--epochs", "3"])'
            )
        return argv
    return [] if _in_cell() else sys.argv[1:]


def in_notebook() -> bool:
    """Whether it runs in a kernel, whatever has started that: Jupyter, Colab, an editor."""
    return _shell() is not None


def _shell() -> Any:
    """IPython's, where it belongs to a kernel; a terminal's has none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return None if getattr(shell, "kernel", None) is None else shell


def _notebook() -> str:
    told = _shell().user_module.__dict__.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME", "")
    return told if str(told).endswith(".ipynb") else "notebook"


def _in_cell() -> bool:
    """Whether a cell calls `train`, with no flags of its own: `%run` and an assignment to sys.argv give it some."""
    shell, flags = _shell(), sys.argv[1:]
    in_cell = shell is not None and shell.user_module is sys.modules.get("__main__")
    return in_cell and (not flags or sys.orig_argv[-len(flags) :] == flags)
