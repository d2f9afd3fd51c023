"""Pure: a seed -> which faults strike which run, and at which steps. The same seed gives the same plan."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from samestep.launcher.chaos.kinds import Kind, Moment

Card = TypeVar("Card")
_BEFORE_ANY_SAVE = frozenset({Moment.JOINING, Moment.FIRST_STEP})


@dataclass(frozen=True, slots=True)
class Course:
    """What an undisturbed run does: `steps` in all, an epoch's end or a save after each of the others."""

    steps: int
    epoch_ends: tuple[int, ...]
    saves: tuple[int, ...]
    join_seconds: float  # from the start to the first event


@dataclass(frozen=True, slots=True)
class Fault:
    """One strike: once `after_step` steps are done (None: while the ranks join), `delay` seconds later."""

    number: int
    kind: Kind
    moment: Moment
    rank: int
    after_step: int | None
    delay: float = 0.0


def plan(
    seed: int, faults: int, per_run: int, kinds: Sequence[Kind], course: Course, world_size: int
) -> list[list[Fault]]:
    """Faults of each run in the order in which they strike; each moment at most once a run, each kind equally often."""
    choose = random.Random(seed)
    early = [kind for kind in kinds if kind.hits_from_the_start] or kinds
    decks = {moment: _deck(early if moment in _BEFORE_ANY_SAVE else kinds, choose) for moment in Moment}
    moments = _deck(tuple(Moment), choose)
    runs: list[list[Fault]] = []
    numbers = iter(range(1, faults + 1))
    left = faults
    while left:
        count = min(left, per_run, len(Moment))
        left -= count
        chosen: list[Moment] = []
        while len(chosen) < count:
            moment = next(moments)
            if moment not in chosen:
                chosen.append(moment)
        drafts = [_draft(next(decks[moment]), moment, course, world_size, choose) for moment in chosen]
        drafts.sort(key=lambda fault: -1 if fault.after_step is None else fault.after_step)
        runs.append([replace(fault, number=next(numbers)) for fault in _apart(drafts, world_size)])
    return runs


def soak(seed: int, every: float, kinds: Sequence[Kind], world_size: int) -> Iterator[Fault]:
    """Faults without end, `every` seconds on average, whatever the run is doing then."""
    choose, number = random.Random(seed), 0
    deck = _deck(kinds, choose)
    while True:
        number += 1
        delay = every * choose.uniform(0.5, 1.5)
        yield Fault(number, next(deck), Moment.MID_EPOCH, choose.randrange(world_size), 0, delay)


def over_runs(faults: Iterator[Fault], stop: float, now: Callable[[], float]) -> Iterator[Iterable[Fault]]:
    """The faults of one run after the other, until `stop`; for which a run was too short, those strike the next one."""
    fault = next(faults)
    due = now() + fault.delay

    def of_one() -> Iterator[Fault]:
        nonlocal fault, due
        while now() < stop:
            yield replace(fault, delay=max(0.0, due - now()))
            fault = next(faults)  # asked for the next one: this one has struck
            due = now() + fault.delay

    while now() < stop:
        yield of_one()


def _deck(cards: Sequence[Card], choose: random.Random) -> Iterator[Card]:
    """All of them in a random order, again and again."""
    while True:
        yield from choose.sample(list(cards), len(cards))


def _apart(drafts: list[Fault], world_size: int) -> Iterator[Fault]:
    """The same kind hits another rank the next time: one rank that crashes twice in one place is rightly given up."""
    ranks: dict[Kind, int] = {}
    for fault in drafts:
        rank = (ranks[fault.kind] + 1) % world_size if fault.kind in ranks else fault.rank
        ranks[fault.kind] = rank
        yield replace(fault, rank=rank)


def _draft(kind: Kind, moment: Moment, course: Course, world_size: int, choose: random.Random) -> Fault:
    last = max(course.steps - 1, 0)
    ends = [step for step in course.epoch_ends if step <= last] or [last // 2]
    saves = [step for step in course.saves if step <= last] or [last]
    step: int | None = last
    delay = 0.0
    match moment:
        case Moment.JOINING:
            step, delay = None, choose.uniform(0.0, course.join_seconds)
        case Moment.FIRST_STEP:
            step, delay = 0, choose.uniform(0.0, 0.05)
        case Moment.MID_EPOCH:
            step, delay = choose.randint(min(2, last), last), choose.uniform(0.0, 0.01)
        case Moment.EPOCH_EDGE:
            step = choose.choice(ends)
        case Moment.IN_SAVE:
            step, delay = choose.choice(saves), choose.uniform(0.0, 0.01)
        case Moment.LAST_STEP:
            delay = choose.uniform(0.0, 0.005)
    if kind.needs_two_checkpoints and step is not None and len(saves) > 1:
        step = max(step, saves[1] + 1)
    return Fault(0, kind, moment, choose.randrange(world_size), step, delay)
