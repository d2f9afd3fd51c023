"""Records of steps that nobody made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from samestep.train.observe.ledger import RankLoads, StepRecords
from samestep.train.observe.phases import BETWEEN, PHASES
from samestep.train.parallel.shards import StepPlan


@pytest.fixture
def records() -> Any:
    """`records(walls=…, …)`: steps of `samples`, `size` a full one, with seconds (world_size, steps, PHASES)."""

    def make(
        walls: list[float],
        *,
        begin: int = 0,
        cursor: int | None = None,
        samples: int = 10,
        losses: list[float] | None = None,
        weightless: list[bool] | None = None,
        seconds: Any = None,
        between: Any = (0.0,),
    ) -> StepRecords:
        steps = len(walls)
        at = begin * samples if cursor is None else cursor
        table = np.zeros((1, steps, len(PHASES))) if seconds is None else np.array(seconds)
        loads = {phase: table[:, :, n].mean(1).tolist() for n, phase in enumerate(PHASES)}
        return StepRecords(
            plans=[StepPlan(begin + n, 0, at + n * samples, at + (n + 1) * samples, 1) for n in range(steps)],
            losses=losses or [0.5] * steps,
            weightless=weightless or [False] * steps,
            extras={},
            mean=table.mean(0),
            most=table.max(0),
            slowest=table.argmax(0),
            walls=walls,
            loads=RankLoads({**loads, BETWEEN: list(between)}, {"host": [1], "device": [0]}),
        )

    return make
