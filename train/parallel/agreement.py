"""What all ranks do after the same step although only some of them know why: a signal came, rank zero's clock ran out.

The ranks exchange a few words every few steps, about ten times a second, instead of in each step: a step of a
millisecond pays nothing for it. GPUs exchange them too, and hosts that would wait for that would leave the devices
without work; there each exchange brings what was said at the one before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samestep.train.parallel.group import Group

PACE_SECONDS = 0.1  # a rank that becomes a hundred times slower still hears of a stop within ten seconds
Words = list[int]  # signal, whether rank zero's clock ran out, microseconds since the last exchange, steps since then
Exchange = Callable[[Words], list[Words]]  # this rank's words; those of all ranks, by rank


def paced(every: int, microseconds: int, pace_seconds: float) -> int:
    """Steps until the next exchange after `every` steps took so long: towards `pace_seconds`, at most doubled. Pure."""
    return min(2 * every, max(1, int(every * pace_seconds * 1e6 / max(1, microseconds))))


def words_after(before: list[Words], words: Words) -> Words:
    """What a rank says once it has heard `before`: a clock that ran out then is wound up only after this. Pure."""
    return [words[0], 0, *words[2:]] if before and before[0][1] else words


@dataclass(slots=True)
class AtOnce:
    """Gathers on the host."""

    group: Group

    def __call__(self, words: Words) -> list[Words]:
        """A collective."""
        rows: list[Words] = self.group.gather(torch.tensor(words)).tolist()
        return rows


@dataclass(slots=True)
class OneLater:
    """Gathers on the devices, and reads when it is called again: by then the answer is there."""

    group: Group
    device: torch.device
    _answer: Tensor | None = None
    _there: torch.cuda.Event | None = None

    def __call__(self, words: Words) -> list[Words]:
        """What the last call gathered, nothing the first time. A collective."""
        before: list[Words] = []
        if self._answer is not None and self._there is not None:
            self._there.synchronize()
            before = self._answer.tolist()
        said = torch.tensor(words_after(before, words)).pin_memory()
        rows = self.group.gather(said.to(self.device, non_blocking=True))
        self._answer = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
        self._there = torch.cuda.current_stream(self.device).record_event()
        return before


def exchange_of(group: Group, device: torch.device) -> Exchange:
    """How words travel between ranks that compute on `device`."""
    return OneLater(group, device) if device.type == "cuda" and group.world_size > 1 else AtOnce(group)


@dataclass(slots=True)
class Agreement:
    """Asked after each step. `signum` tells of this rank's request to stop, `late` whether rank zero's clock ran out.

    Attributes:
        stop: the signal for which all ranks stop after this step; 0: none.
    """

    group: Group
    exchange: Exchange
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
        rows = self.exchange([self.signum(), int(self.late()), int(1e6 * (moment - self._since)), self._steps])
        self._steps, self._since = 0, moment
        if not rows:
            return False
        self.stop = next((row[0] for row in rows if row[0]), 0)
        _, due, microseconds, steps = rows[0]
        self._every = paced(steps, microseconds, self.pace_seconds)
        return bool(due or self.stop)
