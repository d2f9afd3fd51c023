"""The watchdog's eyes and hands: reads what ranks publish and what the kernel says of them, takes stacks."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from samestep.launcher.contract import RunDir
from samestep.launcher.diagnosis import stack_probe
from samestep.launcher.diagnosis.stacks import Stacks, render_all
from samestep.launcher.heartbeat import Beat, Board
from samestep.launcher.supervise.outcome import Hang
from samestep.launcher.supervise.watchdog import TICK_SECONDS, Patience, Sample, Still, Suspicion, Watchdog

_AGAIN_SECONDS = 5.0  # until a suspicion that came to nothing is looked into once more
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Watch(Protocol):
    """Looks after the ranks of one generation after the other."""

    fd: int

    def clear(self) -> None:
        """Ranks are about to be started: what earlier ones said is over."""

    def begin(self, generation: int, pids: Mapping[int, int]) -> bool:
        """The ranks were started, rank -> pid; False if nothing is to be watched."""

    def tick(self) -> Hang | None:
        """To be called every TICK_SECONDS."""

    def beat(self, rank: int) -> Beat:
        """What the rank has published last; of one that never did, no beats."""

    def close(self) -> None:
        """The run is over."""


class NoWatch:
    """For scripts that publish nothing."""

    fd = -1

    def clear(self) -> None:
        """Nothing."""

    def begin(self, generation: int, pids: Mapping[int, int]) -> bool:  # noqa: ARG002 (Watch's form)
        """Nothing."""
        return False

    def tick(self) -> Hang | None:
        """Nothing."""
        return None

    def beat(self, rank: int) -> Beat:  # noqa: ARG002 (Watch's form)
        """Nothing."""
        return Beat()

    def close(self) -> None:
        """Nothing."""


class Listener(NoWatch):
    """For `--hang-timeout off`: knows where the ranks of a recipe are, whose memory it shares, and judges nobody."""

    def __init__(self, world_size: int) -> None:
        """For the ranks of this machine. Raises OSError where the system has no memory left to share."""
        self._board = Board(world_size)
        self._slots = world_size
        self.fd = self._board.fd

    def clear(self) -> None:
        """Ranks are about to be started: what earlier ones said is over."""
        self._board.clear()

    def beat(self, rank: int) -> Beat:
        """What the rank has published last; of one that never did, no beats."""
        return self._board.read(rank % self._slots)  # as the rank itself counts, wherever its machine's ranks begin

    def close(self) -> None:
        """Let go of the shared memory."""
        self._board.close()


@dataclass(frozen=True, slots=True)
class Look:
    """Taken once there is a suspicion, by rank.

    Attributes:
        stacks: of the ranks.
        children: frames of the user in processes that a rank has started.
        by_pid: stacks of all processes of this machine.
        files: that hold the stacks already.
    """

    stacks: Mapping[int, Stacks]
    children: Mapping[int, str]
    by_pid: Mapping[int, Stacks] = field(default_factory=dict)
    files: Mapping[int, str] = field(default_factory=dict)

    def __or__(self, other: Look) -> Look:
        """With what another machine has seen."""
        return Look(
            {**self.stacks, **other.stacks},
            {**self.children, **other.children},
            self.by_pid,
            {**self.files, **other.files},
        )


class HangWatch(Listener):
    """Watches a recipe's ranks; its memory is handed down to them by descriptor."""

    def __init__(self, patience: Patience, world_size: int, run_dir: RunDir) -> None:
        """Raises OSError where the system has no memory left to share."""
        super().__init__(world_size)
        self._watchdog = Watchdog(patience)
        self._run_dir = run_dir
        self._generation = 0
        self._pids: Mapping[int, int] = {}
        self._samples: dict[int, Sample] = {}
        self._last = 0.0
        self._not_before = 0.0  # time at which stacks may be taken once more

    def begin(self, generation: int, pids: Mapping[int, int]) -> bool:
        """Look after these ranks from now on."""
        self._watchdog.begin()
        self._generation, self._pids, self._samples = generation, dict(pids), {}
        self._last, self._not_before = time.monotonic(), 0.0
        return True

    def tick(self) -> Hang | None:
        """The rank that hangs, once its stack and those of the others are on disk; None almost always."""
        suspicion = self._observe({})
        return self._verdict(suspicion, self._look()) if suspicion and self._may_look() else None

    def _observe(self, elsewhere: Mapping[int, Still]) -> Suspicion | None:
        now, before = time.monotonic(), self._last
        self._last = now
        self._samples = {rank: self._sample(rank, pid) for rank, pid in self._pids.items()}
        return self._watchdog.observe(self._samples, now - before, _crowding(), elsewhere)

    def _may_look(self) -> bool:
        return self._last >= self._not_before and not self._traced()

    def _traced(self) -> bool:
        return any(map(_is_traced, self._pids.values()))

    def _look(self, seconds: float = stack_probe.SECONDS) -> Look:
        self._not_before = self._last + _AGAIN_SECONDS
        by_pid = stack_probe.take(list(self._pids.values()), seconds)
        children = {
            rank: next((s.user_frame for s in by_pid.values() if s.parent == pid and s.user_frame), "")
            for rank, pid in self._pids.items()
        }
        return Look({rank: by_pid[pid] for rank, pid in self._pids.items()}, children, by_pid)

    def _verdict(self, suspicion: Suspicion, look: Look) -> Hang | None:
        hang = self._watchdog.judge(suspicion, look.stacks, time.monotonic())
        if hang is None or (hang.rank in self._pids and self.beat(hang.rank).beats != self._beats(hang.rank)):
            return None
        if not look.stacks[hang.rank].user_frame and look.children[hang.rank]:
            hang = replace(hang, frame=look.children[hang.rank])  # a process that loads its data
        if not hang.how and (stopped := self._stopped_below(hang.rank, look)):
            hang = replace(hang, how=f"process {stopped}, which it has started, is stopped by a signal")
        return replace(hang, stacks=look.files.get(hang.rank) or self._write(self._rendered(look)))

    def _stopped_below(self, rank: int, look: Look) -> int | None:
        """Of the processes that a rank has started, such as those that load its data, one that SIGSTOP holds."""
        below = (
            stacks.pid for stacks in look.by_pid.values() if rank in self._pids and stacks.parent == self._pids[rank]
        )
        return next(filter(stack_probe.is_stopped, below), None)

    def _beats(self, rank: int) -> int:
        return self._samples[rank].beat.beats

    def _rendered(self, look: Look) -> str:
        return render_all(look.by_pid, self._pids, self._about())

    def _sample(self, rank: int, pid: int) -> Sample:
        beat = self.beat(rank)
        before = self._samples.get(rank)
        if before is not None and before.beat.beats != beat.beats:
            return Sample(beat)  # it moves: nothing else is asked
        return Sample(beat, stack_probe.is_stopped(pid), _starved(pid), _busy(pid))

    def _about(self) -> dict[int, str]:
        now = time.monotonic()
        return {
            rank: f"{sample.beat.phase or 'not training'}, {sample.beat.step} steps done, "
            f"{now - sample.beat.since:.1f} s without a sign of life"
            if sample.beat.beats
            else "not training"
            for rank, sample in self._samples.items()
        }

    def _write(self, text: str, path: Path | None = None) -> str:
        path = path or self._run_dir.stacks(self._generation)
        try:
            path.write_text(text)
        except OSError:
            return ""  # a full disk hides no hang
        return str(path)


def watch_over(world_size: int, hang_timeout: str, run_dir: RunDir) -> Watch:
    """Who looks after ranks that publish where they are, for a `--hang-timeout`."""
    patience = Patience.of(hang_timeout)
    return HangWatch(patience, world_size, run_dir) if patience else Listener(world_size)


def _starved(pid: int) -> float:
    """Seconds that the main thread waited for a processor."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _busy(pid: int) -> float:
    """Seconds of processor time of a process and of those that it started."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        children = [
            int(text) for file in Path(f"/proc/{pid}/task").glob("*/children") for text in file.read_text().split()
        ]
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND + sum(map(_busy, children))
    except (OSError, IndexError, ValueError):
        return 0.0


def _is_traced(pid: int) -> bool:
    """Whether a debugger is attached: then standing still is what somebody wants."""
    try:
        return int(Path(f"/proc/{pid}/status").read_text().partition("TracerPid:")[2].split()[0]) > 0
    except (OSError, IndexError, ValueError):
        return False


def _crowding() -> float:
    """Tasks that are ready to run, for each processor."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


__all__ = ["TICK_SECONDS", "HangWatch", "Listener", "NoWatch", "Watch", "watch_over"]
