"""Pure: what came of every fault and run, as a table for people and as rows for programs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from samestep.launcher.chaos.plan import Fault


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault and what followed.

    Attributes:
        fault: as planned.
        hit: what it aims at was there.
        step: steps done when it struck.
        survived: training went on after it, or was over.
        seconds: until the next step was done; None where nothing was interrupted, or the run was over.
        trouble: what was seen instead, if it was not survived.
    """

    fault: Fault
    hit: bool
    step: int
    survived: bool
    seconds: float | None = None
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run with its faults."""

    number: int
    strikes: tuple[Strike, ...]
    same: bool  # weights, and the loss of every step, in the bits of the reference
    difference: str
    seconds: float
    goodput: float
    left_behind: tuple[str, ...] = ()  # processes that outlived it
    growth: Mapping[str, int] = field(default_factory=dict)  # of its launcher, from the first sample to the last
    too_late: int = 0  # faults that were planned for it and for whose moment it had ended


@dataclass(frozen=True, slots=True)
class Verdict:
    """All runs together."""

    digest: str
    reference_seconds: float
    trials: tuple[Trial, ...]
    host_growth: Mapping[str, int] = field(default_factory=dict)

    @property
    def strikes(self) -> list[Strike]:
        """Faults that hit something."""
        return [strike for trial in self.trials for strike in trial.strikes if strike.hit]

    @property
    def good(self) -> bool:
        """Something was hit, and everything was survived, ended in the same bits and left nothing behind."""
        return (
            bool(self.strikes)
            and all(strike.survived for strike in self.strikes)
            and all(trial.same and not trial.left_behind for trial in self.trials)
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [_row(trial, strike) for trial in self.trials for strike in trial.strikes]
        runs = [{**asdict(trial), "strikes": len(trial.strikes)} for trial in self.trials]
        summary = {"digest": self.digest, "good": self.good, "recovery_seconds": _recovery(self.strikes)}
        growth = {"host_growth": dict(self.host_growth), "reference_seconds": self.reference_seconds}
        return {**summary, **growth, "runs": runs, "faults": rows}


def _row(trial: Trial, strike: Strike) -> dict[str, Any]:
    fault = strike.fault
    planned = {"number": fault.number, "run": trial.number, "kind": fault.kind.name, "moment": fault.moment.value}
    came = {"rank": fault.rank, "hit": strike.hit, "step": strike.step, "survived": strike.survived}
    return {**planned, **came, "seconds": strike.seconds, "trouble": strike.trouble, "same": trial.same}


def _recovery(strikes: Sequence[Strike]) -> dict[str, float]:
    seconds = [strike.seconds for strike in strikes if strike.seconds is not None]
    return {"median": statistics.median(seconds), "max": max(seconds), "count": len(seconds)} if seconds else {}


def table(verdict: Verdict) -> list[str]:
    """A row a kind, what is not right by name, and the sum."""
    kinds = sorted({strike.fault.kind.name for strike in verdict.strikes})
    lines = [f"{'fault':<22} injected  survived  same bits  recovery median / max"]
    for name in kinds:
        of_kind = [strike for strike in verdict.strikes if strike.fault.kind.name == name]
        lines.append(_line(name, of_kind, verdict))
    lines.append(_line("all", verdict.strikes, verdict))
    moments = sorted({strike.fault.moment for strike in verdict.strikes}, key=lambda moment: moment.value)
    lines += [_line(m.value, [s for s in verdict.strikes if s.fault.moment is m], verdict) for m in moments]
    missed = sum(not strike.hit for trial in verdict.trials for strike in trial.strikes)
    if missed:
        lines.append(f"{_counted(missed, 'fault')} found nothing to hit: not counted")
    too_late = sum(trial.too_late for trial in verdict.trials)
    if too_late:
        lines.append(f"{_counted(too_late, 'fault')} came too late, the run was over: not counted")
    lines += [f"NOT: {text}" for text in _wrong(verdict)]
    lines += _flatness(verdict)
    seconds = sum(trial.seconds for trial in verdict.trials)
    goodput = sum(trial.goodput * trial.seconds for trial in verdict.trials) / seconds if seconds else 1.0
    runs, faults = _counted(len(verdict.trials), "run"), _counted(len(verdict.strikes), "fault")
    lines.append(
        f"{runs}, {faults} in {seconds:.0f} s, goodput {100 * goodput:.0f} % "
        f"(an undisturbed run takes {verdict.reference_seconds:.1f} s); "
        + ("every run ends in the same bits" if verdict.good else "NOT all is well")
    )
    return lines


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _line(name: str, strikes: Sequence[Strike], verdict: Verdict) -> str:
    same = {id(strike): trial.same for trial in verdict.trials for strike in trial.strikes}
    survived, equal = sum(strike.survived for strike in strikes), sum(same[id(strike)] for strike in strikes)
    times = _recovery(strikes)
    shown = f"{times['median']:.2f} / {times['max']:.2f} s" if times else "nothing was interrupted"
    return f"{name:<22} {len(strikes):>8}  {survived:>8}  {equal:>9}  {shown}"


def _wrong(verdict: Verdict) -> list[str]:
    found = [] if verdict.strikes else ["no fault hit anything, so nothing is known"]
    found += [
        f"fault {strike.fault.number}, {strike.fault.kind.name} at {strike.fault.moment.value}: {strike.trouble}"
        for strike in verdict.strikes
        if not strike.survived
    ]
    found += [f"run {trial.number}: {trial.difference}" for trial in verdict.trials if not trial.same]
    found += [f"run {t.number} left behind: {', '.join(t.left_behind)}" for t in verdict.trials if t.left_behind]
    return found


def _flatness(verdict: Verdict) -> list[str]:
    most: dict[str, int] = {}
    for trial in verdict.trials:
        for name, grown in trial.growth.items():
            most[name] = max(most.get(name, grown), grown)
    parts = [f"{name} {value:+d}" for name, value in {**most, **verdict.host_growth}.items()]
    return [f"growth: {', '.join(parts)}"] if parts else []
