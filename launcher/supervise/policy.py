"""Pure: how long the others may live once one rank has ended, and whether a failed run starts again."""

from __future__ import annotations

import builtins
import re
import signal
from collections.abc import Collection
from dataclasses import dataclass, replace

from samestep.launcher.contract import DEFAULT_GRACE_SECONDS, ExitCode

# A rank that leaves with one of these did so on purpose; the launcher hands them on and never starts again.
ORDERLY = frozenset(
    {
        ExitCode.USAGE,
        ExitCode.PREEMPTED_SAVED,
        ExitCode.PREEMPTED_KEPT,
        ExitCode.NO_PROGRESS,
        ExitCode.NO_CHECKPOINT,
    }
)
PREEMPTED = frozenset({ExitCode.PREEMPTED_SAVED, ExitCode.PREEMPTED_KEPT})
_IN_TABLE = ORDERLY | {ExitCode.BUG}

OPERATOR_GRACE = 5.0  # of a script that may not save anything

_NEVER_BEGAN = frozenset({-signal.SIGTERM, 128 + signal.SIGTERM})  # a rank takes SIGTERM as a request once it trains


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds until the remaining ranks are asked to end, and from there to SIGKILL."""

    wait: float
    grace: float


def meant(code: int, *, ours: bool) -> int:
    """What a rank's status means: in a program that does not train with us, our numbers are failures like any other."""
    return ExitCode.FAILED if not ours and code in _IN_TABLE else code


def after_exit(code: int, *, is_victim: bool = False, resumes: bool = False, saving: bool = False) -> Patience:
    """What the others get once a rank has ended with `code`, not zero.

    After a failure they sit in a collective that can't end, in C++, where no Python handler runs: waiting is useless.
    After an orderly exit they are about to leave by themselves, and rank zero has the message to print. After the
    death of a victim the culprit is among them, and may need a moment to say what happened.

    Args:
        code: status of the rank.
        is_victim: it ended because of another one.
        resumes: the ranks run a recipe of ours, for which SIGTERM is a request that is heard between two steps, and
            which goes on from its last checkpoint: it is ended by force.
        saving: one of the others is about to save its state.
    """
    if code in PREEMPTED:
        return Patience(wait=30.0, grace=0.5)
    if code in ORDERLY:
        return Patience(wait=2.0, grace=0.5)
    if is_victim:
        return Patience(wait=0.5, grace=0.5)
    return Patience(wait=0.0, grace=0.0 if resumes and not saving else 0.5)


def after_hang() -> Patience:
    """What all ranks get: the one that hangs listens to nothing, and the others wait for it."""
    return Patience(wait=0.0, grace=0.0)


def grace(grace_seconds: float | None, shutdown_timeout: float | None, *, saves: bool) -> float:
    """Seconds between the first request to stop and the end by force; torchrun's name for it is --shutdown-timeout."""
    default = DEFAULT_GRACE_SECONDS if saves else OPERATOR_GRACE
    return next((given for given in (grace_seconds, shutdown_timeout) if given is not None), default)


# A rank has died while all were to finish their step: nothing more can be saved than what is being written already.
WHILE_STOPPING = Patience(wait=2.0, grace=0.5)


def after_signal(presses: int, grace: float) -> Patience:
    """What all ranks get when the operator has asked `presses` times."""
    return Patience(wait=0.0, grace=0.0 if presses > 1 else grace)


def request_to_end(signum: int | None, *, saves: bool) -> signal.Signals:
    """The signal by which ranks are asked to end, once the operator sent `signum` or a rank has failed (None).

    Ctrl-C is passed on to scripts that don't train with us, as torchrun does: many catch it, to save or to go on.
    """
    return signal.SIGINT if signum == signal.SIGINT and not saves else signal.SIGTERM


def after_stop(
    signum: int, codes: Collection[int], *, forced: bool, saves: bool, committed: bool, trained: bool = False
) -> ExitCode:
    """Exit status of a run that the operator stopped.

    Args:
        signum: the operator's signal, the last one if there were several.
        codes: statuses of the ranks, in any order; none where no rank had been started.
        forced: the operator asked again, and the ranks were killed.
        saves: the ranks run a recipe of ours.
        committed: it has a checkpoint.
        trained: ranks had completed a step, of this start or an earlier one of this launch.
    """
    without_saving = ExitCode.INTERRUPTED if signum == signal.SIGINT else ExitCode.TERMINATED
    spoken = PREEMPTED & set(codes)
    if forced:
        return without_saving
    if spoken and (spoken == set(codes) or committed):  # all ranks know that it was saved before one says so
        return ExitCode(max(spoken))
    if saves and codes and not any(codes):
        return ExitCode.DONE  # it came to its end meanwhile
    began = trained or not _NEVER_BEGAN.issuperset(codes)
    if not began and signum == signal.SIGINT:
        return without_saving  # a person changed their mind; a scheduler that preempts a start wants it again
    return ExitCode.PREEMPTED_KEPT if saves and committed else without_saving


