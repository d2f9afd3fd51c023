"""Decides about loader workers from what fetching and stepping take; see `workers` for the rule.

The first lists are fetched in the rank itself and timed. The rule can't know what else workers cost (cores that share
a cache or a clock, memory touched first by another process), so the first ones are on trial: where lists do not come
5 % faster the rank goes back to fetching by itself. Later, a rank that waits for its data measures again, a few times
at most.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from samestep.train.data.workers import GAIN, Choice, Room, Timing, choose, seconds_a_list

_WARM_UP, _FEW, _ENOUGH, _SECONDS = 1, 3, 16, 0.15  # lists not counted, at least and at most measured; or for how long
_WINDOW = 64  # lists between two later looks
_STARVED = 0.1  # share of the time that a rank may wait for batches
_WORSE = 2.0  # times that fetching has to take what it took when workers brought nothing, for them to be tried again
_DECISIONS = 4
_START_SECONDS, _MOST_AHEAD = 0.3, 32  # workers get that long, in lists at most, to have their first batches ready
_COPIED = 256 << 20  # bytes that a worker may add to its own memory without a word
_MEMORY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Tell:
    """Who is told; nobody by default."""

    choice: Callable[[Choice, str], None] = lambda *_: None
    warning: Callable[[str], None] = lambda *_: None


@dataclass(slots=True)
class Watch:
    """Fed with every fetch while `looking`; once it is `due`, `decision` says what to change to."""

    room: Callable[[], Room]
    say: Callable[[Choice, str], None]
    looking: bool = True
    lists_to_start: int = 0  # that pass while newly started workers get ready
    _workers: int = 0
    _decided: int = 0
    _on_trial: bool = False
    _alone: float = 0.0  # seconds a list took before workers came
    _hoped: float = 0.0  # and was expected to take with them
    _slower: float = 1.0  # times that workers took what was expected of them
    _fetch: float = 0.0  # seconds of a list for which workers came
    _in_vain: float = 0.0  # and for which they were sent away
    _cpu: float = 1.0
    _bytes: int = 0
    _warm_up: int = _WARM_UP
    _fetches: list[float] = field(default_factory=list)
    _steps: list[float] = field(default_factory=list)
    _computing: float = 0.0

    def fetched(self, fetch: float, computing: float, step: float | None, batch: Any) -> None:
        """One list took `fetch` seconds to come, `computing` of them on a core, `step` after the one before."""
        if self._warm_up or step is None:
            self._warm_up = max(0, self._warm_up - 1)
            return
        self._fetches.append(fetch)
        self._steps.append(step)
        self._computing += computing
        if not self._decided:
            sizes = [leaf.nbytes for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
            self._bytes = max(self._bytes, sum(sizes))

    @property
    def choosing(self) -> bool:
        """Whether the first measurements are going on, or those of workers on trial."""
        return self._on_trial or (self.looking and not self._decided)

    @property
    def due(self) -> bool:
        """Whether enough was measured."""
        count = len(self._fetches)
        if not self.choosing:
            return count >= _WINDOW
        few = max(_FEW, 2 * self._workers)  # workers may deliver all at once
        return count >= max(_ENOUGH, few) or (count >= few and sum(self._fetches) + sum(self._steps) >= _SECONDS)

    def decision(self) -> Choice | None:
        """What to change to; None to go on as it is. Measures anew from here on."""
        if self._on_trial:
            return self._verdict()
        fetch = statistics.median(self._fetches)
        step = sorted(self._steps)[len(self._steps) // 4]  # the first steps import and allocate: later ones are shorter
        longest, all_fetches, all_steps = max(self._fetches), sum(self._fetches), sum(self._steps)
        waiting = all_fetches / (all_fetches + all_steps)
        if not self._workers:
            self._cpu = min(1.0, self._computing / all_fetches)
            self._alone = self._seconds_a_list()
        self._forget()
        known = not self._workers and fetch < _WORSE * self._in_vain
        if self._decided and (waiting <= _STARVED or known):
            return None
        alone = (fetch + step) * self._workers if self._workers else fetch  # starved workers work all the time
        timing, room = Timing(alone, max(longest, alone), self._cpu, step, self._bytes), self.room()
        choice = choose(timing, room, self._slower)
        self._hoped, self._fetch = seconds_a_list(timing, room, choice.workers), fetch
        if self._decided and choice.workers <= self._workers:
            return None
        again = f" (measured again: {100 * waiting:.0f}% of the time was spent waiting for data)"
        self.say(choice, f"{_workers(choice.workers)} a rank: {choice.reason}{again if self._decided else ''}")
        self._decided += 1
        self.looking = self._decided < _DECISIONS
        self.lists_to_start = min(_MOST_AHEAD, 1 + int(_START_SECONDS / (fetch + step)))
        return choice

    def _verdict(self) -> Choice | None:
        took, self._on_trial = self._seconds_a_list(), False
        self._forget()
        if took <= self._alone * GAIN:
            return None
        back = Choice(0, reason=f"with {self._workers} a batch takes {_ms(took)}, without {_ms(self._alone)}")
        self._slower, self._workers, self._in_vain = max(1.0, took / self._hoped), 0, self._fetch
        self.say(back, f"{_workers(0)} a rank: {back.reason}")
        return back

    def _seconds_a_list(self) -> float:
        """That it takes as a rule: a batch that comes late counts, a step between which there was an evaluation not."""
        return statistics.fmean(self._fetches) + sorted(self._steps)[len(self._steps) // 4]

    def workers_took_over(self, choice: Choice) -> None:
        """What was measured before says nothing about these workers."""
        self._on_trial = self.looking and not self._workers
        self._workers, self._warm_up = choice.workers, choice.workers * choice.prefetch
        self._forget()

    def _forget(self) -> None:
        self._fetches, self._steps, self._computing = [], [], 0.0


def _workers(number: int) -> str:
    return f"{number} loader worker{'' if number == 1 else 's'}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


@dataclass(slots=True)
class CopyWatch:
    """Names a dataset whose pages the workers copy by reading it: a Python object counts who holds it."""

    copied: Callable[[list[int]], int]  # most bytes that one of some processes has of its own
    warn: Callable[[str], None]
    now: Callable[[], float]
    _looked: float = float("-inf")
    _pids: list[int] = field(default_factory=list)
    _at_start: int = 0
    _named: bool = False

    def look(self, pids: list[int]) -> None:
        """Read the workers' memory, once a minute at most."""
        if self._named or self.now() - self._looked < _MEMORY_SECONDS:
            return
        copied, self._looked = self.copied(pids), self.now()
        if pids != self._pids:
            self._pids, self._at_start = pids, copied
        if copied - self._at_start > _COPIED:
            self._named = True
            self.warn(
                f"loader workers copy memory of the dataset by reading it: the largest has {copied >> 20} MiB of its "
                f"own, {(copied - self._at_start) >> 20} MiB more than at its start; keep the samples in one tensor or "
                "array instead of many Python objects, or pass a smaller --num-workers"
            )
