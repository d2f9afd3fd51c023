"""Pure: every kind of fault, and the moments at which one strikes."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum


class Aim(Enum):
    """Whom a fault hits."""

    RANK = "one rank"
    ALL_RANKS = "all ranks at once"
    LOADER = "a data loading process of a rank"
    SERVER = "the fork server"
    LAUNCHER = "the launcher"
    FILES = "files of the run, while it is down"


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to do harm.

    Attributes:
        name: as on the command line.
        aim: whom it hits.
        signum: what is sent, if it is a signal.
        resumed_after: seconds after which a stopped process goes on, or a limit is lifted; None: never.
    """

    name: str
    aim: Aim
    signum: int = 0
    resumed_after: float | None = None

    @property
    def needs_two_checkpoints(self) -> bool:
        """It damages the newest one, so another has to be there."""
        return self.aim is Aim.FILES and self.name.startswith("checkpoint")

    @property
    def hits_from_the_start(self) -> bool:
        """What it hits is there before the first step."""
        return not self.needs_two_checkpoints and self.aim is not Aim.LOADER


_TO_A_RANK = (
    *("KILL", "TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "ALRM"),
    *("SEGV", "ABRT", "BUS", "ILL", "FPE", "SYS", "TRAP", "XCPU"),
)
KINDS: tuple[Kind, ...] = (
    *(Kind(f"rank-{name.lower()}", Aim.RANK, getattr(signal, f"SIG{name}")) for name in _TO_A_RANK),
    Kind("rank-pause", Aim.RANK, signal.SIGSTOP, resumed_after=0.5),
    Kind("rank-stop", Aim.RANK, signal.SIGSTOP),
    Kind("rank-no-disk", Aim.RANK, resumed_after=1.0),
    Kind("rank-no-descriptors", Aim.RANK, resumed_after=0.5),
    Kind("all-kill", Aim.ALL_RANKS, signal.SIGKILL),
    Kind("all-term", Aim.ALL_RANKS, signal.SIGTERM),
    Kind("loader-kill", Aim.LOADER, signal.SIGKILL),
    Kind("loader-segv", Aim.LOADER, signal.SIGSEGV),
    Kind("server-kill", Aim.SERVER, signal.SIGKILL),
    Kind("launcher-kill", Aim.LAUNCHER, signal.SIGKILL),
    Kind("launcher-term", Aim.LAUNCHER, signal.SIGTERM),
    Kind("launcher-int", Aim.LAUNCHER, signal.SIGINT),
    Kind("checkpoint-flip", Aim.FILES),
    Kind("checkpoint-truncate", Aim.FILES),
    Kind("checkpoint-lose-file", Aim.FILES),
    Kind("unfinished-save", Aim.FILES),
    Kind("torn-events", Aim.FILES),
    Kind("lost-errors", Aim.FILES),
)
BY_NAME = {kind.name: kind for kind in KINDS}


class Moment(Enum):
    """When a fault strikes, by the run's own progress."""

    JOINING = "joining"
    FIRST_STEP = "first step"
    MID_EPOCH = "mid-epoch"
    EPOCH_EDGE = "epoch edge"
    IN_SAVE = "in save"
    LAST_STEP = "last step"
