"""Pure: from what the ranks publish to a verdict: who keeps the others waiting for longer than anything took before.

Ranks meet in every step, so those that are ahead wait for the one that is furthest behind. That one is judged by the
longest time that the same thing took so far. Time is counted in what the launcher itself observed, and as the share of
a processor that the rank could have had: neither a paused machine nor a crowded one makes a hang.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from samestep.launcher.diagnosis.stacks import Stacks
from samestep.launcher.heartbeat import IN_STEP, PHASES, SPANS, Beat
from samestep.launcher.supervise.outcome import Hang

TICK_SECONDS = 0.25
_MOST_CROWDED = 10.0
_STARTING = frozenset({"joining", "build"})


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a rank may go without a sign of life, in seconds.

    Attributes:
        step: inside a step, once one was measured: until the rank is named.
        seldom: in an evaluation or a checkpoint, once one was measured.
        unmeasured: in what has not happened before.
        factor: of the longest time before.
        naming: what noticing, taking stacks and judging need of the time inside a step.
        working: times as long in what has not happened before, while the rank computes; a build may go on for ever.
        strict: the numbers are the user's own: a busy start is not excused.
        network: for ranks of several machines that all wait for one another: TCP sends again ever more seldom after a
            fault of the network, so they may go on long after it.
    """

    step: float = 5.0
    seldom: float = 30.0
    unmeasured: float = 600.0
    factor: float = 10.0
    naming: float = 1.5
    working: float = 6.0
    strict: bool = False
    network: float = 30.0

    @classmethod
    def of(cls, text: str) -> Patience | None:
        """For `--hang-timeout`: None for off."""
        if text == "auto":
            return cls()
        if text == "off":
            return None
        seconds = float(text)
        return cls(step=seconds, seldom=seconds, unmeasured=seconds, naming=0.0, strict=True)

    def limit(self, beat: Beat, longest: Mapping[str, float]) -> float:
        """Seconds that the rank may spend where it is; infinite outside training."""
        edge, step = longest["edge"], longest["step"]
        if not beat.phase:
            return float("inf")
        if beat.phase in IN_STEP and not beat.edge and (edge or step):
            # a step may be compiled anew for another shape: that takes about as long as the first one
            return max(self.step, self.factor * (step or edge), 2 * edge) - self.naming
        if (beat.phase in IN_STEP or beat.phase == "loading") and edge:
            return max(self.step, self.factor * max(edge, step)) - self.naming
        known = longest.get(beat.phase, 0.0)
        return max(self.seldom, self.factor * known) if known else self.unmeasured

    @property
    def stopped(self) -> float:
        """Seconds that a rank may be stopped by a signal, wherever it is."""
        return self.step - self.naming

    def excuse(self, beat: Beat, longest: Mapping[str, float]) -> float:
        """How many times as long it may take while the rank computes: only where there is nothing to compare with."""
        if self.strict or self.limit(beat, longest) != self.unmeasured:
            return 1.0
        return float("inf") if beat.phase in _STARTING else self.working


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known of one rank at a moment; `starved` and `busy` count up, in seconds."""

    beat: Beat
    stopped: bool = False  # by SIGSTOP
    starved: float = 0.0  # its main thread was ready to run, and no processor was free
    busy: float = 0.0  # processor time of it and of what it started


@dataclass(slots=True)
class Still:
    """How long a rank has not moved, in the seconds of this file's first lines. Told between machines as it is."""

    sample: Sample
    quiet: float = 0.0
    idle: float = 0.0
    stopped: float = 0.0


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Ranks that may hang; their stacks can tell more."""

    ranks: tuple[int, ...]
    stopped: bool = False


@dataclass(slots=True)
class Watchdog:
    """Told about all ranks every TICK_SECONDS; keeps what it measured from one generation to the next."""

    patience: Patience
    longest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPANS, 0.0))
    _still: dict[int, Still] = field(default_factory=dict)
    _elsewhere: frozenset[int] = frozenset()

    def begin(self) -> None:
        """Other ranks than before."""
        self._still.clear()
        self._elsewhere = frozenset()

    @property
    def stills(self) -> Mapping[int, Still]:
        """Of all ranks."""
        return self._still

    def observe(
        self,
        samples: Mapping[int, Sample],
        seconds: float,
        crowding: float = 1.0,
        elsewhere: Mapping[int, Still] = MappingProxyType({}),
    ) -> Suspicion | None:
        """Take samples of all ranks, `seconds` after the last ones, with `crowding` tasks ready to run a processor.

        Of ranks `elsewhere` another launcher has taken them: nothing is counted here, so late news make no hang.
        """
        seconds = min(seconds, 2 * TICK_SECONDS)
        crowding = min(max(crowding, 1.0), _MOST_CROWDED)
        for rank, sample in samples.items():
            self._still[rank] = _after(self._still.get(rank), sample, seconds, crowding)
        self._still |= elsewhere
        self._elsewhere = frozenset(elsewhere)
        for still in self._still.values():
            for span, measured in zip(SPANS, still.sample.beat.longest, strict=True):
                self.longest[span] = max(self.longest[span], measured)
        return self._suspicion()

    def _suspicion(self) -> Suspicion | None:
        stopped = tuple(rank for rank, still in self._still.items() if still.stopped > self.patience.stopped)
        if stopped:
            return Suspicion(stopped, stopped=True)
        training = {rank: still for rank, still in self._still.items() if still.sample.beat.phase}
        if not training:
            return None
        last = min(map(position, (still.sample.beat for still in training.values())))
        behind = tuple(rank for rank, still in training.items() if position(still.sample.beat) == last)
        return Suspicion(behind) if all(self.is_overdue(rank) for rank in behind) else None

    def is_overdue(self, rank: int) -> bool:
        """Whether a rank has not moved for longer than it may."""
        still = self._still[rank]
        beat = still.sample.beat
        limit, excuse = self.patience.limit(beat, self.longest), self.patience.excuse(beat, self.longest)
        return still.quiet > limit * excuse or (excuse > 1 and still.idle > limit)

    def judge(self, suspicion: Suspicion, stacks: Mapping[int, Stacks], now: float) -> Hang | None:
        """Name the rank; None where it is better to wait. `stacks` by rank, `now` as in Beat.since."""
        found = self._culprit(suspicion, stacks)
        if found is None:
            return None
        rank, how = found
        beat = self._still[rank].sample.beat
        own = stacks.get(rank) if beat.device is None else None  # its device is at work for a call that is long over
        step, phase = beat.place
        return Hang(
            rank=rank,
            step=step,
            phase=phase,
            seconds=max(0.0, now - beat.since) if beat.beats else self._still[rank].stopped,
            usual=self.longest["step"] if phase in IN_STEP else self.longest.get(phase, 0.0),
            frame=(own.user_frame or own.innermost) if own else "",
            how=how if beat.device is None else how or "its GPU does not come to an end",
        )

    def _culprit(self, suspicion: Suspicion, stacks: Mapping[int, Stacks]) -> tuple[int, str] | None:
        if suspicion.stopped:
            return suspicion.ranks[0], "stopped by a signal"
        known = {rank: stacks[rank] for rank in suspicion.ranks if rank in stacks and stacks[rank].main}
        free = [rank for rank in suspicion.ranks if rank in known and not self._waits(rank, known[rank])]
        unread = [rank for rank in suspicion.ranks if rank not in known and rank not in self._elsewhere]
        if free or unread or not known:  # all that can be read wait: for the one that can't
            return self._longest_quiet(free or unread or suspicion.ranks), ""
        if self._network_may_recover(suspicion.ranks):
            return None
        return self._odd_one(suspicion.ranks, stacks)

    def _waits(self, rank: int, stacks: Stacks) -> bool:
        """Whether it waits for others. A host that waits for its device is known by what the device does.

        That waits in a sync, and where the hosts, at one place, did not all enter the same collectives.
        """
        device = self._still[rank].sample.beat.device
        if device is None:
            return stacks.waits_for_others
        beats = [still.sample.beat for still in self._still.values() if still.sample.beat.phase]
        at_one_place = len({(beat.step, beat.phase) for beat in beats}) == 1
        return device[1] == "sync" or (at_one_place and len({beat.collectives for beat in beats}) > 1)

    def _network_may_recover(self, waiting: Sequence[int]) -> bool:
        if not self._elsewhere or self.patience.strict:
            return False
        return min(self._still[rank].quiet for rank in waiting) < self.patience.network

    def _odd_one(self, behind: Sequence[int], stacks: Mapping[int, Stacks]) -> tuple[int, str] | None:
        """All that are furthest behind wait for others: who is not where they wait?"""
        left = [rank for rank, still in self._still.items() if not still.sample.beat.phase and still.sample.beat.beats]
        if left:
            return left[0], "it has left training, and others still need it"
        ahead = [rank for rank in self._still if rank not in behind]
        if not all(self.is_overdue(rank) for rank in ahead):
            return None
        more, fewer = self._by_collectives(behind, ahead)
        if not fewer:
            odd = _minority({rank: stacks[rank].innermost for rank in behind if rank in stacks})
            return (odd if odd is not None else self._last_to_come(behind)), "all ranks wait for one another"
        if len(more) < len(fewer):
            return self._longest_quiet(more), "it entered a collective that others did not enter"
        place = next(
            (f" at {stacks[rank].user_frame}" for rank in more if rank in stacks and stacks[rank].user_frame), ""
        )
        return self._longest_quiet(fewer), f"it did not enter a collective that others entered{place}"

    def _by_collectives(self, behind: Sequence[int], ahead: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ranks that entered a collective, and ranks that passed it by; the second is empty where that can't be told.

        Who is furthest behind and waits there is in a collective that those ahead have passed, or have been through:
        then they have entered more of them than those that passed it by. A rank without samples in this step was never
        asked to: it counts as one that passed it by only where nobody else did.
        """
        ahead = [rank for rank in ahead if not self._still[rank].sample.beat.idle] or ahead
        group = ahead or behind
        counts = {rank: self._still[rank].sample.beat.collectives for rank in group}
        same_place = len({position(self._still[rank].sample.beat) for rank in group}) == 1
        if same_place and len(set(counts.values())) > 1:
            most = max(counts.values())
            more = [rank for rank in group if counts[rank] == most]
            return [*more, *(behind if ahead else ())], [rank for rank in group if counts[rank] < most]
        return list(behind), list(ahead)

    def _longest_quiet(self, ranks: Sequence[int]) -> int:
        return min(ranks, key=lambda rank: self._still[rank].sample.beat.since)

    def _last_to_come(self, ranks: Sequence[int]) -> int:
        return max(ranks, key=lambda rank: self._still[rank].sample.beat.since)


def _after(before: Still | None, sample: Sample, seconds: float, crowding: float) -> Still:
    if before is None or (before.sample.beat.beats, before.sample.beat.device) != (
        sample.beat.beats,
        sample.beat.device,
    ):
        return Still(sample)
    fair = seconds / crowding
    starved = sample.starved - before.sample.starved
    works = sample.busy > before.sample.busy
    return Still(
        sample,
        quiet=before.quiet + max(0.0, min(fair, seconds - starved)),
        idle=0.0 if works else before.idle + fair,
        stopped=before.stopped + fair if sample.stopped else 0.0,
    )


def position(beat: Beat) -> tuple[int, int]:
    """Orders ranks by how far they got."""
    step, phase = beat.place
    return step, PHASES.index(phase)


def _minority(places: Mapping[int, str]) -> int | None:
    """The one rank that stands elsewhere than all others, if there is one."""
    odd = [rank for rank, place in places.items() if list(places.values()).count(place) == 1]
    return odd[0] if len(odd) == 1 and len(places) > 2 else None