@dataclass(frozen=True, slots=True)
class Stop:
    """The run is over."""

    exit_code: int


@dataclass(frozen=True, slots=True)
class Restart:
    """All ranks start again, in the next generation."""

    delay: float = 0.0  # seconds


_LONGEST_DELAY = 30.0
_NEVER_IMPORTED = re.compile(r"\b(ModuleNotFoundError|ImportError|SyntaxError|IndentationError|TabError)\b")
# What CUDA and its driver say of a device that will not come back before somebody resets it.
_DEVICE_GONE = re.compile(
    r"unspecified launch failure|uncorrectable (NVLink|ECC) error|no CUDA-capable device|invalid device ordinal"
    r"|CUDA error: (device not ready|unknown error|hardware stack error)|GPU (is lost|has fallen off the bus)"
    r"|CUDA_ERROR_(ECC_UNCORRECTABLE|DEVICE_UNAVAILABLE|LAUNCH_FAILED)"
    r"|devices?(\(s\))? (is/are|is|are) busy or unavailable",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Memory:
    """What earlier generations of this launch came to.

    Attributes:
        committed: steps of the newest checkpoint when the last generation ended, -1 without any.
        fruitless: restarts since that number last grew.
        signature: what the last failure was, None where that tells nothing about the next one.
        repeated: the last failure was the same as the one before it, and nothing was committed in between.
    """

    committed: int = -1
    fruitless: int = 0
    signature: tuple[object, ...] | None = None
    repeated: bool = False

    def after(self, committed: int, signature: tuple[object, ...] | None) -> Memory:
        """A generation has failed."""
        if committed > self.committed:
            return Memory(committed, 0, signature)
        return Memory(committed, self.fruitless, signature, signature is not None and signature == self.signature)

    def restarted(self, *, remedied: bool = False) -> Memory:
        """Another generation is started; one that will not fail in the same way is no try in vain."""
        return self if remedied else replace(self, fruitless=self.fruitless + 1)


def signature(
    *, rank: int, cause: str, frame: str, step: int | None, recorded: bool = False
) -> tuple[object, ...] | None:
    """What makes two failures the same: an exception or crash at one place. A kill from outside has no place.

    An exception that the rank has `recorded`, but which passed no line of the user's, is known by its message; the
    machine's troubles among those may pass.
    """
    kind = cause.partition(":")[0]
    if frame:
        return rank, kind, frame, step
    known = getattr(builtins, kind, None)
    passing = isinstance(known, type) and issubclass(known, OSError | MemoryError)
    passing = passing or _DEVICE_GONE.search(cause) is not None  # another machine may have one
    return (rank, cause, frame, step) if recorded and not passing else None


def never_began(cause: str, phase: str) -> bool:
    """Whether the code could not even be imported: it can't the next time either."""
    return phase in ("", "joining", "build") and _NEVER_IMPORTED.search(cause) is not None


def fewer_ranks(world_size: int, min_ranks: int | None, cause: str) -> int:
    """Ranks of the next start: one fewer where a device is gone for good and the operator allows it."""
    if min_ranks is None or world_size <= min_ranks or not _DEVICE_GONE.search(cause):
        return world_size
    return world_size - 1


def devices_left(visible: str, world_size: int, local_rank: int) -> str:
    """CUDA_VISIBLE_DEVICES without the device of a local rank; `visible` is empty where all are."""
    entries = [entry.strip() for entry in visible.split(",") if entry.strip()] or [str(n) for n in range(world_size)]
    return ",".join(entry for number, entry in enumerate(entries) if number != local_rank)


def restarts_left(max_restarts: int, memory: Memory, *, final: bool, remedied: bool) -> int:
    """How many starts are still allowed after a failure that is `final`, or the reason of which is out of the way."""
    if final:
        return 0
    left = max_restarts - memory.fruitless
    return max(left, min(1, max_restarts)) if remedied else left


def decide(
    *,
    failure_code: int | None,
    stopped: ExitCode | None = None,
    restarts_left: int,
    fruitless: int = 0,
    repeated: bool = False,
) -> Stop | Restart:
    """What follows the end of a generation.

    Args:
        failure_code: exit status of the culprit (negative for a signal), None if no rank failed.
        stopped: what it comes to because the operator asked to stop, None if nobody did.
        restarts_left: how many starts are still allowed.
        fruitless: restarts since the last progress, which make the next one wait.
        repeated: the failure is the one before it once more, and nothing was committed in between.
    """
    if stopped is not None and (failure_code is None or failure_code not in ORDERLY):
        return Stop(stopped)
    if failure_code is None:
        return Stop(ExitCode.DONE)
    if repeated or failure_code in ORDERLY:
        return Stop(failure_code if failure_code in ORDERLY else ExitCode.NO_PROGRESS)
    if restarts_left > 0:
        return Restart(min(_LONGEST_DELAY, 2.0 ** (fruitless - 1)) if fruitless else 0.0)
    return Stop(ExitCode.BUG if failure_code == ExitCode.BUG else ExitCode.FAILED)
