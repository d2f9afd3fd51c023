"""One trace of all ranks: names, rows, arrows and clocks, from made-up recordings."""

from __future__ import annotations

import os

import pytest

from samestep.train.observe.clocks import measure_offsets, offset
from samestep.train.observe.trace import Mark, Place, part, slices
from samestep.train.parallel.group import SoloGroup

BASE = 1_000_000_000_000_000_000


def recorded(pid: int, base: int = BASE) -> dict[str, object]:
    def at(number: int, **more: object) -> dict[str, object]:
        return {"ph": "X", "pid": number, "tid": 9, "name": "op", "ts": 50.5, "dur": 2.0, **more}

    events = [
        {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "ts": 1.0, "args": {"name": "python"}},
        {"ph": "M", "pid": 7, "tid": 0, "name": "process_name", "ts": 1.0, "args": {"name": "idle GPU"}},
        {"ph": "M", "pid": pid, "tid": 9, "name": "thread_name", "ts": 1.0, "args": {"name": "thread 9"}},
        *[at(pid), at(3, tid=1), at(pid, ph="s", id=4), at(3, ph="f", id=4)],
        {"ph": "X", "pid": "Spans", "tid": "x", "name": "PyTorch Profiler (0)", "ts": 1.0, "dur": 9.0},
    ]
    return {"baseTimeNanoseconds": base, "traceEvents": events}


def names(events: list[dict[str, object]], kind: str) -> dict[object, object]:
    return {e["pid"]: e["args"]["name"] for e in events if e["name"] == kind}  # type: ignore[index]


def test_ranks_with_the_same_pid_and_devices_stay_apart() -> None:
    parts = [list(part(recorded(12), 12, [], BASE, Place(rank, 2, BASE))) for rank in (0, 1)]
    assert names(parts[0], "process_name") == {0: "rank 0", 1: "rank 0, device 3"}
    assert names(parts[1], "process_name") == {1000: "rank 1", 1001: "rank 1, device 3"}
    arrows = [{(e["id"], e["ph"]) for e in events if "id" in e} for events in parts]
    assert arrows == [{(8, "s"), (8, "f")}, {(9, "s"), (9, "f")}]


def test_times_count_from_one_moment_whatever_base_and_clock_a_rank_has() -> None:
    moment = BASE + 50_500  # of the op, by rank zero's clock
    for base, ahead in ((BASE, 0), (BASE - 10**15, 0), (BASE, 3_000_000), (BASE + 5000, -2000)):
        trace = recorded(12, base)
        for event in trace["traceEvents"]:  # type: ignore[attr-defined]
            event["ts"] = (moment + ahead - base) / 1000
        place = Place(1, 2, BASE, ahead)
        events = list(part(trace, 12, [Mark(moment + ahead, 0, "step 1")], moment + ahead + 1000, place))
        assert {round(e["ts"], 3) for e in events if e["ph"] == "X"} == {50.5}
        assert [e["dur"] for e in events if e.get("cat") == "phase"] == [1.0]


def test_phases_lie_inside_their_step_and_what_is_between_steps_outside() -> None:
    marks = "0 step 1|1 data|1 sync|1 optimizer|1 optimizer|0 evaluation|1 evaluation|1 evaluation|0 step 2|1 data"
    told = [Mark(ns, int(text[0]), text[2:]) for ns, text in enumerate(marks.split("|"))]
    found = {(mark.name, mark.ns, end) for mark, end in slices(told, 10)}
    assert found == {
        *[("step 1", 0, 5), ("data", 1, 2), ("sync", 2, 3), ("optimizer", 3, 4)],
        *[("evaluation", 5, 8), ("step 2", 8, 10), ("data", 9, 10)],
    }


@pytest.mark.parametrize("ahead", [5_000_000, -5_000_000])
def test_a_clock_that_is_apart_is_found_to_half_a_round_trip(ahead: int) -> None:
    first = [(k * 1000, k * 1000 + 300) for k in range(8)]
    other = [(begin + 50 + ahead, left + 20 + ahead) for begin, left in first]
    assert abs(offset(first, other) - ahead) <= 150


def test_a_clock_that_may_be_the_same_is_taken_for_the_same() -> None:
    assert offset([(0, 300), (1000, 1300)], [(40, 310), (1100, 1290)]) == 0
    assert measure_offsets(SoloGroup(), os.times().__len__) == [0]
