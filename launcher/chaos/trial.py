"""One run from its start to its end, struck at the planned moments and started again where its launcher was hit."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from samestep.launcher.chaos.kinds import Aim, Moment
from samestep.launcher.chaos.outcome import Strike, Trial
from samestep.launcher.chaos.plan import Fault
from samestep.launcher.chaos.strike import present, strike
from samestep.launcher.chaos.trace import Trace
from samestep.launcher.contract import ExitCode, RunDir
from samestep.launcher.supervise.process import end

_LOOK_SECONDS = 0.003
_SAMPLE_SECONDS = 0.5
_LEAVE_SECONDS = 2.0
_JOIN_SECONDS = 0.1  # a part of the joining, in which forked ranks meet
_LAST_BREATH = 0.25  # seconds in which ranks that are about to end may still do steps
_PROBE, _PROBE_NAME = b"blat", 8
_OF_TORCH = re.compile(r"tmp[a-z0-9_]{8}")
_START_AGAIN = frozenset({ExitCode.PREEMPTED_SAVED, ExitCode.PREEMPTED_KEPT, ExitCode.INTERRUPTED, ExitCode.TERMINATED})


@dataclass(frozen=True, slots=True)
class Expected:
    """What the undisturbed run ended in."""

    digest: str
    losses: list[tuple[int, str]]


class OverError(Exception):
    """The run has ended; no further fault can strike it."""


@dataclass(slots=True)
class Subject:
    """The run at hand. `start` starts its launcher, with an open file as stderr."""

    start: Callable[[int], subprocess.Popen[bytes]]
    run_dir: RunDir
    said: Path
    temporary: Path  # where it and its processes put temporary files
    patience: float  # seconds without any progress after which it is given up
    trace: Trace = field(init=False)
    launcher: subprocess.Popen[bytes] = field(init=False)
    strikes: list[Strike] = field(default_factory=list)
    pending: list[tuple[int, float]] = field(default_factory=list)  # unsettled strikes and their wall clock time
    began: float = 0.0  # wall clock time of the newest start or strike
    trouble: str = ""
    seen: dict[int, psutil.Process] = field(default_factory=dict)
    growth: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    _progress: tuple[float, tuple[int, ...]] = (0.0, ())
    _sampled: float = 0.0
    _launched: float = 0.0  # wall clock time

    def __post_init__(self) -> None:
        self.trace = Trace(self.run_dir)

    def play(self, number: int, faults: Iterable[Fault], expected: Expected) -> Trial:
        """Run to the end."""
        begin, files = time.monotonic(), left_in(self.temporary)
        self._launch()
        try:
            for fault in faults:
                self._await(fault)
                self._strike(fault)
            while True:
                self._look()
        except OverError:
            pass
        finally:
            end(self.launcher)
        self.trace.update()
        finished = self.trace.last("run_finished")
        difference = self.trouble or _difference(self.trace, str(finished.get("digest", "")), expected)
        return Trial(
            number=number,
            strikes=tuple(self.strikes),
            same=not difference,
            difference=difference,
            seconds=time.monotonic() - begin,
            goodput=float(finished.get("goodput", 0.0)),
            left_behind=(*_left_behind(self.seen.values()), *sorted(left_in(self.temporary) - files)),
            growth=_growth(self.growth),
        )

    def _launch(self) -> None:
        with self.said.open("ab") as said:
            self.launcher = self.start(said.fileno())
        self.began = self._launched = time.time()

    def _await(self, fault: Fault) -> None:
        """Return at the moment of the fault."""
        if fault.moment is Moment.JOINING:
            self._until(lambda: self.trace.started_since(self.began) is not None or self._present(fault))
        elif fault.moment is Moment.FIRST_STEP:
            before = self.trace.step
            self._until(lambda: self.trace.started_since(self.began) is not None or self.trace.step > before)
        elif fault.after_step is not None:
            step = fault.after_step
            self._until(lambda: not self.pending and self.trace.step >= step)
        delay = fault.delay
        if fault.moment is Moment.JOINING and fault.kind.aim not in (Aim.LAUNCHER, Aim.FILES):
            delay = min(delay, _JOIN_SECONDS * fault.delay)  # what it hits is there for a part of the joining only
        since = time.monotonic()
        self._until(lambda: time.monotonic() - since >= delay)

    def _present(self, fault: Fault) -> bool:
        return present(fault.kind, self.launcher, self.trace.ranks)

    def _until(self, condition: Callable[[], bool]) -> None:
        self._look(0.0)
        while not condition():
            self._look()

    def _strike(self, fault: Fault) -> None:
        self._sample()
        self.trace.update()
        wall = time.time()
        hit = strike(fault.kind, fault.rank, self.launcher, self.trace.ranks, self.run_dir)
        self.strikes.append(Strike(fault, hit, self.trace.step, survived=not hit))
        if hit:
            self.pending.append((len(self.strikes) - 1, wall))
            self.began = wall

    def _look(self, pause: float = _LOOK_SECONDS) -> None:
        """Let a moment pass and judge what has happened.

        Raises:
            OverError: nothing more will.
        """
        time.sleep(pause)
        self.trace.update()
        self._settle()
        code = self.launcher.poll()
        if code is not None:
            self._ended(code)
        now, facts = time.monotonic(), (len(self.trace.events), self.trace.step, self.launcher.pid)
        if facts != self._progress[1]:
            self._progress = (now, facts)
        elif now - self._progress[0] > self.patience:
            self._give_up(f"no progress for {self.patience:.0f} s")
        if now - self._sampled > _SAMPLE_SECONDS:
            self._sample()

    def _settle(self) -> None:
        if not self.pending:
            return
        index, wall = self.pending[-1]
        kind = self.strikes[index].fault.kind
        started = self.trace.started_since(wall)
        done = None if started is None else self.trace.step_since(started)
        if done is None:
            must_start_again = kind.aim in (Aim.LAUNCHER, Aim.FILES)
            quiet = wall + (kind.resumed_after or 0.0) + _LAST_BREATH
            if must_start_again or started is not None or self.trace.step_since(quiet) is None:
                return
        for number, (each, struck) in enumerate(self.pending):
            alone = number == len(self.pending) - 1  # an earlier one was overtaken by the next blow
            seconds = done - struck if done is not None and alone else None
            self.strikes[each] = replace(self.strikes[each], survived=True, seconds=seconds)
        self.pending.clear()

    def _ended(self, code: int) -> None:
        self.trace.update()
        self._settle()
        if code == ExitCode.DONE:
            for each, _ in self.pending:
                self.strikes[each] = replace(self.strikes[each], survived=True)
            self.pending.clear()
            raise OverError
        last = self.strikes[-1].fault.kind.aim if self.strikes else None
        # who is asked to stop goes on until all agree on a step: the end may come after what looks like survival
        asked = code in _START_AGAIN and self.began > self._launched
        struck = self.pending and last in (Aim.LAUNCHER, Aim.FILES) and code != ExitCode.NO_CHECKPOINT
        if asked or struck:
            self._launch()
        else:
            self._give_up(f"it ended with exit code {code}: {_last_words(self.said)}")

    def _give_up(self, trouble: str) -> None:
        self.trouble = trouble
        for each, _ in self.pending or [(len(self.strikes) - 1, 0.0)] if self.strikes else []:
            self.strikes[each] = replace(self.strikes[each], survived=False, trouble=trouble)
        self.pending.clear()
        raise OverError

    def _sample(self) -> None:
        self._sampled = time.monotonic()
        with contextlib.suppress(psutil.Error):
            launcher = psutil.Process(self.launcher.pid)
            self.seen |= {process.pid: process for process in (launcher, *launcher.children(recursive=True))}
            # at work: its report, once the run is over, takes the memory of a library for plots
            at_work = self.trace.started_since(self._launched) is not None and not self.trace.last("run_finished")
            if not self.pending and at_work:
                sample = launcher.num_fds(), launcher.memory_info().rss
                self.growth.setdefault(launcher.pid, []).append(sample)


def _difference(trace: Trace, digest: str, expected: Expected) -> str:
    """Where a run parts from the undisturbed one; empty if nowhere."""
    if trace.losses != expected.losses:
        pairs = zip(trace.losses, expected.losses, strict=False)
        step = next((number for number, (own, other) in enumerate(pairs, 1) if own != other), None)
        return f"the loss of step {step} differs" if step else f"{len(trace.losses)} steps of {len(expected.losses)}"
    return "" if digest == expected.digest else f"digest {digest or 'missing'} differs"


def left_in(folder: Path) -> set[str]:
    """Names of temporary files, without those that no run can help: see `_is_nobodys`."""
    return {path.name for path in folder.iterdir() if not _is_nobodys(path)}


def _is_nobodys(path: Path) -> bool:
    """Torch's cache for later runs, or a file that was to be there for a moment, in which its program was killed.

    Python's tempfile module tries with eight characters that hold `blat` whether it may write there. Torch's DataLoader
    tries with ten empty ones, tmp and eight characters, how many it can open, when it has lost one of its processes.
    """
    if path.is_dir():
        return path.name.startswith("torchinductor_")
    if _OF_TORCH.fullmatch(path.name) and path.is_file():
        return not path.stat().st_size
    if len(path.name) != _PROBE_NAME or not path.is_file() or path.stat().st_size > len(_PROBE):
        return False
    return path.read_bytes() in (b"", _PROBE)


def _left_behind(seen: Iterable[psutil.Process]) -> tuple[str, ...]:
    """Processes of the run that still live a moment after it; they are ended here."""
    _, alive = psutil.wait_procs(list(seen), timeout=_LEAVE_SECONDS)
    names = []
    for process in alive:
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                names.append(f"{process.name()} {process.pid}")
                process.kill()
    return tuple(names)


def _growth(samples: Mapping[int, list[tuple[int, int]]]) -> dict[str, int]:
    """How much more a launcher held at its end than at its beginning: the most of all launchers of the run."""
    pairs = [(found[0], found[-1]) for found in samples.values() if len(found) > 1]
    if not pairs:
        return {}
    return {
        "launcher descriptors": max(last[0] - first[0] for first, last in pairs),
        "launcher KiB": max(last[1] - first[1] for first, last in pairs) // 1024,
    }


def _last_words(said: Path) -> str:
    lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()]
    failed = [line for line in lines if "failed:" in line]
    return (failed or lines or ["nothing was said"])[-1][:200]
