"""The hang watch of a run on several machines: each launcher looks at its own ranks, and the head's judges all of them.

Followers tell at every tick where their ranks are. Once the head suspects one it asks for stacks, which each machine
takes of its own ranks and writes beside the head's; news that came after a look decide whether it still stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from samestep.launcher.cluster.layout import Timeouts
from samestep.launcher.cluster.sightings import hear_look, hear_stills, tell_look, tell_stills
from samestep.launcher.contract import RunDir
from samestep.launcher.supervise.hang_watch import HangWatch, Look, Watch, watch_over
from samestep.launcher.supervise.outcome import Hang
from samestep.launcher.supervise.watchdog import Patience, Still

_LOOK_SECONDS = 4.0  # for stacks of one machine; meanwhile its launcher hears and says nothing
_ANSWER_SECONDS = 15.0  # for stacks of all machines, else a suspicion is dropped


class FarRanks:
    """What the head has heard of the ranks of other machines; `wanted`: somebody here wants to hear it."""

    def __init__(self) -> None:
        self.wanted = False
        self.begin((), lambda: None)

    def begin(self, ranks: Iterable[int], ask: Callable[[], None]) -> None:
        """Another generation; `ask` tells all other machines to take stacks."""
        self._ranks, self._ask = frozenset(ranks), ask
        self._stills: dict[int, Still] = {}
        self._look = Look({}, {})

    def hear(self, message: Mapping[str, Any]) -> None:
        """A launcher has told where its ranks are, and what it has seen if it was asked."""
        heard = hear_stills(message["ranks"], time.monotonic())
        self._stills |= {rank: still for rank, still in heard.items() if rank in self._ranks}
        self._look |= hear_look(message.get("look", {}))

    def stills(self) -> Mapping[int, Still] | None:
        """Of all ranks that are not here; None before each was told of."""
        return self._stills if self._ranks <= self._stills.keys() else None

    def ask(self) -> None:
        """Take stacks everywhere."""
        self._look = Look({}, {})
        self._ask()

    def look(self) -> Look | None:
        """The answer; None while somebody's is missing."""
        return self._look if self._ranks <= self._look.stacks.keys() else None


class WideWatch(HangWatch):
    """The head's: judges its own ranks and those it hears of."""

    def __init__(self, patience: Patience, world_size: int, run_dir: RunDir, far: FarRanks) -> None:
        """Raises OSError where the system has no memory left to share."""
        super().__init__(patience, world_size, run_dir)
        self._far = far
        self._seen: Look | None = None
        self._asked = 0.0
        far.wanted = True

    def begin(self, generation: int, pids: Mapping[int, int]) -> bool:
        """Look after these ranks from now on."""
        self._seen = None
        return super().begin(generation, pids)

    def tick(self) -> Hang | None:
        """As on one machine, but that stacks of others come when they come."""
        elsewhere = self._far.stills()
        suspicion = self._observe(elsewhere or {})
        if elsewhere is None or suspicion is None or self._traced():
            self._seen = None
            return None
        if self._seen is None:
            if self._may_look():
                self._far.ask()
                self._seen, self._asked = self._look(_LOOK_SECONDS), time.monotonic()
            return None
        there = self._far.look()
        if there is None and time.monotonic() - self._asked < _ANSWER_SECONDS:
            return None
        seen, self._seen = self._seen, None
        return self._verdict(suspicion, seen | there) if there is not None else None


class Reporting(HangWatch):
    """A follower's: tells the head, and judges nobody."""

    def __init__(self, world_size: int, run_dir: RunDir) -> None:
        """For the ranks of this machine. Raises OSError where the system has no memory left to share."""
        super().__init__(Patience(), world_size, run_dir)
        self.wanted = False
        self.tell: Callable[[dict[str, Any]], None]  # to be set before ranks are started

    def begin(self, generation: int, pids: Mapping[int, int]) -> bool:
        """Tell of these ranks from now on."""
        super().begin(generation, pids)
        return self.wanted

    def tick(self) -> Hang | None:
        """Tell where they are."""
        self.tell({"kind": "ranks"} | self._where())
        return None

    def answer(self) -> None:
        """Take stacks, and tell them together with where the ranks are after that."""
        if not self._pids:
            return
        look = self._look(_LOOK_SECONDS)
        own = self._run_dir.stacks(self._generation)
        written = self._write(self._rendered(look), own.with_stem(f"{own.stem}-from-rank-{min(self._pids)}"))
        self.tell({"kind": "ranks", "look": tell_look(look, written)} | self._where())

    def _where(self) -> dict[str, Any]:
        if self._traced():  # standing still is what somebody wants
            self._watchdog.begin()
        self._observe({})
        return {"ranks": tell_stills(self._watchdog.stills, time.monotonic())}


def watch_all(world_size: int, hang_timeout: str, run_dir: RunDir, timeouts: Timeouts | None, far: FarRanks) -> Watch:
    """Who looks after the ranks of all machines, for a `--hang-timeout`; `timeouts` is None for one machine."""
    patience = Patience.of(hang_timeout)
    if patience is None or timeouts is None:
        return watch_over(world_size, hang_timeout, run_dir)
    # a machine that can't be reached is found by its silence, before its ranks are blamed
    patience = replace(patience, network=max(patience.network, 2 * timeouts.silence))
    return WideWatch(patience, world_size, run_dir, far)
