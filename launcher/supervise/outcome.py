"""Facts about ranks that have ended."""

from __future__ import annotations

from dataclasses import dataclass

from samestep.launcher.diagnosis.memory_signs import NOTHING_COUNTED, MemorySigns


@dataclass(frozen=True, slots=True)
class RankEnd:
    """How one rank ended. `signalled`: we had asked it to, so its status tells nothing about the cause."""

    rank: int
    pid: int
    returncode: int
    signalled: bool
    ended_ns: int
    stdout: tuple[str, ...] = ()
    stderr: tuple[str, ...] = ()
    peak_bytes: int = 0  # most memory that it, or a process it waited for, ever held
    step: int | None = None  # optimizer steps completed when it last said so; None if it never did
    phase: str = ""  # what it said that it was in


@dataclass(frozen=True, slots=True)
class Hang:
    """A rank that the others wait for, in vain."""

    rank: int
    step: int  # optimizer steps completed
    phase: str
    seconds: float  # since its last sign of life
    usual: float = 0.0  # seconds of the longest such phase, or step, before; 0.0 where nothing is known
    frame: str = ""  # of the user where there is one
    how: str = ""  # what it does meanwhile, where that can be told
    stacks: str = ""  # file


@dataclass(frozen=True, slots=True)
class Generation:
    """What is known once all ranks have ended, in the order of their deaths."""

    number: int
    ends: tuple[RankEnd, ...]
    stopped_by: int | None = None  # the operator's signal, if it came before any failure
    signum: int | None = None  # the operator's last signal, whenever it came: nothing is started any more
    forced: bool = False  # the operator asked again
    hang: Hang | None = None  # why we ended the ranks
    memory: MemorySigns = NOTHING_COUNTED  # when the first rank failed, with kills counted since the start
