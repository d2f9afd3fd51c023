"""The only loop: events in, decisions out. Runs one generation of ranks from start to last exit."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from samestep.launcher import memory_signs, temporary
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import RunDir
from samestep.launcher.liveness import adopt_orphans
from samestep.launcher.memory_signs import NOTHING_COUNTED
from samestep.launcher.plan import Command
from samestep.launcher.supervise import policy, process
from samestep.launcher.supervise.console import Console
from samestep.launcher.supervise.events import Due, Event, EventSource, Exited, Output, ServerSpoke, Signalled, Stream
from samestep.launcher.supervise.fork_server import ForkServer, NoForkError
from samestep.launcher.supervise.hang_watch import TICK_SECONDS, Watch
from samestep.launcher.supervise.logs import RankLog, routes
from samestep.launcher.supervise.outcome import Generation, Hang, RankEnd
from samestep.launcher.supervise.policy import Patience
from samestep.launcher.supervise.process import Program, Worker
from samestep.launcher.supervise.progress import REFRESH_SECONDS, Progress
from samestep.launcher.supervise.signals import SignalSocket

_DRAIN_READS = 1024  # a pipe holds far less, unless somebody who outlives the rank goes on writing
_ABANDON_SECONDS = 10.0  # after SIGKILL, only a process stuck in the kernel is still there


class Supervisor:
    """Owns the processes of the current generation; usable for several generations one after another."""

    def __init__(
        self,
        config: LaunchConfig,
        run_dir: RunDir,
        console: Console,
        signals: SignalSocket,
        watch: Watch,
        grace: float,
        *,
        saves: bool,
    ) -> None:
        self._config = config
        self._grace, self._saves = grace, saves
        self._watch = watch
        self._hang: Hang | None = None
        self._console = console
        self._progress = Progress(run_dir) if console.has_bar and not config.quiet else None
        self._source = EventSource(signals)
        self._workers: dict[int, Worker] = {}
        self._logs: dict[int, RankLog] = {}
        self._pipes: dict[tuple[int, Stream], int] = {}
        self._ends: list[RankEnd] = []
        self._failed = False
        self._is_victim: Callable[[RankEnd], bool]
        self._stopped_by: int | None = None
        self._signum: int | None = None
        self._presses = 0
        self._patience = Patience(0.0, 0.0)
        self._memory = NOTHING_COUNTED
        self._liveness, self._life = os.pipe()  # the kernel closes the second one with us: ranks die then
        self._adopts = adopt_orphans()
        self._server: ForkServer | None = None
        self._waiting: Callable[[], None] | None = None  # starts the ranks, once the fork server is ready

    def run(
        self,
        generation: int,
        commands: Sequence[Command],
        environ: Mapping[str, str],
        *,
        started: Callable[[], None],
        is_victim: Callable[[RankEnd], bool],
    ) -> Generation:
        """Start the ranks, call `started`, and return when none of them lives, whatever happens.

        `is_victim` judges the first rank that fails: did it end because of another one?

        Raises:
            OSError: a rank or its log file can't be started.
        """
        self._ends, self._failed, self._is_victim, self._hang = [], False, is_victim, None
        self._watch.clear()
        self._memory = memory_signs.read()
        try:
            self._waiting = lambda: self._start_all(generation, commands, environ, started)
            if self._server is None or self._server.is_ready or not all(command.recipe for command in commands):
                self._begin()
            else:
                self._source.watch_server(self._server.fileno())
            while self._waiting is not None or self._running():
                for event in self._source.wait():
                    self._handle(event)
        finally:
            self._leave_nothing()
        stopped = self._stopped_by, self._signum, self._presses > 1
        return Generation(generation, tuple(self._ends), *stopped, self._hang, self._memory)

    def pause(self, seconds: float) -> int | None:
        """Let time pass; the signal if the operator asked to stop meanwhile."""
        self._source.start_timer("pause", seconds)
        while True:
            for event in self._source.wait():
                if event == Due("pause"):
                    return None
                if isinstance(event, Signalled):
                    return event.signum

    def prepare_forks(self, python: str, environ: Mapping[str, str]) -> None:
        """Start a fork server, or another one if it has ended; until it is ready, forked ranks wait."""
        if not self._adopts or (self._server is not None and self._server.is_ready):
            return
        if self._server is not None:
            self._server.close()
        self._server = ForkServer(python, environ, self._liveness)

    def close(self) -> None:
        """Release what the last generation used."""
        if self._server is not None:
            self._server.close()
        self._source.close()
        os.close(self._liveness)
        os.close(self._life)

    def _server_spoke(self) -> None:
        assert self._server is not None
        self._source.forget(self._server.fileno())
        self._server.greet()  # where it has ended, ranks are programs of their own and tell why it could not live
        self._begin()

    def _begin(self) -> None:
        start, self._waiting = self._waiting, None
        if start is not None:
            start()

    def _start_all(
        self, generation: int, commands: Sequence[Command], environ: Mapping[str, str], started: Callable[[], None]
    ) -> None:
        for command in commands:
            self._start(generation, command, environ)
        started()
        if self._progress:
            self._source.start_timer("progress", REFRESH_SECONDS)
        if self._watch.begin(generation, {rank: worker.pid for rank, worker in self._workers.items()}):
            self._source.start_timer("watch", TICK_SECONDS)

    def _new_worker(self, command: Command, environ: Mapping[str, str]) -> Worker:
        if command.recipe is not None and self._server is not None and self._server.is_ready:
            try:
                return self._server.fork(command, environ)
            except NoForkError as error:
                if command.rank == 0 and not self._config.quiet:
                    self._console.say(f"samestep: ranks are not forked, which only starts slower: {error}")
        return Program(command, environ, self._liveness)

    def _start(self, generation: int, command: Command, environ: Mapping[str, str]) -> None:
        worker = self._new_worker(command, environ)
        rank = command.rank
        self._workers[rank] = worker
        self._source.watch_exit(rank, worker.pid)
        self._logs[rank] = RankLog(rank, command.log, routes(self._config, command.local_rank), self._console)
        pipes: dict[Stream, int] = {"stdout": worker.stdout, "stderr": worker.stderr}
        for stream, fd in pipes.items():
            self._pipes[rank, stream] = fd
            self._source.watch_output(rank, stream, fd)
        self._logs[rank].open(generation, worker.pid)

    def _running(self) -> list[Worker]:
        return [worker for worker in self._workers.values() if worker.returncode is None]

    def _handle(self, event: Event) -> None:
        match event:
            case Output(rank, stream, data):
                self._output(rank, stream, data)
            case Exited(rank):
                self._exited(rank)
            case ServerSpoke():
                self._server_spoke()
            case Signalled(signum):
                self._operator(signum)
            case Due("terminate"):
                self._terminate()
            case Due("kill"):
                self._kill()
            case Due("progress"):
                self._show_progress()
            case Due("watch"):
                self._look_for_hangs()
            case Due("abandon"):
                pids = ", ".join(str(worker.pid) for worker in self._running())
                raise TimeoutError(f"processes {pids} survive SIGKILL: they are stuck in the kernel")

    def _exited(self, rank: int) -> None:
        worker = self._workers[rank]
        if worker.returncode is not None or not worker.collect():
            return
        self._source.forget_exit(rank)
        self._drain(rank)
        log, code = self._logs[rank], worker.returncode or 0  # type: ignore[redundant-expr]  # collect() has set it
        said = log.tail("stdout"), log.tail("stderr")
        end = RankEnd(rank, worker.pid, code, worker.signalled, worker.ended_ns, *said, worker.peak_bytes)
        self._ends.append(end)
        if code != 0 and not self._failed and self._stopped_by is None:
            self._failed = True
            self._memory = memory_signs.read().since(self._memory)
            self._end_all(policy.after_exit(code, is_victim=self._is_victim(end)))
        elif self._saves and self._presses == 1 and code not in (0, *policy.PREEMPTED):
            self._end_all(policy.WHILE_STOPPING)

    def _look_for_hangs(self) -> None:
        if self._failed or self._stopped_by is not None:
            return
        self._hang = self._watch.tick()
        if self._hang is None:
            self._source.start_timer("watch", TICK_SECONDS)
            return
        self._failed = True
        self._end_all(policy.after_hang())

    def _operator(self, signum: int) -> None:
        self._presses, self._signum = self._presses + 1, signum
        if self._waiting is not None and self._server is not None:
            self._waiting = None  # no rank has been started: none will be
            self._source.forget(self._server.fileno())
        if self._stopped_by is None and not self._failed:
            self._stopped_by = signum
        if self._presses == 1 and not self._config.quiet:
            doing = "finishing the step and saving" if self._saves else "stopping all ranks"
            self._console.say(f"samestep: {doing} (once more: at once)")
        self._end_all(policy.after_signal(self._presses, self._grace))

    def _end_all(self, patience: Patience) -> None:
        self._patience = patience
        self._source.start_timer("terminate", patience.wait)

    def _terminate(self) -> None:
        if self._patience.grace == 0:
            self._kill()
            return
        for worker in self._running():
            worker.terminate()
        self._source.start_timer("kill", self._patience.grace)

    def _kill(self) -> None:
        for worker in self._running():
            worker.kill()
        self._source.start_timer("abandon", _ABANDON_SECONDS)

    def _output(self, rank: int, stream: Stream, data: bytes) -> None:
        if data:
            self._logs[rank].feed(stream, data)
        else:
            self._close_pipe(rank, stream)

    def _drain(self, rank: int) -> None:
        """Read what an ended rank has left; a process that outlives it may still hold the other end."""
        for stream in ("stdout", "stderr"):
            for _ in range(_DRAIN_READS):
                fd = self._pipes.get((rank, stream))
                if fd is None:
                    break
                try:
                    self._output(rank, stream, os.read(fd, 1 << 16))
                except BlockingIOError:
                    break

    def _close_pipe(self, rank: int, stream: Stream) -> None:
        fd = self._pipes.pop((rank, stream), None)
        if fd is not None:
            self._source.forget(fd)
            os.close(fd)

    def _show_progress(self) -> None:
        assert self._progress is not None
        self._console.show_bar(self._progress.update())
        self._source.start_timer("progress", REFRESH_SECONDS)

    def _leave_nothing(self) -> None:
        """After this no process, descriptor or timer of the generation is left, also if we fail ourselves."""
        undisturbed = all(worker.returncode == 0 for worker in self._workers.values())
        self._waiting = None
        self._console.show_bar(())
        for timer in ("terminate", "kill", "abandon", "progress", "watch"):
            self._source.stop_timer(timer)
        for rank, worker in self._workers.items():
            worker.kill()
            self._source.forget_exit(rank)
        if undisturbed:
            process.reap_adopted()  # a service that detached itself from a successful rank is none of our business
        else:
            process.sweep(keep=self._server.pid if self._server else None)
        for rank, log in self._logs.items():
            self._drain(rank)
            for stream in ("stdout", "stderr"):
                self._close_pipe(rank, stream)
            log.close()
        temporary.sweep()
        self._workers, self._logs = {}, {}
