"""What people see below the ranks' words while they watch `samestep run`, read from the run's own events.jsonl."""

from __future__ import annotations

import json
import time

from samestep.launcher.contract import RunDir
from samestep.launcher.view.follow import Follower
from samestep.launcher.view.standing import Standing

REFRESH_SECONDS = 0.5
_PAST = 1 << 16  # bytes of events read again after a restart has cut the file


class Progress:
    """Follows the steps of a run; scripts that write no events never get a display. Draws nothing itself."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._follower = Follower(run_dir.events, past=_PAST)
        self._since = time.time()
        self._standing = Standing()

    def update(self) -> list[str]:
        """The lines to show, none if there is nothing to say yet or no more."""
        anew, events = self._follower.read()
        if anew:
            self._standing = Standing()
        for event in events:
            self._standing.take(event)
        standing = self._standing
        # what an earlier launch has left is history, and what ended needs no display
        if standing.stepped < self._since or standing.status != "training":
            return []
        if standing.total is None:
            standing.configure(read_config(self._run_dir))
        from samestep.launcher.view.screen import paint

        return paint(standing)


def read_config(run_dir: RunDir) -> dict[str, object]:
    """config.json, empty while there is none."""
    try:
        config = json.loads(run_dir.config.read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
