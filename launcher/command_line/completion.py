"""`samestep completion bash`: a script that completes commands, options and their values in that shell.

Derived from the same dataclasses as the options themselves. Words after a recipe are its own, and completed as files.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import cyclopts
from cyclopts import Parameter

from samestep.launcher.chaos.run import ChaosConfig
from samestep.launcher.cluster.kubernetes_config import KubernetesConfig
from samestep.launcher.cluster.slurm import SlurmConfig
from samestep.launcher.command_line.options import command, nearest_hint
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import UsageError
from samestep.launcher.doctor.examine import DoctorConfig
from samestep.launcher.scale.plan_config import PlanConfig
from samestep.launcher.verify import VerifyConfig

Shell = Literal["bash", "zsh", "fish"]
SHELLS: tuple[str, ...] = get_args(Shell)
SETUP = {
    "bash": 'eval "$(samestep completion bash)"  in ~/.bashrc',
    "zsh": "samestep completion zsh > DIRECTORY_IN_FPATH/_samestep",
    "fish": "samestep completion fish > ~/.config/fish/completions/samestep.fish",
}


def script(shell: str) -> str:
    """The completion script for one shell.

    Raises:
        UsageError: no such shell.
    """
    if shell not in SHELLS:
        raise UsageError(
            f"completion is expected to be followed by bash, zsh or fish, but got {shell or 'nothing'}",
            nearest_hint(shell, set(SHELLS)) or SETUP["bash"],
        )
    wanted: dict[str, Any] = {"prog_name": "samestep", "shell": shell}
    return application().generate_completion(**wanted)


def application() -> cyclopts.App:
    """Every command with its options, for completing alone: nothing is run through it."""
    app = cyclopts.App(name="samestep", version_flags=["--version"])
    app.command(command(LaunchConfig, *_recipe()), name="run", help="Start a recipe or another program on all ranks.")
    app.command(command(VerifyConfig, *_recipe()), name="verify", help="Compare the bits of runs of several sizes.")
    app.command(command(ChaosConfig, *_recipe()), name="chaos", help="Strike a recipe while it trains.")
    app.command(command(DoctorConfig), name="doctor", help="Judge this machine.")
    submit = cyclopts.App(name="submit", help="Hand a recipe to a cluster.")
    submit.command(command(KubernetesConfig, *_recipe()), name="kubernetes", help="As a Kubernetes Job.")
    submit.command(command(SlurmConfig, *_recipe()), name="slurm", help="As a batch script of Slurm.")
    app.command(submit)
    app.command(command(PlanConfig, *_run_dir()), name="plan", help="Say what a run would be like on more ranks.")
    app.command(_digest, name="digest")
    app.command(_stacks, name="stacks")
    app.command(_watch, name="watch")
    app.command(_report, name="report")
    app.command(_completion, name="completion")
    return app


def _recipe() -> tuple[inspect.Parameter, ...]:
    kind = inspect.Parameter.POSITIONAL_ONLY
    return (inspect.Parameter("recipe", kind, annotation=Annotated[Path, Parameter(help="the recipe")]),)


def _run_dir() -> tuple[inspect.Parameter, ...]:
    kind = inspect.Parameter.POSITIONAL_ONLY
    return (
        inspect.Parameter("run_dir", kind, annotation=Annotated[Path | None, Parameter(help="a run")], default=None),
    )


_Switch = Annotated[bool, Parameter(negative="")]


def _digest(path: Path, /, *, state: _Switch = False, json: _Switch = False) -> Any:
    """Print the sha256 of the weights."""


def _stacks(run_dir: Path, /) -> Any:
    """Print what the ranks of a live run are doing."""


def _watch(run_dir: Path, /, *, once: _Switch = False) -> Any:
    """Show how a run stands."""


def _report(run_dir: Path, /, *more: Path, output: Path | None = None) -> Any:
    """Make one HTML page."""


def _completion(shell: Shell, /) -> Any:
    """Print the completion script of a shell."""
