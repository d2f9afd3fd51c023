"""Pure: what one launcher tells another of its ranks, as JSON. Times are ages, since no two machines' clocks agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samestep.launcher.diagnosis.stacks import Frame, Stacks, Thread
from samestep.launcher.heartbeat import PHASES, SPANS, Beat
from samestep.launcher.supervise.hang_watch import Look
from samestep.launcher.supervise.watchdog import Sample, Still

_MOST_FRAMES, _NAME_CHARACTERS = 100, 300  # of one rank: enough to tell where it is


def tell_stills(stills: Mapping[int, Still], now: float) -> dict[str, list[Any]]:
    """Rank -> where it is and for how long it has not moved; `now` as in Beat.since."""
    return {str(rank): _numbers(still, now) for rank, still in stills.items()}


def _numbers(still: Still, now: float) -> list[Any]:
    beat = still.sample.beat
    where = [beat.beats, beat.step, PHASES.index(beat.phase), int(beat.edge), beat.collectives]
    device = [beat.device[0], PHASES.index(beat.device[1])] if beat.device else []
    times = [now - beat.since, still.quiet, still.idle, still.stopped, *beat.longest]
    return [*where, int(still.sample.stopped), device, [round(seconds, 4) for seconds in times]]


def hear_stills(told: Mapping[str, list[Any]], now: float) -> dict[int, Still]:
    """What `tell_stills` has told, in this machine's time. Raises ValueError for something else."""
    try:
        return {int(rank): _still(numbers, now) for rank, numbers in told.items()}
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError("ranks are told in another form: the machines need the same version of samestep") from error


def _still(numbers: list[Any], now: float) -> Still:
    beats, step, phase, edge, collectives, stopped, device, (age, quiet, idle, halted, *longest) = numbers
    if len(longest) != len(SPANS) or phase < 0:
        raise ValueError(numbers)
    place = (device[0], PHASES[device[1]]) if device else None
    known = {"since": now - age, "longest": tuple(longest), "device": place}
    beat = Beat(beats, step, PHASES[phase], bool(edge), collectives, **known)
    return Still(Sample(beat, stopped=bool(stopped)), quiet, idle, halted)


def tell_look(look: Look, file: str) -> dict[str, list[Any]]:
    """Rank -> problem, frames of its main thread, frame of what it has started; and the file that holds all of it."""
    told: dict[str, list[Any]] = {}
    for rank, stacks in look.stacks.items():
        frames = stacks.main.frames[:_MOST_FRAMES] if stacks.main else ()
        rows = [[frame.file[-_NAME_CHARACTERS:], frame.line, frame.name[:_NAME_CHARACTERS]] for frame in frames]
        told[str(rank)] = [stacks.pid, stacks.problem, rows, look.children.get(rank, ""), file]
    return told


def hear_look(told: Mapping[str, list[Any]]) -> Look:
    """What `tell_look` has told."""
    stacks, children, files = {}, {}, {}
    for text, (pid, problem, rows, child, written) in told.items():
        frames = tuple(Frame(str(file), int(line), str(name)) for file, line, name in rows)
        main = Thread("MainThread", frames, is_main=True)
        rank = int(text)
        stacks[rank] = Stacks(pid, (main,) if frames else (), problem)
        children[rank], files[rank] = child, written
    return Look(stacks, children, files=files)
