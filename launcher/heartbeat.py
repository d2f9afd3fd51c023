"""Where every rank is, in shared memory: a worker writes a few bytes at each change of phase, the launcher reads them.

The launcher makes one anonymous file a generation (memfd: it has no name, so nothing is left however anybody ends) and
hands its descriptor to the ranks. Times are of `time.monotonic`, which counts the same for all processes of a host.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from samestep.launcher.contract import ENV_HEARTBEAT_FD

# In the order in which a rank goes through them; between steps `step` counts the steps completed.
PHASES = (
    *("", "joining", "build", "evaluation", "checkpoint", "profile", "loading"),
    *("data", "forward", "backward", "sync", "optimizer", "closing"),
)
IN_STEP = frozenset({"data", "forward", "backward", "sync", "optimizer"})
_AFTER_FORWARD = frozenset({"backward", "sync", "optimizer"})
_NUMBER = {phase: number for number, phase in enumerate(PHASES)}

# beats, step, collectives, phase, edge, idle, time of the change, and the longest of each SPAN so far in seconds
_RECORD = struct.Struct("<QqQHHHxxdddddd")
_COUNT = struct.Struct("<Q")
# A slot: the number of beats, which says which of two records is the newest; the other one is being written.
_RECORD_BYTES = 128
SLOT_BYTES = 3 * _RECORD_BYTES
# Beside the number of beats: where the device stood after so many of them, step and phase. Another thread writes it.
_DEVICE, _DEVICE_AT = struct.Struct("<QqH"), 64
_LOOK_SECONDS = 0.5
SPANS = ("edge", "step", "evaluation", "checkpoint", "closing")
Device = Callable[[], tuple[int, str] | None]  # steps that it is behind the host, and its phase; None where it is done
_READS = 8


@dataclass(frozen=True, slots=True)
class Beat:
    """What one rank has published.

    Attributes:
        beats: changes so far; 0 before the first.
        step: optimizer steps completed.
        phase: one of PHASES; empty before and after training.
        edge: inside a step that follows something else than a step: the first one, or one after an evaluation.
        collectives: entered by this rank before the change.
        since: `time.monotonic()` of the last change.
        longest: seconds of the longest finished edge, step, evaluation and so on; 0.0 before the first.
        idle: past the forward pass of this step without one: it has no sample in this batch.
        device: step and phase in which the device is at work, while the rank stands still; else None.
    """

    beats: int = 0
    step: int = 0
    phase: str = ""
    edge: bool = False
    collectives: int = 0
    since: float = 0.0
    longest: tuple[float, ...] = (0.0,) * len(SPANS)
    idle: bool = False
    device: tuple[int, str] | None = None

    @property
    def place(self) -> tuple[int, str]:
        """Step and phase of the rank: of its device, which the host runs ahead of, where that is known."""
        return self.device or (self.step, self.phase)


def where(step: int | None, phase: str) -> str:
    """Where a rank was that had done `step` steps: `step 8` in its eighth one, `after step 7` where it was in none."""
    if step is None or (phase not in IN_STEP and not step):
        return ""
    return f"step {step + 1}" if phase in IN_STEP else f"after step {step}"


class Board:
    """The launcher's end: one slot a rank."""

    def __init__(self, world_size: int) -> None:
        """Raises OSError where the system has no memory left for it."""
        self.fd = _nameless_file()
        try:
            os.ftruncate(self.fd, world_size * SLOT_BYTES)
            self._memory = mmap.mmap(self.fd, world_size * SLOT_BYTES)
        except OSError:
            os.close(self.fd)
            raise

    def read(self, rank: int) -> Beat:
        """The newest beat of a rank; nobody locks, so it is read again where the rank went on meanwhile."""
        count, raw = self._copy(rank)
        for _ in range(_READS):
            before = count
            count, again = self._copy(rank)
            if count == before:
                break
            raw = again
        beats, step, collectives, phase, edge, idle, since, *longest = raw
        at, *place = _DEVICE.unpack_from(self._memory, rank * SLOT_BYTES + _DEVICE_AT)
        device = (place[0], _name(place[1])) if beats and at == beats else None
        return Beat(beats, step, _name(phase), bool(edge), collectives, since, tuple(longest), bool(idle), device)

    def _copy(self, rank: int) -> tuple[int, tuple[Any, ...]]:
        begin = rank * SLOT_BYTES
        (count,) = _COUNT.unpack_from(self._memory, begin)
        return count, _RECORD.unpack_from(self._memory, _newest(begin, count))

    def clear(self) -> None:
        """Forget what ranks wrote that are gone."""
        self._memory[:] = bytes(len(self._memory))

    def close(self) -> None:
        """Let go of the memory; that of the ranks stays until they end."""
        self._memory.close()
        os.close(self.fd)


