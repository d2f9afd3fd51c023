"""How ranks come to life: forked by a process that has imported torch, or as programs of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import TracebackType

from samestep.launcher.liveness import adopt_orphans
from samestep.launcher.plan import Command
from samestep.launcher.supervise import process
from samestep.launcher.supervise.fork_server import ForkServer, NoForkError
from samestep.launcher.supervise.process import Program, Worker


class Starter:
    """Owns the pipe that ranks live by, and their fork server; usable for several generations one after another."""

    def __init__(self) -> None:
        self._liveness, self._life = os.pipe()  # the kernel closes the second one with us: ranks die then
        self._adopts, self._inherited = adopt_orphans(), process.below_us()
        self.server: ForkServer | None = None

    def __enter__(self) -> Starter:
        """Nothing is started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the fork server; ranks that are left end with it, and with the pipe."""
        if self.server is not None:
            self.server.close()
        os.close(self._liveness)
        os.close(self._life)

    def prepare_forks(self, python: str, environ: Mapping[str, str]) -> None:
        """Start a fork server, or another one if it has ended; until it is ready, ranks that it is to fork wait."""
        if not self._adopts or (self.server is not None and self.server.lives):
            return
        if self.server is not None:
            self.server.close()
        self.server = ForkServer(python, environ, self._liveness)

    def start(self, command: Command, environ: Mapping[str, str], complain: Callable[[str], None]) -> Worker:
        """Start a rank; `complain` is told why it is a program where it was to be forked.

        Raises:
            OSError: the program can't be executed.
        """
        if command.recipe is not None and self.server is not None and self.server.is_ready:
            try:
                return self.server.fork(command, environ)
            except NoForkError as error:
                complain(f"ranks are not forked, which only starts slower: {error}")
        return Program(command, environ, self._liveness)

    def sweep(self) -> None:
        """Kill whatever ranks have left below us."""
        process.sweep(keep=self.server.pid if self.server else None, inherited=self._inherited)
