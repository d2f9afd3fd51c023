"""Pure: how every rank ended and what it left behind -> one Failure that names the culprit.

A rank that fails takes the others with it: they die too, with errors about broken connections. The culprit is the
earliest rank whose end explains itself without another rank.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from samestep.launcher.contract import EXIT_MEANING, ErrorRecord, ExitCode
from samestep.launcher.diagnosis import death
from samestep.launcher.diagnosis.memory_signs import NOTHING_COUNTED, MemorySigns
from samestep.launcher.diagnosis.traceback_text import (
    Said,
    crash_frame,
    crash_stack,
    last_exception,
    tells_of_another_rank,
)
from samestep.launcher.heartbeat import IN_STEP, where
from samestep.launcher.supervise.outcome import Hang, RankEnd

_MOST_FRAMES = 5  # of a stack, so that the block stays one look long


@dataclass(frozen=True, slots=True)
class Evidence:
    """One rank: its end, the record it wrote if it uses samestep.train, the message if it uses torch's @record."""

    end: RankEnd
    log: str
    record: ErrorRecord | None = None
    elastic_message: str = ""
    elastic_time_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a generation failed. `exit_code` is the culprit's own, negative for a signal.

    `seen_ns` is when the launcher saw that the culprit had ended, on the wall clock; 0 where it ended it.
    """

    rank: int
    cause: str
    exit_code: int
    log: str
    frame: str = ""
    step: int | None = None
    phase: str = ""
    others_stopped: int = 0
    hint: str = ""
    final: bool = False  # another start would come to the same end
    remedied: bool = False  # the rank has changed what led to it, as `hint` says
    told: bool = False  # rank zero has printed the reason itself
    recorded: bool = False  # the rank has told the exception, which is its own and no other rank's
    stack: tuple[str, ...] = ()  # of a crash in native code, innermost frame first
    seen_ns: int = 0

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def diagnose(ranks: Sequence[Evidence], memory: MemorySigns = NOTHING_COUNTED) -> Failure | None:
    """Name the culprit among `ranks`, given in the order of their deaths; None if all ended with zero.

    `memory` is what the kernel counted while they ran.
    """
    if all(item.end.returncode == 0 for item in ranks):
        return None
    culprit = _culprit(ranks)
    ended_by_us = culprit.end.signalled and culprit.record is None
    left_early = _left_early(ranks) if ended_by_us or is_consequence(culprit) else None
    if left_early is not None:
        return _early(left_early, culprit, ranks)
    absent = _absent(culprit, ranks)
    if absent is not None:
        return absent
    said = last_exception(culprit.end.stderr)
    record = culprit.record
    killed = _death(culprit, said, memory)
    crash = crash_frame(culprit.end.stderr) if killed else ""
    step, phase = _place(culprit, ranks)
    return Failure(
        rank=culprit.end.rank,
        cause=killed.cause if killed else _cause(culprit, said),
        exit_code=_code(culprit),
        log=culprit.log,
        frame=record.frame if record else (said.frame if said else crash),
        step=step,
        phase=phase,
        others_stopped=sum(item.end.returncode != 0 for item in ranks if item is not culprit),
        hint=killed.hint if killed else _hint(culprit, said, memory),
        final=record is not None and record.final,
        remedied=record is not None and record.remedied,
        told=_is_told(ranks),
        recorded=record is not None and not record.consequence,
        stack=crash_stack(culprit.end.stderr) if crash else (),
        seen_ns=0 if culprit.end.signalled else culprit.end.ended_ns,
    )


def hung(hang: Hang, log: str, world_size: int) -> Failure:
    """The failure that a hang is."""
    what = "a whole step" if hang.phase in IN_STEP else "it"
    usual = f" ({what} took at most {hang.usual:.2g} s before)" if hang.usual else ""
    how = f": {hang.how}" if hang.how else ""
    place = f" at {hang.frame}" if hang.frame else ""
    return Failure(
        rank=hang.rank,
        cause=f"hang: {hang.seconds:.0f} s in {hang.phase or 'no phase of training'}{place}{usual}{how}",
        exit_code=ExitCode.FAILED,
        log=log,
        frame=hang.frame,
        step=hang.step,
        phase=hang.phase,
        others_stopped=world_size - 1,
        hint=f"stacks of all ranks: {hang.stacks}" if hang.stacks else "",
    )


def _absent(witness: Evidence, ranks: Sequence[Evidence]) -> Failure | None:
    """A rank that the others waited for in vain, and that we had to end."""
    record = witness.record
    item = next((item for item in ranks if record is not None and item.end.rank == record.accused), None)
    if record is None or item is None:
        return None
    return Failure(
        rank=item.end.rank,
        cause=record.message.splitlines()[0],
        exit_code=ExitCode.FAILED,
        log=item.log,
        phase=record.phase,
        others_stopped=sum(other.end.returncode != 0 for other in ranks if other is not item),
        hint=record.hint,
    )


def _place(culprit: Evidence, ranks: Sequence[Evidence]) -> tuple[int | None, str]:
    """Step and phase; of a rank that left no record, what it published last, or the step in which others noticed."""
    if culprit.record is not None:
        return culprit.record.step, culprit.record.phase
    if culprit.end.phase:
        return culprit.end.step, culprit.end.phase
    steps = [item.record.step for item in ranks if item.record is not None and item.record.consequence]
    return (min(steps) if steps else None), ""


def _death(item: Evidence, said: Said | None, memory: MemorySigns) -> death.Death | None:
    """What the signal that ended it means; None if it had something to say itself, or we sent it."""
    code = item.end.returncode
    if item.record is not None or item.end.signalled or code >= 0 or (code == -signal.SIGABRT and said is not None):
        return None
    return death.explain(-code, item.end.stderr, item.end.peak_bytes, memory, trains=bool(item.end.phase))


def _culprit(ranks: Sequence[Evidence]) -> Evidence:
    for pool in (
        [item for item in ranks if _ended_by_itself(item) and not is_consequence(item)],
        # asked to end while it was still busy telling what had gone wrong
        [item for item in ranks if item.end.signalled and _told_something(item) and not is_consequence(item)],
        [item for item in ranks if _ended_by_itself(item)],
        [item for item in ranks if item.end.returncode != 0],
    ):
        if pool:
            return min(pool, key=_time_ns)
    raise AssertionError("no rank failed")


def _ended_by_itself(item: Evidence) -> bool:
    if item.record is not None and not item.record.consequence:
        return True
    return item.end.returncode != 0 and not item.end.signalled


def _told_something(item: Evidence) -> bool:
    return bool(item.elastic_message) or last_exception(item.end.stderr) is not None


def is_consequence(item: Evidence) -> bool:
    """Whether a rank ended because another one had."""
    if item.record is not None:
        return item.record.consequence
    if item.end.returncode < 0 and item.end.returncode != -signal.SIGABRT:
        return False
    said = last_exception(item.end.stderr)
    text = item.elastic_message or (said.text if said else " ".join(item.end.stderr[-5:]))
    return tells_of_another_rank(text)


def _time_ns(item: Evidence) -> int:
    if item.record is not None:
        return item.record.time_ns
    return item.elastic_time_ns or item.end.ended_ns


def _code(item: Evidence) -> int:
    """Its own status, unless we ended it while it was failing: then what it was about to say."""
    if item.end.signalled and item.end.returncode in (-signal.SIGTERM, -signal.SIGKILL):
        return item.record.exit_code if item.record else ExitCode.FAILED
    return item.end.returncode or (item.record.exit_code if item.record else ExitCode.FAILED)


def _cause(item: Evidence, said: Said | None) -> str:
    if item.record is not None:
        message = item.record.message.strip().splitlines()
        return f"{item.record.kind}: {message[0]}" if message else item.record.kind
    code = item.end.returncode
    if code == -signal.SIGABRT and said is not None:
        return f"{said.text} (and aborted while it was leaving)"  # torch's destructors do so with a group still open
    if item.elastic_message:
        return item.elastic_message.strip().splitlines()[0]
    if said is not None:
        return said.text
    last = next((line.strip() for line in reversed(item.end.stderr) if line.strip()), "")
    return f"exit code {code}" + (f", last words: {last[:200]}" if last else "")


def _hint(item: Evidence, said: Said | None, memory: MemorySigns) -> str:
    if item.record is not None and item.record.hint:
        return item.record.hint
    text = f"{item.record.kind}: {item.record.message}" if item.record else (said.text if said else "")
    return death.hint_for(item.elastic_message or text or "\n".join(item.end.stderr[-20:]), memory)


def _left_early(ranks: Sequence[Evidence]) -> Evidence | None:
    first_failure = min(item.end.ended_ns for item in ranks if item.end.returncode != 0)
    early = [item for item in ranks if item.end.returncode == 0 and item.end.ended_ns <= first_failure]
    return min(early, key=lambda item: item.end.ended_ns, default=None)


def _early(item: Evidence, victim: Evidence, ranks: Sequence[Evidence]) -> Failure:
    return Failure(
        rank=item.end.rank,
        cause="it left with 0 before the run was done: others still needed it",
        exit_code=ExitCode.FAILED,
        log=item.log,
        step=_place(victim, ranks)[0],
        others_stopped=sum(other.end.returncode != 0 for other in ranks),
        seen_ns=item.end.ended_ns,
        hint="every rank must take part in every step: look for an early exit or return",
    )


def _is_told(ranks: Sequence[Evidence]) -> bool:
    """A usage error is rank zero's to print; the launcher then adds nothing."""
    zero = next((item for item in ranks if item.end.rank == 0 and not item.end.signalled), None)
    if zero is None or zero.record is None:
        return False  # somebody else's code 2, such as argparse's
    return zero.end.returncode == zero.record.exit_code == ExitCode.USAGE


def describe(failure: Failure, exit_code: int) -> list[str]:
    """The block that ends a failed run, culprit first."""
    place = f"at {failure.frame}" if failure.frame and failure.frame not in failure.cause else ""
    phase = f"phase {failure.phase}" if failure.phase else ""
    found = ", ".join(part for part in (place, where(failure.step, failure.phase), phase) if part)
    others = failure.others_stopped
    meaning = EXIT_MEANING[ExitCode(exit_code)]
    lines = [
        f"samestep: rank {failure.rank} failed: {failure.cause}",
        f"  {found}" if found else "",
        *(f"    from {frame}" for frame in failure.stack[1:_MOST_FRAMES]),
        f"  {others} other rank{'s' if others > 1 else ''} stopped as a consequence" if others else "",
        f"  log: {failure.log}",
        f"  exit code {exit_code}: {meaning}",
        f"  hint: {failure.hint}" if failure.hint else "",
    ]
    return [line for line in lines if line]
