"""What all ranks do after the same step although only some of them know why: a signal came, rank zero's clock ran out.

The ranks exchange two words every few steps, about ten times a second, instead of in each step: a step of a
millisecond pays nothing for it, and on a GPU the host waits for the device no more often than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from samestep.train.parallel.group import Group

PACE_SECONDS = 0.1  # a rank that becomes a hundred times slower still hears of a stop within ten seconds


def paced(every: int, microseconds: int, pace_seconds: float) -> int:
    """Steps until the next exchange after `every` steps took so long: towards `pace_seconds`, at most doubled. Pure."""
    return min(2 * every, max(1, int(every * pace_seconds * 1e6 / max(1, microseconds))))


@dataclass(slots=True)
class Agreement:
    """Asked after each step. `signum` tells of this rank's request to stop, `late` whether rank zero's clock ran out.

    Attributes:
        stop: the signal for which all ranks stop after this step; 0: none.
    """

    group: Group
    device: torch.device
    signum: Callable[[], int]
    late: Callable[[], bool]
    pace_seconds: float = PACE_SECONDS
    now: Callable[[], float] = time.monotonic
    stop: int = 0
    _every: int = 1
    _steps: int = 0
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self.now()

    def after_step(self) -> bool:
        """Whether the state is to be saved now. A collective after some steps, the same ones on every rank."""
        self._steps += 1
        if self._steps < self._every:
            return False
        moment = self.now()
        words = [self.signum(), int(self.late()), int(1e6 * (moment - self._since))]
        rows = self.group.gather(torch.tensor(words, device=self.device)).tolist()
        self.stop = next((signum for signum, _, _ in rows if signum), 0)
        _, late, microseconds = rows[0]
        self._every, self._steps, self._since = paced(self._every, microseconds, self.pace_seconds), 0, moment
        return bool(late or self.stop)