def _name(phase: int) -> str:
    return PHASES[phase] if phase < len(PHASES) else ""


def _newest(begin: int, count: int) -> int:
    return begin + _RECORD_BYTES * (1 + count % 2)


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("samestep-heartbeat", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Pulse(Protocol):
    """What a worker tells."""

    def count_by(self, collectives: Callable[[], int]) -> None:
        """From now on this gives the number of collectives that the rank has entered."""

    def follow(self, device: Device) -> None:
        """From now on `device` is asked, on a thread of its own, where the rank stands still."""

    def at(self, step: int, phase: str) -> None:
        """Something begins: a step, an evaluation, a checkpoint."""

    def enter(self, phase: str) -> None:
        """A phase inside a step begins."""


class NoPulse:
    """Nobody listens: the launcher is not ours."""

    def count_by(self, collectives: Callable[[], int]) -> None:
        """Nothing."""

    def follow(self, device: Device) -> None:
        """Nothing."""

    def at(self, step: int, phase: str) -> None:
        """Nothing."""

    def enter(self, phase: str) -> None:
        """Nothing."""


class Heartbeat:
    """A worker's end: its own slot."""

    def __init__(self, memory: mmap.mmap, rank: int, now: Callable[[], float] = time.monotonic) -> None:
        self._memory = memory
        self._offset = rank * SLOT_BYTES
        self._now = now
        self._beats = int(_COUNT.unpack_from(memory, self._offset)[0])  # of an earlier run in this process
        self._step, self._edge, self._worked, self._left = 0, False, False, False
        self._span, self._begun = "", now()
        self._longest = [0.0] * len(SPANS)
        self._collectives: Callable[[], int] = int

    def count_by(self, collectives: Callable[[], int]) -> None:
        """From now on this gives the number of collectives that the rank has entered."""
        self._collectives = collectives

    def follow(self, device: Device) -> None:
        """See Pulse; until the rank has left training."""
        threading.Thread(target=self._look_after, args=(device,), name="device", daemon=True).start()

    def _look_after(self, device: Device) -> None:
        seen = self._beats
        while not self._left:
            time.sleep(_LOOK_SECONDS)
            if self._beats == seen and (found := device()) is not None:
                behind, phase = found
                _DEVICE.pack_into(
                    self._memory, self._offset + _DEVICE_AT, seen, self._step - behind, _NUMBER.get(phase, 0)
                )
            seen = self._beats

    def at(self, step: int, phase: str) -> None:
        """Something begins; the time of what ends is kept if it is the longest of its kind."""
        moment = self._now()
        if self._span in SPANS:
            kind = SPANS.index(self._span)
            self._longest[kind] = max(self._longest[kind], moment - self._begun)
        in_step = phase == "step"
        self._edge = in_step and self._span not in ("edge", "step")
        self._span, self._begun = ("edge" if self._edge else phase), moment
        self._step, self._worked, self._left = step, False, not phase
        self._write("data" if in_step else phase, moment)

    def enter(self, phase: str) -> None:
        """A phase inside a step begins."""
        self._worked = self._worked or phase == "forward"
        self._write(phase, self._now())

    def _write(self, phase: str, moment: float) -> None:
        self._beats += 1
        idle = not self._worked and phase in _AFTER_FORWARD
        where = (self._beats, self._step, self._collectives(), _NUMBER[phase], self._edge, idle, moment)
        _RECORD.pack_into(self._memory, _newest(self._offset, self._beats), *where, *self._longest)
        # one store of 8 bytes: pack_into would write zeros first
        self._memory[self._offset : self._offset + _COUNT.size] = self._beats.to_bytes(_COUNT.size, "little")


def pulse(environ: Mapping[str, str], rank: int) -> Pulse:
    """This rank's heartbeat, or the null object where no launcher of ours has handed the memory down."""
    text = environ.get(ENV_HEARTBEAT_FD, "")
    if not text.isdecimal():
        return NoPulse()
    try:
        os.set_inheritable(int(text), False)  # what the rank starts has no business there
        return Heartbeat(mmap.mmap(int(text), 0), rank)
    except (OSError, ValueError, struct.error):  # inherited the name without the descriptor: not a rank of ours
        return NoPulse()
