"""Follows a run by what it writes: which step it has done, who its ranks are, how it began and ended."""

from __future__ import annotations

from typing import Any

from samestep.launcher.contract import RunDir
from samestep.launcher.view.follow import Follower


class Trace:
    """Everything that events.jsonl says so far; call `update` to read on."""

    def __init__(self, run_dir: RunDir) -> None:
        self.events: list[dict[str, Any]] = []
        self.step = 0  # steps done
        self._follower = Follower(run_dir.events, all_steps=True)

    def update(self) -> None:
        """Read what is new; a resume writes a shorter file, which is read from its beginning."""
        anew, new = self._follower.read()
        if anew:
            self.events, self.step = [], 0
        self.step = max([self.step, *(int(event["step"]) for event in new if event.get("event") == "step")])
        self.events += new

    @property
    def ranks(self) -> dict[int, int]:
        """Process ids of the newest start."""
        starts = [event for event in self.events if event.get("event") in _STARTS]
        return {int(rank["rank"]): int(rank["pid"]) for rank in starts[-1]["ranks"]} if starts else {}

    def started_since(self, wall: float) -> float | None:
        """Time of the first start of ranks after `wall`, seconds since the epoch."""
        return self._first(_STARTS, wall)

    def step_since(self, wall: float) -> float | None:
        """Time of the first step that was done after `wall`."""
        return self._first({"step"}, wall)

    @property
    def losses(self) -> list[tuple[int, str]]:
        """Every step with the bits of its loss."""
        return [(event["step"], event["loss_hex"]) for event in self.events if event.get("event") == "step"]

    def last(self, name: str) -> dict[str, Any]:
        """The newest event of that name, empty if there is none."""
        return next((event for event in reversed(self.events) if event.get("event") == name), {})

    def _first(self, names: frozenset[str] | set[str], wall: float) -> float | None:
        found: float | None = None
        for event in reversed(self.events):
            if float(event["time"]) <= wall:
                break
            if event.get("event") in names:
                found = float(event["time"])
        return found


_STARTS = frozenset({"run_started", "restarted"})
