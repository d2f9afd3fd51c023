"""Who hangs, and who is only slow: scenarios of what ranks publish, second by second. Nothing runs here."""

from __future__ import annotations

from pathlib import Path

import pytest

from samestep.launcher import contract
from samestep.launcher.diagnosis.stacks import Frame, Stacks, Thread
from samestep.launcher.heartbeat import SPANS, Beat
from samestep.launcher.supervise.watchdog import TICK_SECONDS, Patience, Sample, Watchdog

USER, TORCH = "recipe.py", "/x/site-packages/torch/distributed/distributed_c10d.py"
OURS = str(Path(contract.__file__).resolve().parent.parent / "train" / "parallel" / "exchange.py")
NEVER = 4000.0


def longest(**seconds):
    return tuple(seconds.get(span, 0.0) for span in SPANS)


STEADY = longest(edge=1.0, step=0.1)


def still(phase, *, step=7, known=STEADY, edge=False, collectives=0, **more):
    """A rank that stays where it is: it came there after so many seconds, `came`."""
    came, idle, device = more.pop("came", 0.0), more.pop("idle", False), more.pop("device", None)
    return lambda t: Sample(Beat(1, step, phase, edge, collectives, came, known, idle, device), **more)


def moving(step=7, known=STEADY):
    return lambda t: Sample(Beat(int(t * 100) + 1, step + int(t), "forward", False, 0, t, known))


def grows(phase, name, rate, **more):
    """A rank that stays where it is while one of its numbers grows by `rate` a second."""
    return lambda t: Sample(still(phase, **more)(t).beat, **{name: rate * t})


def suspected(ranks, patience=None, *, crowding=1.0, until=NEVER, gap=TICK_SECONDS):
    """(seconds, ranks) of the first suspicion, or None."""
    dog, t = Watchdog(patience or Patience()), 0.0
    while t < until:
        found = dog.observe({rank: at(t) for rank, at in enumerate(ranks)}, gap, crowding)
        if found:
            return t, found.ranks
        t += gap
    return None


@pytest.mark.parametrize(
    ("ranks", "patience", "seconds", "suspects"),
    [
        # the one that is furthest behind, a second and a half before 5 s or 10 times the longest step are over
        ([still("sync"), still("forward")], None, 3.75, (1,)),
        ([still("data"), still("backward"), still("sync")], None, 3.75, (0,)),
        ([still("sync", step=7), still("optimizer", step=6)], None, 3.75, (1,)),
        ([still("forward", known=longest(edge=1, step=2)), still("sync")], None, 18.75, (0,)),
        # one process alone
        ([still("forward")], None, 3.75, (0,)),
        # all at one place: all are suspects
        ([still("optimizer"), still("optimizer")], None, 3.75, (0, 1)),
        # a first step that took long may come again, for another shape
        ([still("forward", known=longest(edge=60, step=0.1)), still("sync")], None, 118.75, (0,)),
        ([still("forward", known=longest(edge=60, step=0.1), edge=True), still("sync")], None, 598.75, (0,)),
        # what has not happened before gets minutes, afterwards 10 times as long as it took
        ([still("forward", known=longest(), edge=True)], None, 600.25, (0,)),
        ([still("evaluation"), still("evaluation")], None, 600.25, (0, 1)),
        ([still("evaluation", known=longest(edge=1, step=1, evaluation=1))], None, 30.25, (0,)),
        ([still("evaluation", known=longest(edge=1, step=1, evaluation=8))], None, 80.25, (0,)),
        ([still("checkpoint", step=8), still("forward", step=8)], None, 600.25, (0,)),
        ([still("checkpoint", known=longest(checkpoint=0.5))], None, 30.25, (0,)),
        ([still("build", step=0)], None, 600.25, (0,)),
        # six times as long while it computes
        ([grows("evaluation", "busy", 0.9)], None, 3600.25, (0,)),
        ([grows("forward", "busy", 0.9, edge=True, known=longest())], None, 3600.25, (0,)),
        ([grows("forward", "busy", 0.9)], None, 3.75, (0,)),
        ([still("closing")], None, 600.25, (0,)),
        # the user's number in place of all floors, never below 10 times the longest
        ([still("build", step=0)], Patience.of("7"), 7.25, (0,)),
        ([grows("build", "busy", 1.0)], Patience.of("7"), 7.25, (0,)),
        ([still("forward", known=longest(edge=1, step=2))], Patience.of("7"), 20.25, (0,)),
        # stopped by a signal: wherever it is
        ([still("sync"), still("evaluation", stopped=True)], None, 3.75, (1,)),
        ([still(""), still("", stopped=True)], None, 3.75, (1,)),
        # a processor that it waits for is no sign of life, but neither its fault
        ([grows("forward", "starved", 0.5), still("sync")], None, 7.25, (0,)),
    ],
)
def test_a_rank_that_stands_still_is_suspected_in_time(ranks, patience, seconds, suspects):
    found = suspected(ranks, patience)
    assert found is not None
    assert found[0] == pytest.approx(seconds, abs=0.6)
    assert found[1] == suspects


