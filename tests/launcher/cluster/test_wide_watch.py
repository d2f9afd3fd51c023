"""Two launchers that watch one run over a network: scenarios tick by tick, late and lost news, other clocks."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from samestep.launcher.cluster.sightings import hear_look, hear_stills, tell_look, tell_stills
from samestep.launcher.cluster.wide_watch import FarRanks
from samestep.launcher.diagnosis.stacks import Frame, Stacks, Thread
from samestep.launcher.heartbeat import SPANS, Beat
from samestep.launcher.supervise.hang_watch import Look
from samestep.launcher.supervise.watchdog import TICK_SECONDS, Patience, Sample, Still, Watchdog

STEADY = tuple({"edge": 1.0, "step": 0.1}.get(span, 0.0) for span in SPANS)
AHEAD = 5e6  # seconds that the other machine's clock is ahead
ENDLESS = 1200.0
TORCH = "/x/site-packages/torch/distributed/distributed_c10d.py"


def still(phase, *, step=7, **more):
    return lambda clock: lambda t: Sample(Beat(1, step, phase, False, 0, clock, STEADY), **more)


def moving(clock):
    return lambda t: Sample(Beat(int(t * 100) + 1, 7 + int(t), "forward", False, 0, clock + t, STEADY))


def stack(frame):
    return Stacks(1, (Thread("MainThread", (Frame(frame, 3, "f"),), is_main=True),))


WAITS, WORKS = stack(TORCH), stack("recipe.py")


class Pair:
    """Rank 0 here, rank 1 on a machine whose news take `delay` seconds and are lost from `lost` on."""

    def __init__(self, near, far, *, delay=0.0, lost=ENDLESS, back=ENDLESS, crowding=1.0):
        self.near, self.far = near(0.0), far(AHEAD)
        self.delay, self.lost, self.back, self.crowding = delay, lost, back, crowding
        self.head, self.follower, self.heard = Watchdog(Patience()), Watchdog(Patience()), {}

    def run(self, until=ENDLESS):
        """The first suspicion that stands, as (seconds, hang); None without one."""
        letters = []
        for tick in itertools.count():
            t = tick * TICK_SECONDS
            if t > until:
                break
            self.follower.observe({1: self.far(t)}, TICK_SECONDS, self.crowding)
            told = json.dumps(tell_stills(self.follower.stills, AHEAD + t))
            letters.append((max(t, self.back if t >= self.lost else t) + self.delay, told))
            while letters and letters[0][0] <= t:
                self.heard = hear_stills(json.loads(letters.pop(0)[1]), t)
            suspicion = self.head.observe({0: self.near(t)}, TICK_SECONDS, elsewhere=self.heard)
            if self.heard and suspicion:
                hang = self.head.judge(suspicion, self.stacks, t)
                if hang is not None:
                    return t, hang
        return None

    stacks = {0: WAITS, 1: WORKS}  # noqa: RUF012 (a constant)


@pytest.mark.parametrize("delay", [0.0, 0.3, 2.0])
@pytest.mark.parametrize(
    ("near", "far", "stacks", "rank", "how"),
    [
        (still("sync"), still("forward"), (WAITS, WORKS), 1, ""),
        (still("forward"), still("sync"), (WORKS, WAITS), 0, ""),
        (still("sync", step=7), still("data", step=6), (WAITS, WORKS), 1, ""),
        (still("backward"), still("backward"), (WAITS, WORKS), 1, ""),
        (still("sync"), still("evaluation", stopped=True), (WAITS, WORKS), 1, "stopped by a signal"),
        (still("optimizer", stopped=True), still("sync"), (WAITS, WAITS), 0, "stopped by a signal"),
    ],
)
def test_the_rank_that_hangs_is_named_wherever_it_is(near, far, stacks, rank, how, delay):
    pair = Pair(near, far, delay=delay)
    pair.stacks = dict(enumerate(stacks))
    seconds, hang = pair.run()
    assert (hang.rank, hang.how) == (rank, how)
    late = delay if rank == 1 else 0.0
    assert seconds == pytest.approx(3.75 + late, abs=0.6)
    assert hang.seconds == pytest.approx(seconds - late, abs=0.3)  # an age, whatever the other machine's clock says


@pytest.mark.parametrize(
    ("near", "far", "more"),
    [
        (moving, moving, {}),
        (moving, moving, {"delay": 20.0}),
        # no news: nothing is known, and the silence itself is what ends such a run
        (still("sync"), moving, {"lost": 3.0}),
        (still("sync"), still("forward"), {"lost": 0.0}),
        (still("sync"), moving, {"lost": 3.0, "back": 40.0}),
        # the other machine's rank has time, or no processor
        (still("sync", step=8), still("checkpoint", step=8), {}),
    ],
)
def test_late_or_missing_news_make_no_hang(near, far, more):
    assert Pair(near, far, **more).run(until=500.0) is None


def test_a_crowded_machine_stretches_the_time_of_its_own_ranks():
    seconds, hang = Pair(still("sync"), still("forward"), crowding=4.0).run()
    assert (hang.rank, seconds) == (1, pytest.approx(14.25, abs=0.6))


def test_ranks_of_two_machines_that_wait_for_one_another_get_the_time_that_a_network_needs():
    pair = Pair(still("sync"), still("sync"))
    pair.stacks = {0: WAITS, 1: WAITS}
    seconds, hang = pair.run()
    assert (hang.how, seconds) == ("all ranks wait for one another", pytest.approx(30.0, abs=0.6))
    own_number = Pair(still("sync"), still("sync"))
    own_number.stacks = pair.stacks
    own_number.head.patience = Patience.of("8") or Patience()
    assert own_number.run()[0] == pytest.approx(8.0, abs=0.6)


def test_what_is_told_is_what_is_heard_in_another_time():
    beat = Beat(12, 3, "backward", True, 41, 1000.5, (1.0, 0.25, 3.0, 0.0, 0.5))
    told = json.loads(json.dumps(tell_stills({4: Still(Sample(beat, stopped=True), 2.5, 1.5, 0.75)}, 1002.0)))
    (found,) = hear_stills(told, 7.0).values()
    assert found == Still(Sample(Beat(12, 3, "backward", True, 41, 5.5, beat.longest), stopped=True), 2.5, 1.5, 0.75)
    for other in (told["4"][:-1], [*told["4"][:-1], told["4"][-1][:-1]], [*told["4"][:2], 99, *told["4"][3:]]):
        with pytest.raises(ValueError, match="the same version"):
            hear_stills({"4": other}, 7.0)
    on_a_gpu = tell_stills({4: Still(Sample(replace(beat, device=(2, "sync"))))}, 1002.0)
    assert hear_stills(json.loads(json.dumps(on_a_gpu)), 7.0)[4].sample.beat.device == (2, "sync")


def test_a_look_keeps_what_names_the_culprit():
    frames = (Frame(TORCH, 9, "all_reduce"), Frame("/u/recipe.py", 5, "loss"), Frame("libc.so", 0, "poll"))
    stacks = Stacks(7, (Thread("other", ()), Thread("MainThread", frames, is_main=True)))
    look = Look({2: stacks, 3: Stacks(8, problem="gone")}, {2: "loader.py:1 in get", 3: ""})
    heard = hear_look(json.loads(json.dumps(tell_look(look, "errors/stacks-0-from-rank-2.txt"))))
    for rank, had in look.stacks.items():
        has = heard.stacks[rank]
        assert (has.user_frame, has.innermost, has.waits_for_others) == (
            had.user_frame,
            had.innermost,
            had.waits_for_others,
        )
        assert (has.pid, has.problem, has.main is None) == (had.pid, had.problem, had.main is None)
    assert heard.children == {2: "loader.py:1 in get", 3: ""}
    assert heard.files[3] == "errors/stacks-0-from-rank-2.txt"


def test_the_head_waits_for_news_and_stacks_of_every_rank_and_believes_nobody_about_others():
    far, asked = FarRanks(), []
    far.begin(range(1, 3), lambda: asked.append(True))
    told = tell_stills({rank: Still(Sample(Beat())) for rank in (0, 1)}, 0.0)
    far.hear({"ranks": told})
    assert far.stills() is None
    far.hear({"ranks": tell_stills({2: Still(Sample(Beat()))}, 0.0)})
    assert set(far.stills() or ()) == {1, 2}
    far.ask()
    far.hear({"ranks": {}, "look": tell_look(Look({1: WORKS}, {}), "")})
    assert far.look() is None
    far.hear({"ranks": {}, "look": tell_look(Look({2: WAITS}, {}), "")})
    assert set(far.look().stacks) == {1, 2}
    assert asked == [True]
    far.begin((), lambda: None)
    assert (far.stills(), set(far.look().stacks)) == ({}, set())
