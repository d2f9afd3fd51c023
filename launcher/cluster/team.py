"""What launching asks of the other machines, and the null object of a run that has none."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Protocol

from samestep.launcher import meeting
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import ExitCode
from samestep.launcher.diagnosis.diagnose import Failure
from samestep.launcher.plan import Facts, Meeting
from samestep.launcher.supervise.outcome import Generation


class NotStartedError(Exception):
    """No generation can be started; the text is for people, `exit_code` ends the run."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Assembled:
    """Who takes part in a generation, and where its ranks meet. The caller closes `store`."""

    facts: Facts
    place: Meeting
    store: socket.socket


class Team(Protocol):
    """The machines of a run, as the launcher that decides sees them."""

    def assemble(self, facts: Facts) -> Assembled:
        """Wait until there are enough machines, and tell each its ranks.

        Raises:
            NotStartedError: there are not.
        """

    def failed(self, exit_code: int, *, is_victim: bool) -> None:
        """A rank of this machine has ended first: the others are to end too."""

    def finish(self, generation: Generation) -> Generation:
        """Add how the ranks of other machines ended; waits for them."""

    def missing(self) -> Failure | None:
        """A machine that was lost in the generation that has just ended."""

    def reshaped(self) -> str:
        """Why the generation ended without a failure, empty if it did not: machines came or left in order."""

    def stop(self, exit_code: int) -> None:
        """The run is over."""


@dataclass(frozen=True, slots=True)
class Alone:
    """One machine."""

    config: LaunchConfig

    def assemble(self, facts: Facts) -> Assembled:
        """Fresh ports on loopback."""
        place, store = meeting.open_store(self.config.master_addr or meeting.LOOPBACK, self.config.master_port)
        return Assembled(facts, place, store)

    def failed(self, exit_code: int, *, is_victim: bool) -> None:
        """Nobody to tell."""

    def finish(self, generation: Generation) -> Generation:
        """Nothing to add."""
        return generation

    def missing(self) -> Failure | None:
        """No other machine."""
        return None

    def reshaped(self) -> str:
        """Never."""
        return ""

    def stop(self, exit_code: int) -> None:
        """Nobody to tell."""
