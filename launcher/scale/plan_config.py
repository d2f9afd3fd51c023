"""PlanConfig: what the person at the keyboard asked of `samestep plan`, in the units that people use."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from samestep.launcher.command_line.options import Option
from samestep.launcher.contract import UsageError
from samestep.launcher.scale.faults import LLAMA3_RANK_HOURS
from samestep.launcher.scale.network import Link, Machines
from samestep.launcher.scale.predict import Question, Scaling

_MAY_BE_ZERO = ("latency_us", "node_latency_us", "save_seconds", "restart_seconds", "data_ms", "optimizer_ms")
FROM_A_RUN = "samestep plan RUN_DIR takes the figures from a run"
_LEAST, _MOST = 1e-9, 1e15  # no machine has such numbers, and sums of them stay numbers
_MOST_RANKS = 1 << 24
_SIZES = ("gradients_mb", "weights_mb", "state_mb", "activations_mb", "forward_ms", "backward_ms")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Options of `samestep plan [RUN_DIR]`; figures that are given win over measured ones."""

    ranks: Annotated[str, Option("numbers of ranks to plan for: 1,8,64, or 1-16384 for powers of two", "ranks")] = (
        "1-16384"
    )
    scaling: Annotated[
        Scaling, Option("weak: every rank keeps its samples, the batch grows; strong: the batch stays")
    ] = "weak"
    reduction: Annotated[Literal["exact", "fast"], Option("as of the recipe")] = "exact"
    samples: Annotated[int | None, Option("to train on in all; default: those of the whole run", "samples")] = None
    batch: Annotated[int | None, Option("samples of a measured step, over all ranks", "samples")] = None
    measured_ranks: Annotated[int | None, Option("ranks on which times were measured", "ranks")] = None
    data_ms: Annotated[float | None, Option("loading, a step", "ms")] = None
    forward_ms: Annotated[float | None, Option("forward pass, a step", "ms")] = None
    backward_ms: Annotated[float | None, Option("backward pass, a step", "ms")] = None
    optimizer_ms: Annotated[float | None, Option("optimizer, a step", "ms")] = None
    gradients_mb: Annotated[
        float | None, Option("gradients that are summed; default: as measured, else the weights", "MB")
    ] = None
    weights_mb: Annotated[float | None, Option("weights and buffers", "MB")] = None
    state_mb: Annotated[float | None, Option("optimizer state", "MB")] = None
    activations_mb: Annotated[float, Option("all other memory of a step; not measured", "MB")] = 0.0
    ranks_per_node: Annotated[int, Option("ranks of one machine", "ranks")] = 8
    bandwidth: Annotated[float, Option("from a rank to other machines, one direction", "GB/s")] = 50.0
    latency_us: Annotated[float, Option("of a message between machines", "us")] = 5.0
    node_bandwidth: Annotated[float, Option("from a rank to its own machine's, one direction", "GB/s")] = 370.0
    node_latency_us: Annotated[float, Option("of a message within a machine", "us")] = 2.0
    bucket_mb: Annotated[float, Option("gradients that are sent together, as DDP's bucket_cap_mb", "MB")] = 25.0
    rank_hours: Annotated[float, Option("mean time to failure of one rank; default: Llama 3's GPUs", "hours")] = round(
        LLAMA3_RANK_HOURS
    )
    save_seconds: Annotated[
        float | None, Option("for which a checkpoint stops training; default: measured, else 1", "seconds")
    ] = None
    restart_seconds: Annotated[
        float | None, Option("from a failure to the next step; default: measured, else 60", "seconds")
    ] = None
    plot: Annotated[Path | None, Option("draw it into a file that ends in .svg or .html", "file")] = None
    json: Annotated[bool, Option("print the rows as JSON instead of a table", negative="")] = False

    def __post_init__(self) -> None:
        """Judge the numbers.

        Raises:
            UsageError: with setting, expectation and value.
        """
        numbers_of_ranks(self.ranks)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            problem = _problem(field.name, value)
            if problem:
                raise UsageError(
                    f"--{field.name.replace('_', '-')} is expected to be {problem}, but is {value}",
                    FROM_A_RUN if field.default is None else f"leave it out for {field.default}",
                )
        if self.plot is not None and self.plot.suffix not in (".svg", ".html"):
            raise UsageError(f"--plot is expected to end in .svg or .html, but is {self.plot}", "--plot plan.svg")

    def question(self, save: float | None, restart: float | None) -> Question:
        """In seconds and bytes; `save` and `restart` are as measured, where they were."""
        given = self.save_seconds if self.save_seconds is not None else save
        again = self.restart_seconds if self.restart_seconds is not None else restart
        return Question(
            machines=Machines(
                self.ranks_per_node,
                Link(self.node_latency_us * 1e-6, self.node_bandwidth * 1e9),
                Link(self.latency_us * 1e-6, self.bandwidth * 1e9),
            ),
            scaling=self.scaling,
            exact=self.reduction == "exact",
            bucket=self.bucket_mb * 1e6,
            rank_hours=self.rank_hours,
            save=1.0 if given is None else given,
            restart=60.0 if again is None else again,
        )


def _problem(name: str, value: float) -> str:
    """What the number is expected to be, if it is not; a rank may live for ever."""
    may_be_zero = name in (*_MAY_BE_ZERO, *_SIZES)
    if value != value or value < 0 or (value == 0 and not may_be_zero):
        return "at least 0" if may_be_zero else "more than 0"
    most = _MOST if name != "rank_hours" else sys.float_info.max
    if 0 < value < _LEAST or value > most:
        return f"from {_LEAST:g} to {most:g}"
    return ""


def numbers_of_ranks(text: str) -> list[int]:
    """`1,8,64` as it is; `1-64` as the powers of two from 1 to 64.

    Raises:
        UsageError: neither form, or no rank.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = [first, last] if dash else [first]
        if not all(end.isascii() and end.isdecimal() and 1 <= int(end) <= _MOST_RANKS for end in ends):
            raise UsageError(
                f"--ranks is expected to be numbers such as 1,8,64 or 1-16384, but is {text!r}",
                f"from 1 to {_MOST_RANKS}, by commas; a dash means the powers of two from one to the other",
            )
        low, high = int(ends[0]), int(ends[-1])
        found += [low] if not dash else [1 << power for power in range(25) if low <= 1 << power <= high]
    if not found:
        raise UsageError(
            f"--ranks is expected to have a power of two in it, but is {text!r}", f"--ranks {text.replace('-', ',')}"
        )
    return sorted(set(found))
