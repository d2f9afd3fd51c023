"""Hand a batch script to Slurm, and show what becomes of the job."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from samestep.launcher import recipe_file, run_dir
from samestep.launcher.cluster.slurm import SlurmConfig, script
from samestep.launcher.command_line.argv import Kind, Recipe, split_around
from samestep.launcher.command_line.options import load
from samestep.launcher.contract import ExitCode, RunDir, UsageError
from samestep.launcher.supervise.console import Console
from samestep.launcher.supervise.progress import Progress

_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 60
_OVER = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
_OF_OPERATOR = {"CANCELLED": ExitCode.TERMINATED, "COMPLETED": ExitCode.DONE}


def submit_slurm(argv: Sequence[str], environ: Mapping[str, str], say: Callable[[str], None]) -> int:
    """Write RUN_DIR/slurm.sh and submit it; the exit code of the job with `--follow`.

    Raises:
        UsageError: no recipe, something that can't be a value, or a Slurm that refuses.
    """
    own, words = split_around(argv, SlurmConfig, "samestep submit slurm")
    config = load(SlurmConfig, own, {}, program="samestep submit slurm", operands="recipe.py [RECIPE OPTIONS]")
    if not words:
        raise UsageError("a recipe is expected, but there is none", "samestep submit slurm --nodes 2 recipe.py")
    recipe = Recipe(words[0], tuple(words[1:]), Kind.MODULE if config.module else Kind.SCRIPT)
    recipe_file.check(recipe, "samestep submit slurm")
    directory = RunDir(recipe.run_dir(environ, ours=recipe_file.trains(recipe)).absolute())
    run_dir.check(directory.path)
    text = script(config, recipe, directory.path, Path.cwd(), sys.executable)
    if config.dry_run:
        say(text.rstrip("\n"))
        return ExitCode.DONE
    _tool("sbatch")
    path = _keep(directory, text)
    job = _sbatch(path, environ)
    say(f"samestep: job {job}, script {path}, output {directory.logs}/slurm-{job}.log")
    return _follow(job, directory, environ) if config.follow else ExitCode.DONE


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UsageError(f"{name} is expected on this machine, but is not", "submit from a login node of the cluster")
    return found


def _keep(directory: RunDir, text: str) -> Path:
    directory.path.parent.mkdir(parents=True, exist_ok=True)
    directory.path.mkdir(mode=0o700, exist_ok=True)  # one that exists keeps its mode, as for `samestep run`
    directory.logs.mkdir(mode=0o700, exist_ok=True)
    path = directory.path / "slurm.sh"
    path.write_text(text)
    path.chmod(0o700)
    return path


def _sbatch(path: Path, environ: Mapping[str, str]) -> str:
    # of an allocation that we are in, nothing is to be handed on: the job has its own
    env = {name: value for name, value in environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    ended = subprocess.run(
        [_tool("sbatch"), "--parsable", str(path)], env=env, capture_output=True, text=True, timeout=_ANSWER_SECONDS
    )
    job = ended.stdout.strip().partition(";")[0]
    if ended.returncode or not job.isdecimal():
        reason = (ended.stderr.strip() or ended.stdout.strip() or "no answer").splitlines()[-1]
        raise UsageError(f"sbatch is expected to take the job, but says: {reason}", f"the script is {path}")
    return job


def _follow(job: str, directory: RunDir, environ: Mapping[str, str]) -> int:
    """Until the job is over; Ctrl-C ends the watching, not the job."""
    console, progress, last = Console(), Progress(directory), ""
    try:
        while True:
            state, code = _state(job, environ)
            if state != last:
                console.say(f"samestep: job {job}: {state.lower()}")
                last = state
            if state in _OVER:
                return _OF_OPERATOR.get(state, code or ExitCode.FAILED)
            if console.has_bar:
                console.show_bar(progress.update())
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        console.say(f"samestep: job {job} goes on; scancel {job} ends it")
        return ExitCode.INTERRUPTED
    finally:
        console.close()


def _state(job: str, environ: Mapping[str, str]) -> tuple[str, int]:
    """State and exit code of a job that Slurm still knows.

    Raises:
        UsageError: it does not answer, or has forgotten the job.
    """
    ended = subprocess.run(
        [_tool("scontrol"), "--oneliner", "show", "job", job],
        env=dict(environ),
        capture_output=True,
        text=True,
        timeout=_ANSWER_SECONDS,
    )
    state = re.search(r"\bJobState=(\w+)", ended.stdout)
    code = re.search(r"\bExitCode=(\d+):(\d+)", ended.stdout)
    if ended.returncode or state is None:
        reason = (ended.stderr.strip() or "no answer").splitlines()[-1]
        raise UsageError(f"Slurm is expected to know job {job}, but says: {reason}", "look at the job's log")
    return state[1], int(code[1]) if code else 0
