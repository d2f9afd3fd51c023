"""What supervision sees of the other machines of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Halt:
    """The ranks of another machine have ended, or will: ours get SIGTERM in `wait` seconds, SIGKILL `grace` later."""

    wait: float
    grace: float


class Peers(Protocol):
    """The launchers of other machines."""

    def fileno(self) -> int:
        """Readable when one has said something."""

    def read(self) -> Sequence[Halt]:
        """What that means here."""
