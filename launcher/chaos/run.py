"""`samestep chaos recipe.py`: an undisturbed run, then runs with faults, then the table of what came of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import psutil

from samestep.launcher import manifest
from samestep.launcher.chaos.kinds import BY_NAME, KINDS, Kind
from samestep.launcher.chaos.outcome import Trial, Verdict, table
from samestep.launcher.chaos.plan import Course, Fault, over_runs, plan, soak
from samestep.launcher.chaos.trace import Trace
from samestep.launcher.chaos.trial import Expected, Subject, left_in
from samestep.launcher.command_line.argv import Recipe
from samestep.launcher.command_line.options import Option, nearest_hint, peek
from samestep.launcher.config import MOST_RANKS
from samestep.launcher.contract import ExitCode, RunDir, UsageError
from samestep.launcher.diagnosis import memory_signs
from samestep.launcher.recipe_file import trains
from samestep.launcher.supervise.process import end, start_in_session
from samestep.launcher.tidy import ends_tidily

_FORM = {"module": ["-m"], "command": ["--no-python"]}


@dataclass(frozen=True, kw_only=True)
class ChaosConfig:
    """Options of `samestep chaos`; words after the recipe belong to the recipe."""

    faults: Annotated[int, Option("faults to inject", "faults")] = 20
    seed: Annotated[int, Option("what strikes when and whom: the same seed, the same plan")] = 0
    nproc_per_node: Annotated[int, Option("ranks of each run", "ranks")] = 2
    kinds: Annotated[str, Option("kinds of faults, or the beginnings of their names, such as rank,launcher-kill")] = ""
    per_run: Annotated[int, Option("faults of one run, at different moments", "faults")] = 5
    minutes: Annotated[float | None, Option("instead of --faults: run after run for so long", "minutes")] = None
    every: Annotated[float, Option("with --minutes: time between faults on average", "seconds")] = 15.0
    stuck_seconds: Annotated[float, Option("time without progress until a run is given up", "seconds")] = 180.0
    keep: Annotated[Path | None, Option("keep the run directories here", "folder")] = None
    json: Annotated[bool, Option("print rows as JSON instead of a table", negative="")] = False

    def __post_init__(self) -> None:
        """Judge each value.

        Raises:
            UsageError: a number that is too small, or a kind that does not exist.
        """
        for name, least in {"faults": 1, "nproc_per_node": 1, "per_run": 1, "every": 0, "stuck_seconds": 1}.items():
            if not getattr(self, name) >= least:  # nan is not
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"{flag} is expected to be at least {least}, but is {getattr(self, name)}",
                    f"leave it out for {getattr(ChaosConfig, name)}",
                )
        if self.nproc_per_node > MOST_RANKS:
            raise UsageError(
                f"--nproc-per-node is expected to be at most {MOST_RANKS}, but is {self.nproc_per_node}",
                f"all of them start on this machine: leave it out for {ChaosConfig.nproc_per_node}",
            )
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise UsageError(
                f"--minutes is expected to be above 0 and finite, but is {self.minutes}",
                "--minutes 10, or leave it out for --faults",
            )
        if self.every == float("inf"):
            raise UsageError("--every is expected to be finite, but is inf", f"leave it out for {ChaosConfig.every}")
        chosen(self.kinds)


def chosen(text: str) -> tuple[Kind, ...]:
    """The kinds that a comma separated list of names, or beginnings of names, means.

    Raises:
        UsageError: a word fits none.
    """
    if not text.strip():
        return KINDS
    found: list[Kind] = []
    for word in (part.strip() for part in text.split(",") if part.strip()):
        fitting = [BY_NAME[word]] if word in BY_NAME else [k for k in KINDS if k.name.startswith(f"{word}-")]
        if not fitting:
            hint = nearest_hint(word, set(BY_NAME)) or f"kinds are {', '.join(BY_NAME)}"
            raise UsageError(f"--kinds is expected to name kinds of faults, but there is no {word}", hint)
        found += [kind for kind in fitting if kind not in found]
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Stage:
    """Where all runs take place."""

    config: ChaosConfig
    recipe: Recipe
    environ: Mapping[str, str]
    folder: Path
    liveness: int  # read end of a pipe: no launcher outlives us

    def start(self, run_dir: RunDir, flags: Iterable[str], stderr: int) -> subprocess.Popen[bytes]:
        """Start a launcher as a user would."""
        ranks = str(self.config.nproc_per_node)
        words = [sys.executable, "-m", "samestep.launcher", "run", "--quiet", "--max-restarts", "100000"]
        words += ["--nproc-per-node", ranks, *_FORM.get(self.recipe.kind.value, [])]
        words += [self.recipe.target, *self.recipe.arguments, "--log-every", "1", "--resume", "auto", *flags]
        return start_in_session(
            [*words, "--run-dir", str(run_dir.path)],
            {**self.environ, "TMPDIR": str(self.folder / "tmp")},
            self.liveness,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )


def chaos(config: ChaosConfig, recipe: Recipe, environ: Mapping[str, str], say: Callable[[str], None]) -> int:
    """Run everything, print the table, and return 0 only if all is well."""
    with ends_tidily(), tempfile.TemporaryDirectory(prefix="samestep-chaos-") as temporary:
        folder = (config.keep or Path(temporary)).absolute()
        _prepare(folder)
        liveness, _life = os.pipe()  # open until this process ends
        stage = _Stage(config, recipe, environ, folder, liveness)
        _tell("the undisturbed run ...")
        course, expected, seconds = _reference(stage)
        flags = () if peek(recipe.arguments, "checkpoint-every") else ("--checkpoint-every", str(_often(course)))
        before = _host(folder)
        trials = tuple(_trials(stage, course, expected, flags))
        grown = {name: value - before[name] for name, value in _host(folder).items()}
        verdict = Verdict(expected.digest, seconds, trials, grown)
        if config.json:
            say(json.dumps(verdict.to_dict()))
        else:
            for line in table(verdict):
                say(line)
        return ExitCode.DONE if verdict.good else ExitCode.FAILED


def _prepare(folder: Path) -> None:
    """Refuse what is no new folder: a run that is there would be resumed, and one that is done is struck by nothing."""
    old = next((path for path in (folder / "reference", *folder.glob("run-*")) if path.exists()), None)
    if old is not None:
        raise UsageError(
            f"--keep is expected to name a folder without earlier runs, but {old} is there",
            "name a new folder, or remove the old runs",
        )
    try:
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--keep is expected to name a folder that can be made, but {folder}: {error.strerror}",
            "name one where you may write",
        ) from None


def _reference(stage: _Stage) -> tuple[Course, Expected, float]:
    run_dir, said = RunDir(stage.folder / "reference"), stage.folder / "reference.err"
    begin, wall = time.monotonic(), time.time()
    with said.open("wb") as file:
        launcher = stage.start(run_dir, (), file.fileno())
        try:
            code = launcher.wait()
        finally:
            end(launcher)
    trace = Trace(run_dir)
    trace.update()
    finished = trace.last("run_finished")
    if code or not finished:
        print(said.read_text(errors="replace")[-4000:], end="", file=sys.stderr)
        if not trains(stage.recipe):
            raise UsageError(
                f"{stage.recipe.target} is expected to be a recipe that trains, but ended with {code} without training",
                "chaos works for recipes that call samestep.train.train",
            )
        raise UsageError(
            f"the recipe is expected to train to its end undisturbed, but ended with exit code {code}",
            "chaos works for recipes that call samestep.train.train, in an empty folder",
            ExitCode(code) if code in set(ExitCode) and code else ExitCode.FAILED,
        )
    ends, step = [], 0
    for event in trace.events:
        step = int(event["step"]) if event.get("event") == "step" else step
        if event.get("event") == "epoch":
            ends.append(step)
    saves = [manifest.step_of(path) for path in manifest.committed(run_dir.checkpoints)]
    joined = max(0.1, (trace.started_since(wall) or wall) - wall)
    course = Course(int(finished["steps"]), tuple(ends), tuple(saves), joined)
    every = int(peek(stage.recipe.arguments, "checkpoint-every") or _often(course))
    course = Course(course.steps, course.epoch_ends, tuple(range(every, course.steps, every)), joined)
    return course, Expected(str(finished["digest"]), trace.losses), time.monotonic() - begin


def _often(course: Course) -> int:
    """Steps between checkpoints where the recipe does not say: a lost step or two, whatever strikes."""
    return max(1, course.steps // 20)


def _trials(stage: _Stage, course: Course, expected: Expected, flags: tuple[str, ...]) -> Iterator[Trial]:
    config = stage.config
    kinds = chosen(config.kinds)
    if config.minutes is None:
        plans: Iterable[Iterable[Fault]] = plan(
            config.seed, config.faults, config.per_run, kinds, course, config.nproc_per_node
        )
    else:
        # the last run is left to end by itself
        faults = soak(config.seed, config.every, kinds, config.nproc_per_node)
        plans = over_runs(faults, time.monotonic() + 60 * config.minutes, time.monotonic)
    for number, of_one in enumerate(plans, start=1):
        run_dir = RunDir(stage.folder / f"run-{number}")
        subject = Subject(
            start=lambda stderr, where=run_dir: stage.start(where, flags, stderr),  # type: ignore[misc]
            run_dir=run_dir,
            said=stage.folder / f"run-{number}.err",
            temporary=stage.folder / "tmp",
            patience=config.stuck_seconds,
        )
        trial = subject.play(number, of_one, expected)
        if isinstance(of_one, list):
            trial = replace(trial, too_late=len(of_one) - len(trial.strikes))
        _tell(f"run {number}: {len(trial.strikes)} faults, {trial.difference or 'the same bits'}")
        yield trial


def _host(folder: Path) -> dict[str, int]:
    """What a run may leave outside its directory, and what this process holds."""
    signs = memory_signs.read()
    return {
        "own descriptors": psutil.Process().num_fds(),
        "shared memory KiB": signs.shared_used // 1024,
        "temporary files": len(left_in(folder / "tmp")),
    }


def _tell(text: str) -> None:
    print(f"samestep: {text}", file=sys.stderr, flush=True)
