"""`samestep verify recipe.py`: does this recipe end in the same bits on other numbers of ranks, and after stops?

Runs the first steps of the recipe at several world sizes, and once stopped and resumed at others in between, each as a
user would start it, and compares digests, the loss of every step, and the optimizer's file. Reads results from run
directories only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from samestep.launcher import manifest
from samestep.launcher.command_line.argv import Recipe
from samestep.launcher.command_line.options import Option
from samestep.launcher.config import MOST_RANKS
from samestep.launcher.contract import WEIGHTS, ExitCode, RunDir, UsageError
from samestep.launcher.digest import file_digest, tensor_digests
from samestep.launcher.supervise.process import end, start_in_session
from samestep.launcher.tidy import ends_tidily

# The first step of a start sums gradients after backward, the second in DDP, which then lays out its buckets anew.
STEPS_OF_A_START = 3


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Options of `samestep verify`; words after the recipe belong to the recipe."""

    world_sizes: Annotated[str, Option("numbers of ranks to compare, the first is the reference", "ranks")] = "1,2,3,4"
    stops: Annotated[str, Option("numbers of ranks of a run that is stopped and resumed in between", "ranks")] = "4,2,3"
    steps: Annotated[int, Option("optimizer steps of each run", "steps")] = 24
    shards: Annotated[int | None, Option("logical shards; default: the largest of the world sizes", "shards")] = None
    keep: Annotated[Path | None, Option("keep the run directories here", "folder")] = None
    quiet: Annotated[bool, Option("do not tell which run goes on")] = False
    json: Annotated[bool, Option("print the rows as JSON instead of a table")] = False

    def __post_init__(self) -> None:
        """Judge the lists.

        Raises:
            UsageError: not numbers of ranks, or too few steps for the legs of the stopped run.
        """
        sizes, stops = ranks_of("--world-sizes", self.world_sizes), ranks_of("--stops", self.stops)
        if not sizes:
            raise UsageError(
                "--world-sizes is expected to name at least one number of ranks, but is empty", "--world-sizes 1,2,4"
            )
        if len(set(sizes)) < len(sizes):
            raise UsageError(
                f"--world-sizes is expected to name each number once, but is {self.world_sizes}",
                f"--world-sizes {','.join(map(str, dict.fromkeys(sizes)))}",
            )
        if self.shards is not None and self.shards < 1:
            raise UsageError(
                f"--shards is expected to be at least 1, but is {self.shards}",
                "leave it out for the largest of the world sizes",
            )
        if self.steps < 1:
            raise UsageError(
                f"--steps is expected to be at least 1, but is {self.steps}", f"leave it out for {VerifyConfig.steps}"
            )
        if len(legs_of(stops, self.steps)) < len(stops):
            least = STEPS_OF_A_START * len(stops)
            raise UsageError(
                f"--steps is expected to be at least {least}, {STEPS_OF_A_START} for each start of --stops {self.stops}"
                f", but is {self.steps}",
                "the first step of a start takes another way than later ones; or name fewer --stops",
            )


@dataclass(frozen=True, slots=True)
class Row:
    """One run: `legs` are (world size, step at which it ends)."""

    legs: tuple[tuple[int, int], ...]
    run_dir: RunDir

    @property
    def name(self) -> str:
        """Short: `3`, or `4 -> 2 -> 3`."""
        return " -> ".join(str(world_size) for world_size, _ in self.legs)


