"""`samestep plan [RUN_DIR]`: figures in, one row for each number of ranks out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from samestep.launcher.command_line.argv import interleaved
from samestep.launcher.command_line.options import load
from samestep.launcher.contract import ExitCode, RunDir, UsageError
from samestep.launcher.scale.drawing import write
from samestep.launcher.scale.measured import Measured, measured
from samestep.launcher.scale.plan_config import FROM_A_RUN, PlanConfig, numbers_of_ranks
from samestep.launcher.scale.predict import Prediction, Workload, predict

_MUST = ("batch", "forward_ms", "backward_ms", "weights_mb", "samples")
_UNITS = ((86_400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"))
_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def plan(argv: Sequence[str], say: Callable[[str], None]) -> int:
    """Print the table, or JSON, and draw it where that was asked.

    Raises:
        UsageError: a figure is missing that no run directory tells.
    """
    own, words = interleaved(argv, PlanConfig, "samestep plan")
    config = load(PlanConfig, own, {}, program="samestep plan", operands="RUN_DIR")
    if len(words) > 1:
        raise UsageError(
            f"plan is expected to be followed by one run directory, but got {len(words)} words", "samestep plan RUN_DIR"
        )
    found = measured(RunDir(Path(words[0]))) if words else None
    work = workload(config, found)
    question = config.question(found.save if found else None, found.restart if found else None)
    rows = [predict(work, question, ranks) for ranks in numbers_of_ranks(config.ranks)]
    if config.plot is not None:
        write(config.plot, rows, title(work, config))
    if config.json:
        about = {"workload": dataclasses.asdict(work), "question": dataclasses.asdict(question)}
        say(json.dumps(about | {"rows": [_as_json(row) for row in rows]}, allow_nan=False))
    else:
        for line in table(rows):
            say(line)
        say(
            f"{title(work, config)}. Without evaluations. "
            "Formulas and sources: samestep.launcher.scale, network.py and faults.py"
        )
    return ExitCode.DONE


def workload(config: PlanConfig, found: Measured | None) -> Workload:
    """What was given, completed by what was measured.

    Raises:
        UsageError: something is in neither.
    """
    if found is None:
        missing = [name for name in _MUST if getattr(config, name) is None]
        if missing:
            raise UsageError(
                f"--{missing[0].replace('_', '-')} is expected without a run directory, but is missing",
                FROM_A_RUN,
            )

    def pick(given: float | None, scale: float, name: str, default: float = 0.0) -> float:
        seen = getattr(found, name, None)
        return given * scale if given is not None else default if seen is None else float(seen)

    weights = pick(config.weights_mb, 1e6, "weights")
    if not weights:
        why = "is 0" if config.weights_mb is not None else "the run has no checkpoint that can be read"
        raise UsageError(f"--weights-mb is expected to be more than 0, but {why}", "--weights-mb 400")
    gradients = weights if config.weights_mb is not None else pick(None, 1.0, "gradients", weights)
    ranks = round(pick(config.measured_ranks, 1, "ranks", 1.0))
    work = Workload(
        batch=round(pick(config.batch, 1, "batch")),
        ranks=ranks,
        share=1 / ranks if found is None or config.measured_ranks is not None else found.share,
        data=pick(config.data_ms, 1e-3, "data"),
        forward=pick(config.forward_ms, 1e-3, "forward"),
        backward=pick(config.backward_ms, 1e-3, "backward"),
        optimizer=pick(config.optimizer_ms, 1e-3, "optimizer"),
        gradients=gradients if config.gradients_mb is None else config.gradients_mb * 1e6,
        weights=weights,
        state=pick(config.state_mb, 1e6, "state"),
        activations=config.activations_mb * 1e6,
        samples=round(pick(config.samples, 1, "samples")),
    )
    if not work.data + work.forward + work.backward + work.optimizer:
        raise UsageError(
            "--data-ms, --forward-ms, --backward-ms, --optimizer-ms are expected to add up to more than 0", FROM_A_RUN
        )
    return work


def _as_json(row: Prediction) -> dict[str, Any]:
    """What is without end is null: JSON has no infinity."""
    values = dataclasses.asdict(row)
    return {name: None if value == math.inf else value for name, value in values.items()}


def title(work: Workload, config: PlanConfig) -> str:
    """What was asked, in one line."""
    return (
        f"{config.scaling} scaling, --reduction {config.reduction}, {_size(work.gradients)} of gradients, "
        f"{config.bandwidth:g} GB/s and {config.latency_us:g} us between machines of {config.ranks_per_node} ranks"
    )


def duration(seconds: float) -> str:
    """Two or three digits and a unit."""
    for size, name in _UNITS:
        if seconds >= size or name == "ms":
            return f"{_short(seconds / size, 3)} {name}" if seconds < 1e5 * 86_400 else "never"
    raise AssertionError


def table(rows: Sequence[Prediction]) -> list[str]:
    """Lines for people."""
    head = ("ranks", "batch", "step", "exposed", "samples/s", "efficiency", "memory", "fails every", "save every")
    cells = [(*head, "goodput", "to train"), *map(_cells, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _cells(row: Prediction) -> tuple[str, ...]:
    return (
        f"{row.ranks}",
        f"{row.batch}",
        duration(row.step),
        f"{row.exposed / row.step:.0%}",
        _short(row.samples_per_s, 4),
        f"{row.efficiency:.0%}",
        _size(row.memory),
        duration(row.mttf),
        duration(row.checkpoint_every),
        f"{row.goodput:.1%}",
        duration(row.days * 86_400),
    )


def _size(count: float) -> str:
    scale, unit = next((size, name) for size, name in _SIZES if count >= size or name == "B")
    return f"{_short(count / scale, 3)} {unit}"


def _short(value: float, digits: int) -> str:
    """So many digits that count; large numbers in full, with thousands apart."""
    text = f"{value:.{digits}g}"
    return text if value < 1 or "e" not in text else f"{float(text):,.0f}"
