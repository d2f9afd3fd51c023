"""Pure: a recipe and what is asked of Slurm -> the batch script. Submits, writes and asks nothing.

Options become `#SBATCH` lines, whose values have to match a pattern each, so that none can end its line or begin
another (sbatch(1) reads them without a shell). Words of the recipe go into the body, quoted for the shell. The
environment, secrets in it included, goes the way that sbatch and srun have for it: no value of it is written here.

Ahead of the time limit, and when the job is preempted, Slurm sends SIGUSR1 to the script alone (`--signal=B:USR1@…`,
`--requeue`); it passes SIGTERM to the launchers, which save and leave with 75, or 76 where only the last checkpoint was
kept. Both mean "run again", so the script requeues its job. Everything else is the job's own exit code.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from samestep.launcher.command_line.argv import Kind, Recipe
from samestep.launcher.command_line.options import Option, peek
from samestep.launcher.contract import ExitCode, UsageError
from samestep.launcher.secret_names import refuse_secrets

_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.,+@:=-]*"
_PATTERNS = {
    "nodes": r"[1-9][0-9]*([-:][1-9][0-9]*)?",
    "nproc_per_node": r"[1-9][0-9]*|auto|gpu|cpu",
    "job_name": r"[A-Za-z0-9_][A-Za-z0-9_.-]*",
    "time": r"[0-9]+|([0-9]+-)?[0-9]+(:[0-9]+){0,2}|infinite|UNLIMITED",
    "mem": r"[0-9]+[KMGT]?",
    "constraint": r"[A-Za-z0-9_(\[][A-Za-z0-9_.,+@:=&|*()\[\]-]*",
}
_READERS = "every user of the cluster can read that"
_INSTEAD = "let the recipe read an environment variable: sbatch and srun hand the environment on"


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """Options of `samestep submit slurm`."""

    nodes: Annotated[str, Option("Machines, a number or MIN-MAX: the run goes on with as many as it gets", "nodes")] = (
        "1"
    )
    nproc_per_node: Annotated[str, Option("Ranks a machine: a number, auto, gpu or cpu", "ranks")] = "1"
    time: Annotated[str, Option("Time limit of one start, as sbatch takes it, such as 4:00:00; default: Slurm's")] = ""
    partition: Annotated[str, Option("Partition")] = ""
    account: Annotated[str, Option("Account that is charged")] = ""
    qos: Annotated[str, Option("Quality of service")] = ""
    gpus_per_node: Annotated[str, Option("GPUs a machine, such as 8 or a100:8")] = ""
    cpus_per_task: Annotated[
        int | None, Option("CPUs a machine; default: one a rank, and all of them for MIN-MAX nodes", "CPUs")
    ] = None
    mem: Annotated[str, Option("Memory a machine, such as 64G; default: Slurm's")] = ""
    constraint: Annotated[str, Option("Features that machines need, such as 'a100|h100'")] = ""
    job_name: Annotated[str, Option("Name of the job; default: that of the recipe")] = ""
    signal_seconds: Annotated[int, Option("Time before the limit at which the run saves and ends", "seconds")] = 120
    max_requeues: Annotated[int, Option("Starts after the first before the job is given up", "times")] = 1000
    requeue: Annotated[bool, Option("Start again after preemption, the time limit or the loss of a machine")] = True
    module: Annotated[bool, Option("The recipe is a module, as in python -m", name=("--module", "-m"), negative="")] = (
        False
    )
    follow: Annotated[bool, Option("Show the run's progress until it is over", negative="")] = False
    dry_run: Annotated[bool, Option("Print the script, write and submit nothing", negative="")] = False

    def __post_init__(self) -> None:
        """Refuse values that Slurm would not take, or that could be more than a value.

        Raises:
            UsageError: with setting, expectation, value and a hint.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and value and not re.fullmatch(_PATTERNS.get(field.name, _WORD), value):
                raise UsageError(
                    f"--{field.name.replace('_', '-')} is expected to be a plain value as sbatch takes it, "
                    f"but is {value!r}",
                    "samestep submit slurm --help shows the form",
                )
        fewest, most = span(self.nodes)
        if fewest > most:
            raise UsageError(f"--nodes is expected to be MIN-MAX, but is {self.nodes}", f"--nodes {most}-{fewest}")
        for name, lowest in (("signal_seconds", 1), ("max_requeues", 0), ("cpus_per_task", 1)):
            value = getattr(self, name)
            if value is not None and not lowest <= value <= 65535:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is expected to be between {lowest} and 65535, but is {value}", "leave it out")
        limit = seconds_of(self.time)
        if 0 < limit <= self.signal_seconds:
            raise UsageError(
                f"--signal-seconds is expected to be less than the time limit, but is {self.signal_seconds}, and "
                f"--time {self.time} is {limit} seconds: each start would save and end as it begins",
                f"--signal-seconds {max(1, limit // 4)}, or a longer --time",
            )


