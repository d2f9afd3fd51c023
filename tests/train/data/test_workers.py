"""How many loader workers: a table of what was measured, the room there is, and what follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from samestep.train.data.room import copied_bytes, room_of
from samestep.train.data.watch import CopyWatch, Watch
from samestep.train.data.workers import MOST_WORKERS, Choice, Room, Timing, choose, seconds_a_list

ROOM = Room(cores=8.0, threads=1, shared_bytes=8 << 30, memory_bytes=32 << 30)
FETCH = Timing(fetch=0.160, longest=0.170, cpu=1.0, step=0.040, batch_bytes=1 << 20)


@pytest.mark.parametrize(
    ("timing", "room", "workers"),
    [
        (FETCH, ROOM, 4),  # fetch / step
        (replace(FETCH, step=0.001), replace(ROOM, cores=2.0), 3),  # computing: cores, and one that waits for the rank
        (replace(FETCH, step=0.001, cpu=0.0), replace(ROOM, cores=2.0), MOST_WORKERS),  # waiting takes no core
        (replace(FETCH, step=0.030, cpu=0.0), replace(ROOM, cores=2.0), 6),
        (replace(FETCH, fetch=0.0005, longest=0.0005), ROOM, 0),  # next to nothing beside the step
        (replace(FETCH, fetch=0.0004, longest=0.0004, step=0.0004), ROOM, 0),  # taking it over costs as much
        (FETCH, replace(ROOM, cores=1.0), 0),  # one core, and both compute
        (FETCH, replace(ROOM, shared_bytes=0), 0),
        (FETCH, replace(ROOM, shared_bytes=12 << 20), 3),
        (FETCH, replace(ROOM, memory_bytes=600 << 20), 2),
        (FETCH, replace(ROOM, cores=2.5, threads=2), 3),  # torch's own threads keep the cores busy
    ],
)
def test_the_fewest_workers_that_are_as_fast_as_any(timing: Timing, room: Room, workers: int) -> None:
    choice = choose(timing, room)
    assert choice.workers == workers
    fastest = min(seconds_a_list(timing, room, n) for n in range(choice.workers + 1))
    assert seconds_a_list(timing, room, workers) <= fastest * 1.06


def test_the_reason_names_the_figures_and_what_was_short() -> None:
    assert "160 ms" in choose(FETCH, ROOM).reason
    assert "40 ms of step" in choose(FETCH, ROOM).reason
    assert "no room" in choose(FETCH, replace(ROOM, shared_bytes=0)).reason
    assert "no more than 3" in choose(FETCH, replace(ROOM, shared_bytes=12 << 20)).reason


def test_uneven_samples_get_a_deeper_store() -> None:
    assert choose(FETCH, ROOM).prefetch == 2
    assert choose(replace(FETCH, longest=1.0), ROOM).prefetch == 4


def watched(watch: Watch, fetch: float, step: float, lists: int, computing: float | None = None) -> Choice | None:
    """Feed equal lists until something is decided."""
    for _ in range(lists):
        watch.fetched(fetch, fetch if computing is None else computing, step, ())
        if watch.due and (choice := watch.decision()) is not None:
            return choice
    return None


def new_watch(said: list[str]) -> Watch:
    return Watch(lambda: ROOM, lambda choice, sentence: said.append(sentence))


def test_it_decides_once_and_says_it_in_one_line() -> None:
    said: list[str] = []
    watch = new_watch(said)
    choice = watched(watch, 0.160, 0.040, 100)
    assert choice is not None
    assert choice.workers == 4
    watch.workers_took_over(choice)
    assert watched(watch, 0.001, 0.040, 1000) is None, "workers keep up"
    assert len(said) == 1
    assert "\n" not in said[0]


def on_trial(said: list[str], fetch: float, step: float) -> Watch:
    """Workers were chosen for lists that take the rank so long, and have taken over."""
    watch = new_watch(said)
    choice = watched(watch, fetch, step, 100)
    assert choice is not None
    assert choice.workers
    watch.workers_took_over(choice)
    return watch


def test_workers_that_bring_nothing_are_sent_away_and_it_says_what_they_took() -> None:
    said: list[str] = []
    watch = on_trial(said, 0.0011, 0.0038)
    assert watch.choosing
    back = watched(watch, 0.0003, 0.0060, 40)  # the step has become slower beside them
    assert back is not None
    assert back.workers == 0
    assert not watch.choosing
    assert said[0].startswith("1 loader worker a rank: ")
    assert said[1] == "0 loader workers a rank: with 1 a batch takes 6.3 ms, without 4.9 ms"


def test_workers_that_were_sent_away_come_back_only_for_what_is_worth_it() -> None:
    watch = on_trial([], 0.0011, 0.0038)
    assert watched(watch, 0.0003, 0.0060, 40) is not None
    assert watched(watch, 0.0011, 0.0038, 200) is None, "a fifth of the time waiting, as before"
    again = watched(watch, 0.0400, 0.0038, 200)
    assert again is not None
    assert again.workers > 1


def test_a_crowded_machine_does_not_bring_back_workers_that_were_sent_away() -> None:
    watch = on_trial([], 0.0040, 0.0100)
    assert watched(watch, 0.0003, 0.0142, 40) is not None
    assert watched(watch, 0.0079, 0.0100, 200) is None
    assert watched(watch, 0.0081, 0.0100, 200) is not None


def test_workers_that_deliver_all_at_once_are_judged_by_the_average() -> None:
    watch = on_trial([], 0.160, 0.040)
    for number in range(200):  # four of them, one slow list after three that were ready
        watch.fetched(0.0001 if number % 4 else 0.040, 0.0, 0.040, ())
        if watch.due:
            assert watch.decision() is None
    assert not watch.choosing


def test_workers_that_were_asked_for_are_not_on_trial() -> None:
    watch = Watch(lambda: ROOM, lambda *_: None, looking=False)
    watch.workers_took_over(Choice(2))
    assert not watch.choosing


def test_a_slow_dataset_is_measured_for_three_lists_not_for_sixteen() -> None:
    watch = new_watch([])
    assert watched(watch, 0.4, 0.1, 4) is not None, "one more to warm up"


def test_starvation_adds_workers_and_says_why() -> None:
    said: list[str] = []
    watch = new_watch(said)
    first = watched(watch, 0.080, 0.040, 100)
    assert first is not None
    watch.workers_took_over(first)
    again = watched(watch, 0.040, 0.040, 200)  # half of the time went into waiting
    assert again is not None
    assert again.workers > first.workers
    assert "waiting" in said[1]


def test_a_dataset_that_gets_slower_gets_workers_after_all() -> None:
    watch = new_watch([])
    first = watched(watch, 0.0001, 0.040, 100)
    assert first is not None
    assert first.workers == 0
    assert watched(watch, 0.0001, 0.040, 200) is None
    later = watched(watch, 0.160, 0.040, 200)
    assert later is not None
    assert later.workers == 4


def test_after_some_decisions_it_looks_no_more() -> None:
    watch, chosen = new_watch([]), []
    for waited in (0.05, 0.02, 0.02, 0.02):
        assert watch.looking
        choice = watched(watch, waited, 0.04, 200, computing=0.0)
        assert choice is not None
        chosen.append(choice.workers)
        watch.workers_took_over(choice)
    assert chosen == [2, 3, 5, 8]
    assert not watch.looking


def test_ranks_share_the_host_and_the_cgroup_counts(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    room = room_of(2, 1, tmp_path, lambda: 200_000)
    assert room.cores <= 0.75
    assert room.memory_bytes == 100_000
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert room_of(1, 1, cgroup=tmp_path).memory_bytes > 1_000_000
    assert room_of(1, 1, cgroup=tmp_path / "none").cores >= 1


def test_memory_that_workers_copy_is_named_once() -> None:
    said: list[str] = []
    own, moment = [300 << 20], [0.0]
    watch = CopyWatch(lambda pids: own[0], said.append, lambda: moment[0])
    watch.look([1])
    own[0] = 900 << 20
    watch.look([1])
    assert said == [], "looked at once a minute"
    moment[0] = 61.0
    watch.look([1])
    moment[0] = 200.0
    watch.look([1])
    assert len(said) == 1
    assert "600 MiB more" in said[0]
    assert "one tensor or array" in said[0]


def test_a_processs_own_memory_is_read_from_the_kernel() -> None:
    import os

    assert copied_bytes([os.getpid()]) > 1 << 20
    assert copied_bytes([2**22 + 1]) == 0