def ranks_of(flag: str, text: str) -> tuple[int, ...]:
    """Numbers of ranks in a comma separated list.

    Raises:
        UsageError: a part is no positive integer, or more than one machine starts.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdecimal() and part.strip("0") for part in parts):
        raise UsageError(f"{flag} is expected to be numbers of ranks like 1,2,4, but is {text}", f"{flag} 1,2,4")
    for part in parts:
        if len(part) > 9 or int(part) > MOST_RANKS:
            raise UsageError(
                f"{flag} is expected to name at most {MOST_RANKS} ranks, but names {part}",
                f"all of them start on this machine: {flag} 1,2,4",
            )
    return tuple(int(part) for part in parts)


def plan_rows(config: VerifyConfig, folder: Path, steps: int) -> list[Row]:
    """The runs to compare: one a world size, and one that stops in between where there are steps for that. Pure."""
    rows = [
        Row(((size, steps),), RunDir(folder / f"w{size}")) for size in ranks_of("--world-sizes", config.world_sizes)
    ]
    legs = legs_of(ranks_of("--stops", config.stops), steps)
    if legs:
        rows.append(Row(legs, RunDir(folder / "stopped")))
    return rows


def legs_of(stops: Sequence[int], steps: int) -> tuple[tuple[int, int], ...]:
    """(world size, step at which it ends) of equal parts that show how such a start goes on; fewer where steps are few.

    None where the run would not be stopped at all.
    """
    count = min(len(stops), max(steps // STEPS_OF_A_START, min(steps, 1)))
    if count < min(len(stops), 2):
        return ()
    return tuple((size, steps * (leg + 1) // count) for leg, size in enumerate(stops[:count]))


def too_short(stops: Sequence[int], steps: int) -> str:
    """A sentence about stops for which a recipe has too few steps; empty if it has enough. Pure."""
    legs = legs_of(stops, steps)
    if len(legs) == len(stops):
        return ""
    wanted, done = (" -> ".join(map(str, sizes)) for sizes in (stops, [size for size, _ in legs]))
    ends = "1 step" if steps == 1 else f"{steps} steps"
    return (
        f"the recipe is too short to be stopped as {wanted}: it ends after {ends}, and each start needs "
        f"{STEPS_OF_A_START}; {f'it was stopped as {done}' if legs else 'it was not stopped'}"
    )


def verify(config: VerifyConfig, recipe: Recipe, environ: Mapping[str, str], say: Callable[[str], None]) -> int:
    """Run everything, print the table, and return 0 only if all rows are equal."""
    with ends_tidily(), tempfile.TemporaryDirectory(prefix="samestep-verify-") as temporary:
        folder = config.keep or Path(temporary)
        rows = plan_rows(config, folder, config.steps)
        _refuse_old_runs(rows)
        shards = config.shards or max(size for row in rows for size, _ in row.legs)
        results: list[dict[str, str]] = []
        liveness, _life = os.pipe()  # open until this process ends
        while len(results) < len(rows):
            row = rows[len(results)]
            if not (config.json or config.quiet):
                print(f"ranks {row.name}: {row.legs[-1][1]} steps ...", file=sys.stderr, flush=True)
            status = _run_row(row, recipe, shards, environ, liveness)
            if status:
                return status
            results.append(_result(row))
            if len(results) == 1:  # the recipe may end earlier: then the stops lie before that
                rows[1:] = plan_rows(config, folder, len(losses(row)))[1:]
        short = too_short(ranks_of("--stops", config.stops), len(losses(rows[0])))
        differing = {row.name: first_difference(rows[0], row) for row in rows[1:]}
        if config.json:
            say(json.dumps([result | {"difference": differing.get(result["ranks"], "")} for result in results]))
        else:
            for line in table(results, differing, shards):
                say(line)
        if short:
            print(f"note: {short}", file=sys.stderr)
        return ExitCode.FAILED if any(differing.values()) else ExitCode.DONE


def _refuse_old_runs(rows: Sequence[Row]) -> None:
    """A run that is there already would be resumed and judged in place of what the recipe does now."""
    old = next((row.run_dir.path for row in rows if row.run_dir.path.exists()), None)
    if old is not None:
        raise UsageError(
            f"--keep is expected to name a folder without earlier runs, but {old} is there",
            "name a new folder, or remove the old runs",
        )


def _run_row(row: Row, recipe: Recipe, shards: int, environ: Mapping[str, str], liveness: int) -> int:
    """Start each leg through the public command; a failure is shown and ends everything."""
    form = {"module": ["-m"], "command": ["--no-python"]}.get(recipe.kind.value, [])
    for world_size, last_step in row.legs:
        command = [sys.executable, "-m", "samestep.launcher", "run", "--quiet", "--no-report"]
        command += ["--nproc-per-node", str(world_size), *form, recipe.target, *recipe.arguments]
        command += ["--shards", str(shards), "--max-steps", str(last_step), "--run-dir", str(row.run_dir.path)]
        command += ["--resume", "auto"]
        status, said = _run(command, environ, liveness)
        if status:
            print(said[-4000:], end="", file=sys.stderr)
            return status
    return 0


def _run(command: Sequence[str], environ: Mapping[str, str], liveness: int) -> tuple[int, str]:
    """Exit code and stderr of a launcher that does not outlive us, nor do its ranks."""
    null = subprocess.DEVNULL
    launcher = start_in_session(command, dict(environ), liveness, stdin=null, stdout=null, stderr=subprocess.PIPE)
    try:
        said = launcher.communicate()[1]
    finally:
        end(launcher)
    return launcher.returncode, said.decode(errors="replace")


def _newest(row: Row) -> Path:
    newest, _ = manifest.newest_valid(row.run_dir.checkpoints)
    if newest is None:
        raise UsageError(
            f"the recipe is expected to leave a checkpoint, but {row.run_dir.path} has none",
            "verify works for recipes that call samestep.train.train",
        )
    return newest


def _result(row: Row) -> dict[str, str]:
    newest = _newest(row)
    last = losses(row)[-1] if losses(row) else ""
    return {"ranks": row.name, "digest": file_digest(newest / WEIGHTS), "loss": last, "step": newest.name}


def losses(row: Row) -> list[str]:
    """Hex floats of the loss of every step, in order."""
    lines = row.run_dir.events.read_text().splitlines()
    return [event["loss_hex"] for event in map(json.loads, lines) if event.get("event") == "step"]


def first_difference(reference: Row, other: Row) -> str:
    """Where two runs part: the first step whose loss differs, or the first tensor; empty if nowhere."""
    expected, actual = losses(reference), losses(other)
    for step, (left, right) in enumerate(zip(expected, actual, strict=False), start=1):
        if left != right:
            return f"loss of step {step} differs{_first_tensor(reference, other)}"
    if len(expected) != len(actual):
        return f"{len(actual)} steps, expected {len(expected)}"
    tensor = _first_tensor(reference, other)
    return tensor.lstrip(", ")


def _first_tensor(reference: Row, other: Row) -> str:
    for name in sorted(path.name for path in _newest(reference).glob("*.safetensors")):
        left, right = tensor_digests(_newest(reference) / name), tensor_digests(_newest(other) / name)
        for tensor in sorted(left.keys() | right.keys()):
            if left.get(tensor) != right.get(tensor):
                return f", first tensor {tensor} of {name}"
    return ""


def table(results: Sequence[Mapping[str, str]], differing: Mapping[str, str], shards: int) -> list[str]:
    """Lines of the table that people read."""
    width = max(len("ranks"), *(len(result["ranks"]) for result in results))
    lines = [f"{'ranks':<{width}}  {'sha256 of the weights':<64}  same bits"]
    for result in results:
        problem = differing.get(result["ranks"])
        verdict = "reference" if problem is None else f"NO: {problem}" if problem else "yes"
        lines.append(f"{result['ranks']:<{width}}  {result['digest']}  {verdict}")
    same = not any(differing.values())
    lines.append(
        f"{len(results)} runs at {shards} shards: {'all end in the same bits' if same else 'NOT the same bits'}"
    )
    return lines