def seconds_of(limit: str) -> int:
    """A time limit of sbatch(1): minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    0 is no limit, as for Slurm.
    """
    if not limit[:1].isdecimal():
        return 0
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = (0, *parts, 0)[:3] if len(parts) < 3 else parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def span(text: str) -> tuple[int, int]:
    """Fewest and most machines."""
    fewest, _, most = text.replace(":", "-").partition("-")
    return int(fewest), int(most or fewest)


def script(config: SlurmConfig, recipe: Recipe, run_dir: Path, cwd: Path, python: str) -> str:
    """The batch script; `run_dir` and `cwd` are absolute.

    Raises:
        UsageError: a path or a word of the recipe can't be carried safely.
    """
    refuse_secrets(recipe.arguments, _READERS, _INSTEAD)
    words = [python, "-m", "samestep.launcher", "run", "--nproc-per-node", config.nproc_per_node]
    words += ["--module"] if recipe.kind is Kind.MODULE else []
    words += ["--", recipe.target, *recipe.arguments]
    if peek(recipe.arguments, "run-dir") is None:
        words += ["--run-dir", str(run_dir)]
    if any("\0" in word for word in words):
        raise UsageError("the recipe's arguments are expected to hold no null byte, but one does", "leave it out")
    lines = ["#!/bin/sh", *[f"#SBATCH {option}" for option in _options(config, recipe, run_dir, cwd)], ""]
    return "\n".join(lines) + _BODY.format(
        command=" ".join(map(shlex.quote, words)),
        saved=int(ExitCode.PREEMPTED_SAVED),
        kept=int(ExitCode.PREEMPTED_KEPT),
        stopped=int(ExitCode.TERMINATED),
        most=config.max_requeues if config.requeue else 0,
    )


# scancel with a signal reaches the launchers, not this script. A shell leaves `wait` when a signal comes, without a
# status of srun's, so it waits again; 127 is the answer of a shell that has given srun's status before.
_BODY = """\
set -u
asked= code=1
trap 'again=yes; asked=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap 'again=yes' TERM
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \\
  --kill-on-bad-exit=0 --export=ALL {command} &
step=$!
again=yes
while [ -n "$again" ]; do
  again=
  wait "$step"
  status=$?
  [ "$status" = 127 ] || code=$status
done
if [ -n "$asked" ] && [ "$code" = {stopped} ]; then code={kept}; fi  # Slurm's time was over before training began
if [ "$code" = {saved} ] || [ "$code" = {kept} ]; then
  # a job that somebody has cancelled would be started again, too
  running=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -c ' JobState=RUNNING ')
  if [ "$running" = 1 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {most} ]; then
    echo "samestep: exit code $code${{asked:+, asked to save}}: job $SLURM_JOB_ID is started again"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
  fi
fi
exit "$code"
"""


def _options(config: SlurmConfig, recipe: Recipe, run_dir: Path, cwd: Path) -> list[str]:
    fewest, most = span(config.nodes)
    given = {
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "time": config.time,
        "gpus-per-node": config.gpus_per_node,
        "mem": config.mem,
        "constraint": _quoted(config.constraint),
    }
    cpus = int(config.nproc_per_node) if config.nproc_per_node.isdecimal() else 0
    return [
        f"--job-name={config.job_name or _job_name(recipe)}",
        *_machines(fewest, most, config.cpus_per_task or cpus),
        *[f"--{name}={value}" for name, value in given.items() if value],
        f"--chdir={_path(cwd)}",
        f"--output={_path(run_dir / 'logs')}/slurm-%j.log",
        "--open-mode=append",
        f"--signal=B:USR1@{config.signal_seconds}",
        "--requeue" if config.requeue else "--no-requeue",
    ]


def _quoted(expression: str) -> str:
    """In double quotes where it is more than a word: sbatch takes them off, and shows the rest to no shell."""
    return expression if re.fullmatch(_WORD, expression) or not expression else f'"{expression}"'


def _machines(fewest: int, most: int, cpus: int) -> list[str]:
    """Of a range Slurm gives no more machines than the tasks need, so it is asked for a task of each, and all of it."""
    if fewest == most:
        return [f"--nodes={most}", "--ntasks-per-node=1", *([f"--cpus-per-task={cpus}"] if cpus else [])]
    return [f"--nodes={fewest}-{most}", f"--ntasks={most}", "--exclusive"]


def _job_name(recipe: Recipe) -> str:
    stem = recipe.target.rsplit(".", 1)[-1] if recipe.kind is Kind.MODULE else Path(recipe.target).stem
    return re.sub(r"[^A-Za-z0-9_.-]", "_", stem).lstrip(".-") or "samestep"


def _path(path: Path) -> str:
    text = str(path)
    if not re.fullmatch(r"/[^\x00-\x1f\x7f\"'\\#%]*", text):
        raise UsageError(
            f"a path for sbatch is expected to hold no quote, backslash, #, % or control character, but is {text!r}",
            "choose another --run-dir, or submit from another folder",
        )
    return f'"{text}"' if " " in text else text