@pytest.mark.parametrize(
    ("ranks", "until"),
    [
        # victims wait for a rank that has time
        ([still("sync", step=8), still("checkpoint", step=8)], 590),
        ([still("backward", step=8), still("evaluation", step=8)], 590),
        ([still("sync"), still("forward", known=longest(edge=1, step=5))], 48),
        # steps as long as those before, 20 times slower than most, or all of them slow
        ([moving(), moving()], 600),
        ([still("forward", known=longest(edge=30, step=30)), still("sync")], 298),
        # nobody trains yet, or any more
        ([still(""), still("")], 3600),
        ([still("", known=longest())], 3600),
        # a build that works for an hour
        ([grows("build", "busy", 0.5, step=0)], 3600),
        ([still("build", step=0), grows("build", "busy", 0.5, step=0)], 3600),
        # no processor for it at all
        ([grows("forward", "starved", 1.0), still("sync")], 3600),
    ],
)
def test_a_rank_that_has_time_is_not_suspected(ranks, until):
    assert suspected(ranks, until=until) is None


def test_a_crowded_machine_stretches_time():
    assert suspected([still("forward")], crowding=4.0)[0] == pytest.approx(14.25, abs=0.6)
    assert suspected([still("forward")], crowding=1000.0)[0] == pytest.approx(35.25, abs=0.6)


def test_a_rank_that_computes_on_a_crowded_machine_is_not_excused_twice():
    assert suspected([grows("forward", "starved", 0.75)], crowding=4.0)[0] == pytest.approx(14.25, abs=0.6)
    assert suspected([grows("forward", "starved", 0.9)], crowding=4.0)[0] == pytest.approx(35.25, abs=0.6)


def test_a_pause_of_the_whole_machine_is_no_time():
    dog = Watchdog(Patience())
    samples = {0: still("forward")(0)}
    assert dog.observe(samples, TICK_SECONDS) is None
    assert dog.observe(samples, 3600.0) is None
    assert dog.observe(samples, TICK_SECONDS) is None


def test_what_was_measured_is_known_in_the_next_generation():
    dog = Watchdog(Patience())
    dog.observe({0: still("forward", known=longest(edge=2, step=1))(0)}, TICK_SECONDS)
    dog.begin()
    blank = still("forward", known=longest(), edge=True)(0)
    ticks = next(n for n in range(10_000) if dog.observe({0: blank}, TICK_SECONDS))
    assert ticks * TICK_SECONDS == pytest.approx(18.5, abs=0.6)


def test_signs_of_life_start_the_clock_again():
    dog = Watchdog(Patience())
    for beat in range(100):
        for _ in range(int(3.9 / TICK_SECONDS)):
            assert dog.observe({0: Sample(Beat(beat + 1, 3, "forward", longest=STEADY))}, TICK_SECONDS) is None


@pytest.mark.parametrize(("text", "patience"), [("auto", Patience()), ("off", None)])
def test_words_of_the_option(text, patience):
    assert Patience.of(text) == patience


# --- with stacks: who is it?


def stack(pid, *files):
    frames = tuple(Frame(file, 10 + pid, f"in_{pid}") for file in files)
    return Stacks(pid, (Thread("MainThread", frames, is_main=True),))


WAITS, WORKS = (OURS,), (USER,)


