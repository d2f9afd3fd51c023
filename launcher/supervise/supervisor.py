"""The only loop: events in, decisions out. Runs one generation of ranks from start to last exit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from samestep.launcher import temporary
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import RunDir
from samestep.launcher.diagnosis import memory_signs
from samestep.launcher.diagnosis.memory_signs import NOTHING_COUNTED
from samestep.launcher.plan import Command
from samestep.launcher.run_dir import holds_training
from samestep.launcher.supervise import policy, process
from samestep.launcher.supervise.console import Console
from samestep.launcher.supervise.events import Due, Event, EventSource, Exited, Output, ServerSpoke, Signalled
from samestep.launcher.supervise.hang_watch import TICK_SECONDS, Watch
from samestep.launcher.supervise.listening import Listening
from samestep.launcher.supervise.logs import RankLog, routes
from samestep.launcher.supervise.outcome import Generation, Hang, RankEnd
from samestep.launcher.supervise.peers import Halt, Peers
from samestep.launcher.supervise.policy import Patience
from samestep.launcher.supervise.process import Worker
from samestep.launcher.supervise.progress import REFRESH_SECONDS, Progress
from samestep.launcher.supervise.signals import SignalSocket
from samestep.launcher.supervise.starter import Starter

_ABANDON_SECONDS = 10.0  # after SIGKILL, only a process stuck in the kernel is still there


def _told_already(text: str) -> None:
    """What one rank tells is true of all of them."""


class Supervisor:
    """Owns the processes of the current generation; usable for several generations one after another."""

    def __init__(
        self,
        config: LaunchConfig,
        run_dir: RunDir,
        console: Console,
        signals: SignalSocket,
        watch: Watch,
        starter: Starter,
        grace: float,
        *,
        saves: bool,
    ) -> None:
        self._config, self._run_dir, self._console, self._watch = config, run_dir, console, watch
        self._starter = starter
        self._grace, self._saves = grace, saves
        self._hang: Hang | None = None
        self._progress = Progress(run_dir) if console.has_bar and not config.quiet and config.pdb is None else None
        self._source = EventSource(signals)
        self._workers: dict[int, Worker] = {}
        self._listening = Listening(self._source)
        self._ends: list[RankEnd] = []
        self._failed, self._presses = False, 0
        self._is_victim: Callable[[RankEnd], bool]
        self._stopped_by: int | None = None
        self._signum: int | None = None
        self._due: dict[str, Callable[[], None]] = {
            "terminate": self._terminate,
            "kill": self._kill,
            "abandon": self._abandon,
            "progress": self._show_progress,
            "watch": self._look_for_hangs,
            "server": partial(self._server_spoke, late=True),
        }
        self._memory, self._patience = NOTHING_COUNTED, Patience(0.0, 0.0)
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
            OSError: a rank can't be started.
            UsageError: its log can't be opened.
        """
        self._ends, self._failed, self._is_victim, self._hang = [], False, is_victim, None
        self._watch.clear()
        self._memory = memory_signs.read()
        try:
            start = partial(self._start_all, generation, commands, environ, started)
            server = self._starter.server
            if server is None or server.is_ready or not all(command.recipe for command in commands):
                start()
            else:
                self._waiting = start
                self._source.watch_server(server.fileno())
                self._source.start_timer("server", self._config.join_timeout)
            while self._waiting is not None or self._running():
                for event in self._source.wait():
                    self._handle(event)
        finally:
            self._leave_nothing()
        stopped = self._stopped_by, self._signum, self._presses > 1
        return Generation(generation, tuple(self._ends), *stopped, self._hang, self._memory)

    def pause(self, seconds: float, until: Callable[[], bool] = bool) -> int | None:
        """Let time pass, or what `until` says happen; the signal if the operator asked to stop meanwhile."""
        self._source.start_timer("pause", seconds)
        while not until():
            for event in self._source.wait():
                if event == Due("pause"):
                    return None
                if isinstance(event, Signalled):
                    return event.signum
        return None

    def attend(self, peers: Peers, interval: float) -> None:
        """Listen to the launchers of other machines, from now on and in every generation."""
        self._source.watch_peers(peers, interval)

    def close(self) -> None:
        """Release what the last generation used."""
        self._source.close()

    def _await_no_more(self) -> Callable[[], None] | None:
        """What was to follow once the fork server is ready; None where that was not waited for, or no more."""
        start, self._waiting = self._waiting, None
        if start is not None and self._starter.server is not None:
            self._source.forget(self._starter.server.fileno())
        return start

    def _server_spoke(self, *, late: bool = False) -> None:
        start, server = self._await_no_more(), self._starter.server
        if start is None or server is None:
            return
        if late:
            server.close()
            self._console.say("samestep: ranks are not forked, which only starts slower: their server is not ready")
        else:
            server.greet()  # where it has ended, ranks are programs of their own and tell why it could not live
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

    def _start(self, generation: int, command: Command, environ: Mapping[str, str]) -> None:
        rank = command.rank
        worker = self._starter.start(command, environ, self._complain if rank == 0 else _told_already)
        self._workers[rank] = worker
        self._source.watch_exit(rank, worker.pid)
        log = RankLog(rank, command.log, routes(self._config, command.local_rank), self._console)
        self._listening.begin(generation, worker, log)

    def _complain(self, text: str) -> None:
        if not self._config.quiet:
            self._console.say(f"samestep: {text}")

    def _running(self) -> list[Worker]:
        return [worker for worker in self._workers.values() if worker.returncode is None]

    def _handle(self, event: Event) -> None:
        match event:
            case Output(rank, stream, data):
                self._listening.take(rank, stream, data)
            case Exited(rank):
                self._exited(rank)
            case ServerSpoke():
                self._server_spoke()
            case Signalled(signum):
                self._operator(signum)
            case Halt(wait, grace):
                self._halt(Patience(wait, grace))
            case Due(timer) if timer in self._due:
                self._due[timer]()

    def _abandon(self) -> None:
        pids = ", ".join(str(worker.pid) for worker in self._running())
        raise TimeoutError(f"processes {pids} survive SIGKILL: they are stuck in the kernel")

    def _exited(self, rank: int) -> None:
        worker = self._workers[rank]
        if worker.returncode is not None or not worker.collect():
            return
        self._source.forget_exit(rank)
        said, beat = self._listening.last_words(rank), self._watch.beat(rank)
        code = worker.returncode or 0  # type: ignore[redundant-expr]  # collect() has set it
        place = beat.step if beat.beats else None, beat.phase
        end = RankEnd(rank, worker.pid, code, worker.signalled, worker.ended_ns, *said, worker.peak_bytes, *place)
        self._ends.append(end)
        if code != 0 and not self._failed and self._stopped_by is None:
            self._failed = True
            self._memory = memory_signs.read().since(self._memory)
            saving = any(self._watch.beat(worker.command.rank).phase == "checkpoint" for worker in self._running())
            about = {"is_victim": self._is_victim(end), "resumes": self._saves, "saving": saving}
            ours = self._saves or holds_training(self._run_dir)
            self._end_all(policy.after_exit(policy.meant(code, ours=ours), **about))
        elif self._saves and self._presses == 1 and code not in (0, *policy.PREEMPTED):
            self._end_all(policy.WHILE_STOPPING)

    def _look_for_hangs(self) -> None:
        if self._failed or self._stopped_by is not None:
            return
        self._hang = self._watch.tick()
        if self._hang is None and not self._waits_in_vain():
            self._source.start_timer("watch", TICK_SECONDS)
            return
        self._failed = True
        self._end_all(policy.after_hang())

    def _waits_in_vain(self) -> bool:
        """A rank of a recipe has left with 0 before it joined, and another one is joining."""
        left = any(end.returncode == 0 and end.step is None for end in self._ends)
        return left and any(self._watch.beat(worker.command.rank).phase == "joining" for worker in self._running())

    def _operator(self, signum: int) -> None:
        self._presses, self._signum = self._presses + 1, signum
        self._await_no_more()  # no rank has been started: none will be
        if self._stopped_by is None and not self._failed:
            self._stopped_by = signum
        if self._presses == 1 and not self._config.quiet:
            doing = "finishing the step and saving" if self._saves else "stopping all ranks"
            self._console.say(f"samestep: {doing} (once more: at once)")
        if self._running():
            self._end_all(policy.after_signal(self._presses, self._grace))

    def _halt(self, patience: Patience) -> None:
        """Ranks elsewhere end, so ours can't go on; if ours have begun to fail by themselves, all is on its way."""
        self._await_no_more()
        if self._running() and not self._failed and self._stopped_by is None:
            self._failed = True
            self._end_all(patience)

    def _end_all(self, patience: Patience) -> None:
        self._patience = patience
        self._source.start_timer("terminate", patience.wait)

    def _terminate(self) -> None:
        if self._patience.grace == 0:
            self._kill()
            return
        request = policy.request_to_end(self._signum, saves=self._saves)
        for worker in self._running():
            worker.terminate(request)
        self._source.start_timer("kill", self._patience.grace)

    def _kill(self) -> None:
        for worker in self._running():
            worker.kill()
        self._source.start_timer("abandon", _ABANDON_SECONDS)

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
            self._starter.sweep()
        self._listening.end()
        temporary.sweep()
        self._workers = {}
