"""Pure: what torch.profiler wrote on one rank -> that rank's part of one trace for all.

The form is the Trace Event Format (Google, "Trace Event Format", section JSON Object Format), which Perfetto opens:
`ph` X is a slice with `ts` and `dur` in microseconds, M names a process or thread, s and f are the ends of an arrow
that have an `id` in common. torch's `ts` count from the trace's own `baseTimeNanoseconds` of the wall clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]
_MOST_DEVICES = 1000  # of a rank: numbers of processes of different ranks are so far apart
PHASES_ROW = 0  # no thread has this number


@dataclass(frozen=True, slots=True)
class Mark:
    """At `ns` of the wall clock something begins: `depth` 0 for a step or what lies between steps, 1 inside of it."""

    ns: int
    depth: int
    name: str


@dataclass(frozen=True, slots=True)
class Place:
    """Whose trace it is, and where its times go: `base` is the moment, in ns of rank zero's clock, that becomes 0."""

    rank: int
    world_size: int
    base: int
    offset: int = 0  # nanoseconds that the rank's clock is ahead of rank zero's

    def microseconds(self, ns: int) -> float:
        """A moment of the rank's clock in the trace of all."""
        return (ns - self.offset - self.base) / 1000


def slices(marks: Sequence[Mark], end: int) -> Iterator[tuple[Mark, int]]:
    """Each mark with its end in ns, that is, the next one which is not inside of it.

    A phase that is entered again while it runs has ended: so a clock says that its step is over. What says the name of
    what it is inside of is a sign of life and no phase.
    """
    stack: list[Mark] = []
    for mark in marks:
        if mark.depth and stack and mark.name == stack[0].name:
            continue
        over = mark.depth and len(stack) > 1 and stack[-1].name == mark.name
        while stack and stack[-1].depth >= mark.depth:
            yield stack.pop(), mark.ns
        if not over:
            stack.append(mark)
    for mark in reversed(stack):
        yield mark, end


def part(recorded: dict[str, Any], pid: int, marks: Sequence[Mark], end: int, place: Place) -> Iterator[Event]:
    """The events of one rank, whose process was `pid`: its phases in the first row, then its threads and devices."""
    events = [event for event in recorded["traceEvents"] if isinstance(event.get("pid"), int)]
    shift = place.microseconds(recorded.get("baseTimeNanoseconds", 0))
    used = dict.fromkeys([pid, *(event["pid"] for event in events if event["ph"] != "M")])
    numbers = {old: place.rank * _MOST_DEVICES + index for index, old in enumerate(used)}
    for old, new in numbers.items():
        name = f"rank {place.rank}" if old == pid else f"rank {place.rank}, device {old}"
        yield {"ph": "M", "pid": new, "tid": 0, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": new, "tid": 0, "name": "process_sort_index", "args": {"sort_index": new}}
    yield from _phases(marks, end, numbers[pid], place)
    for event in events:
        if event["pid"] not in numbers or event["name"].startswith("process_"):
            continue
        moved = {**event, "pid": numbers[event["pid"]]}
        if event["ph"] != "M":
            moved["ts"] = event["ts"] + shift
        if isinstance(event.get("id"), int):
            moved["id"] = event["id"] * place.world_size + place.rank  # arrows stay inside their rank
        yield moved


def _phases(marks: Sequence[Mark], end: int, pid: int, place: Place) -> Iterator[Event]:
    row = {"pid": pid, "tid": PHASES_ROW}
    yield {"ph": "M", **row, "name": "thread_name", "args": {"name": "phases"}}
    yield {"ph": "M", **row, "name": "thread_sort_index", "args": {"sort_index": -1}}
    for mark, ended in slices(marks, end):
        begin, duration = place.microseconds(mark.ns), (ended - mark.ns) / 1000
        yield {"ph": "X", "cat": "phase", **row, "name": mark.name, "ts": begin, "dur": duration}