@pytest.mark.parametrize(
    ("ranks", "files", "culprit", "how"),
    [
        # both in the same phase: the one that is not in a collective
        ([still("backward"), still("backward")], [WAITS, WORKS], 1, ""),
        ([still("evaluation"), still("evaluation")], [WORKS, WAITS], 0, ""),
        ([still("optimizer"), still("optimizer"), still("optimizer")], [WAITS, WAITS, WORKS], 2, ""),
        ([still("sync"), still("forward")], [WAITS, WORKS], 1, ""),
        # without a stack: the one that is behind, and there the one that stands longest
        ([still("sync"), still("forward")], [(), ()], 1, ""),
        ([still("sync", came=5), still("sync", came=4)], [(), ()], 1, ""),
        # two hang: the first one
        ([still("forward", came=2), still("forward", came=1)], [WORKS, WORKS], 1, ""),
        # a collective that one of three passed by, that only one entered, and of two
        (
            [still("sync", collectives=9), still("sync", collectives=8), still("forward", collectives=7)],
            [WAITS, WAITS, (TORCH, USER)],
            1,
            "it did not enter a collective that others entered at recipe.py:12 in in_2",
        ),
        (
            [still("sync", collectives=9), still("sync", collectives=9), still("forward", collectives=7)],
            [WAITS, WAITS, (TORCH, USER)],
            2,
            "it entered a collective that others did not enter",
        ),
        (
            [still("sync", collectives=9), still("sync", collectives=8), still("sync", collectives=9)],
            [WAITS, WAITS, WAITS],
            1,
            "it did not enter a collective that others entered",
        ),
        (
            [still("forward", collectives=7), still("sync", collectives=8)],
            [(TORCH, USER), WAITS],
            1,
            "it did not enter a collective that others entered at recipe.py:10 in in_0",
        ),
        # more ranks than shards: who has no sample in the step enters nothing of the loss, and is not to blame for it
        (
            [still("sync", collectives=7, idle=True), still("sync", collectives=7), still("forward", collectives=7)],
            [WAITS, WAITS, (TORCH, USER)],
            1,
            "it did not enter a collective that others entered at recipe.py:12 in in_2",
        ),
        (
            [still("sync", idle=True), still("sync", idle=True), still("sync"), still("forward")],
            [WAITS, WAITS, WAITS, (TORCH, USER)],
            2,
            "it did not enter a collective that others entered at recipe.py:13 in in_3",
        ),
        # unless nobody else can be
        (
            [still("sync", idle=True), still("forward", came=1), still("forward", came=2)],
            [WAITS, (TORCH, USER), (TORCH, USER)],
            0,
            "it did not enter a collective that others entered at recipe.py:11 in in_1",
        ),
        # all that could be read wait: it is the one that could not
        ([still("forward", came=2), still("forward", came=1)], [WAITS, None], 1, ""),
        # it left training
        ([still("sync"), still("")], [WAITS, WORKS], 1, "it has left training, and others still need it"),
        # nothing tells them apart
        ([still("sync", came=1), still("sync", came=2)], [WAITS, WAITS], 1, "all ranks wait for one another"),
    ],
)
def test_the_culprit_is_told_from_those_that_wait(ranks, files, culprit, how):
    hang = judged(ranks, files)
    assert hang is not None
    assert (hang.rank, hang.how) == (culprit, how)


def judged(ranks, files):
    dog, suspicion = Watchdog(Patience()), None
    while suspicion is None:
        suspicion = dog.observe({rank: at(0) for rank, at in enumerate(ranks)}, TICK_SECONDS)
    read = {rank: stack(rank, *names) for rank, names in enumerate(files) if names is not None}
    return dog.judge(suspicion, read, now=100.0)


GPU = "its GPU does not come to an end"


@pytest.mark.parametrize(
    ("devices", "collectives", "culprit", "how"),
    [
        # all hosts wait for their devices: the one whose device the others wait for
        ([(7, "sync"), (7, "forward")], (9, 9), 1, GPU),
        ([(6, "optimizer"), (7, "sync"), (7, "sync")], (9, 9, 9), 0, GPU),
        ([(7, "backward"), (7, "forward")], (9, 9), 1, GPU),
        ([(7, "sync"), None], (9, 9), 1, ""),
        # nothing tells them apart
        ([(7, "sync"), (7, "sync"), (7, "sync")], (9, 9, 9), 2, "all ranks wait for one another"),
        # devices that wait in a collective of the loss, which one passed by, or only one entered
        (
            [(7, "forward"), (7, "sync"), (7, "forward")],
            (9, 8, 9),
            1,
            "it did not enter a collective that others entered",
        ),
        ([(7, "forward"), (7, "sync"), (7, "sync")], (9, 8, 8), 0, "it entered a collective that others did not enter"),
    ],
)
def test_on_gpus_it_counts_where_the_devices_are(devices, collectives, culprit, how):
    """Their hosts have gone on to where losses are read, but one without work for its device."""
    places = enumerate(zip(devices, collectives, strict=True))
    ranks = [
        still("optimizer" if device else "forward", device=device, collectives=count, came=rank)
        for rank, (device, count) in places
    ]
    hang = judged(ranks, [WORKS] * len(ranks))
    assert hang is not None
    assert (hang.rank, hang.how.partition(" at ")[0]) == (culprit, how)
    if devices[culprit] is not None:
        assert (hang.step, hang.phase, hang.frame) == (*devices[culprit], "")


def test_a_device_that_goes_on_is_a_sign_of_life():
    """The host waits at one place for the hundred steps that it has launched."""
    goes_on = lambda t: still("optimizer", step=100, device=(int(t), "backward"))(t)  # noqa: E731
    assert suspected([goes_on], until=90) is None
    assert suspected([still("optimizer", device=(3, "backward"))])[1] == (0,)


def test_who_waits_in_a_collective_for_a_rank_with_time_is_left_alone():
    ahead = still("checkpoint", step=8)  # it may take minutes: unmeasured
    assert judged([still("sync", step=7), ahead], [WAITS, WORKS]) is None


def test_a_verdict_says_where_since_when_and_what_is_usual():
    hang = judged([still("sync"), still("forward", came=70.0)], [WAITS, WORKS])
    assert (hang.step, hang.phase, hang.seconds, hang.usual) == (7, "forward", 30.0, 0.1)
    assert hang.frame == "recipe.py:11 in in_1"


def test_a_stopped_rank_is_named_whatever_its_stack_says():
    hang = judged([still("forward"), still("sync", stopped=True)], [WORKS, WAITS])
    assert (hang.rank, hang.how) == (1, "stopped by a signal")
