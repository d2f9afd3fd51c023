"""`samestep watch RUN_DIR`: how a run stands, from any terminal, while it runs and afterwards."""

from __future__ import annotations

import json
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TextIO

from samestep.launcher.command_line.argv import interleaved
from samestep.launcher.command_line.options import Option, load
from samestep.launcher.contract import ExitCode, RunDir, UsageError
from samestep.launcher.lock import Owner
from samestep.launcher.view.follow import Follower
from samestep.launcher.view.lines import one_line
from samestep.launcher.view.standing import Standing, begins

_LOOK_SECONDS = 0.5
_SAY_SECONDS = 5.0  # between two lines for a file or a pipe
_MISSING = "holds no events.jsonl"


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Options of `samestep watch`."""

    once: Annotated[bool, Option("Show how it stands now and return", negative="")] = False


def command(argv: Sequence[str]) -> int:
    """Show the run on stdout until it ends; 0 however it ended.

    Raises:
        UsageError: not exactly one run directory.
        KeyboardInterrupt: whoever watches has seen enough.
    """
    own, words = interleaved(argv, WatchConfig, "samestep watch")
    config = load(WatchConfig, own, {}, program="samestep watch", operands="RUN_DIR")
    if len(words) != 1:
        raise UsageError(
            f"watch is expected to be followed by one run directory, but got {len(words)} words",
            "samestep watch RUN_DIR",
        )
    watched = Watched(RunDir(Path(words[0])))
    if not config.once:
        _until_its_end(watched, sys.stdout)
    watched.look()
    _show_end(watched, sys.stdout)
    return ExitCode.DONE


class Watched:
    """A run as it is seen from outside."""

    def __init__(self, run_dir: RunDir) -> None:
        """Begin to follow.

        Raises:
            UsageError: nothing there is a run, or one that can't be read.
        """
        self.standing = Standing()
        self.running = True
        self._run_dir = run_dir
        self._follower = Follower(run_dir.events)
        problem = _unreadable(run_dir.events)
        if problem and not (problem == _MISSING and self._is_owned()):
            raise UsageError(
                f"{run_dir.path} is expected to be the directory of a run, but {problem}",
                "runs/<recipe> is where a run is kept unless --run-dir was given",
            )

    def look(self) -> None:
        """Bring `standing` and `running` up to date."""
        owned = self._is_owned()  # asked first: what its last owner wrote is there by then
        anew, events = self._follower.read()
        if anew:
            self.standing = Standing()
        for event in events:
            self.standing.take(event)
        if self.standing.total is None or any(map(begins, events)):
            self._configure()
        self.running = owned and self.standing.status != "finished"

    def _configure(self) -> None:
        try:
            config = json.loads(self._run_dir.config.read_bytes())
        except (OSError, ValueError):
            return
        if isinstance(config, dict):
            self.standing.configure(config)

    def _is_owned(self) -> bool:
        try:
            return Owner.of(self._run_dir.lock.read_bytes()).may_live()
        except OSError:
            return False


def _unreadable(events: Path) -> str:
    try:
        with events.open("rb"):
            return ""
    except (FileNotFoundError, NotADirectoryError):
        return _MISSING
    except OSError as error:
        return f"{events.name}: {error.strerror}"


def _until_its_end(watched: Watched, stream: TextIO) -> None:
    from samestep.launcher.view.screen import is_for_people

    watched.look()
    if is_for_people(stream):
        _redraw(watched, stream)
    else:
        _say_changes(watched, lambda line: print(line, file=stream, flush=True))


def _redraw(watched: Watched, stream: TextIO) -> None:
    from samestep.launcher.supervise.console import Console
    from samestep.launcher.supervise.signals import SignalSocket
    from samestep.launcher.view.screen import paint

    console = Console(stderr=stream.fileno())
    with SignalSocket() as signals:  # so that nothing ends us in the middle of a line
        try:
            while watched.running:
                console.show_bar(paint(watched.standing, stream))
                select.select([signals], [], [], _LOOK_SECONDS)
                _obey(signals.read())
                watched.look()
        finally:
            console.close()


def _obey(signums: Sequence[int]) -> None:
    for signum in signums:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        if signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            raise SystemExit(128 + signum)


def _say_changes(watched: Watched, say: Callable[[str], None]) -> None:
    told, due = "", 0.0
    while watched.running:
        line = one_line(watched.standing)
        if line != told and time.monotonic() >= due:
            say(line)
            told, due = line, time.monotonic() + _SAY_SECONDS
        time.sleep(_LOOK_SECONDS)
        watched.look()


def _show_end(watched: Watched, stream: TextIO) -> None:
    from samestep.launcher.view.screen import is_for_people, paint

    if is_for_people(stream):
        lines = paint(watched.standing, stream, running=watched.running)
    else:
        lines = [one_line(watched.standing, running=watched.running)]
    print("\n".join(lines), file=stream, flush=True)
