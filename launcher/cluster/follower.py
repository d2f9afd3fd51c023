"""The launcher of every machine but the head's: it starts the ranks it is told to, says how they end, and obeys."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass, replace
from typing import Any

from samestep.launcher import interfaces, manifest
from samestep.launcher.cluster import admission
from samestep.launcher.cluster.hub import Gone, Hub
from samestep.launcher.cluster.layout import Layout
from samestep.launcher.cluster.wide_watch import Reporting
from samestep.launcher.contract import ExitCode, UsageError
from samestep.launcher.diagnosis import evidence
from samestep.launcher.diagnosis.diagnose import is_consequence
from samestep.launcher.plan import Facts, Meeting, fork_server_environment, plan
from samestep.launcher.run_dir import holds_training
from samestep.launcher.supervise import policy
from samestep.launcher.supervise.job import Job
from samestep.launcher.supervise.outcome import Generation, RankEnd
from samestep.launcher.supervise.peers import Halt

_CALL_SECONDS = 5.0
_CALL_AGAIN_SECONDS = 0.5
_LINES, _LINE_CHARACTERS = 60, 500  # of a rank's last words, sent to the head


@dataclass(frozen=True, slots=True)
class FollowerJob(Job):
    """On a machine that is told."""

    reporting: Reporting | None  # None: a script that publishes nothing


class Follower:
    """One conversation with the head, from the call to its last word."""

    def __init__(self, job: FollowerJob, place: Layout, facts: Facts) -> None:
        self._job, self._place, self._facts = job, place, facts
        self._inbox: list[dict[str, Any]] = []
        self._lost = ""
        self._generation = -1
        self._halted = -1  # the newest generation that is to end
        self.generations = 0

    def obey(self) -> int:
        """Until the head says that the run is over, or is gone; the exit code.

        Raises:
            UsageError: the head can't be found.
        """
        answer = self._call()
        if isinstance(answer, int):
            return self._stopped_before_a_start(answer)
        known, sock = answer
        times = self._place.timeouts
        self._hub = Hub(known.key, "node", times.keep_alive_interval, times.silence)
        self._head = self._hub.add(sock)
        self._hub.say(
            self._head,
            {
                "kind": "hello",
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "nproc": self._facts.world_size,
                "node_rank": self._place.node_rank,
            },
        )
        self._job.supervisor.attend(self, times.keep_alive_interval)
        try:
            return self._obey()
        finally:
            self._hub.close()

    def fileno(self) -> int:
        """Readable when the head has said something."""
        return self._hub.fileno()

    def read(self) -> list[Halt]:
        """Take what the head says; the answer is what it means for the ranks here."""
        found: list[Halt] = []
        for item in self._hub.pump():
            if isinstance(item, Gone):
                self._lost = item.why
                found.append(Halt(0.0, 0.5))
            elif item.message.get("kind") == "halt":
                self._halted = int(item.message["generation"])
                if self._halted == self._generation:
                    found.append(Halt(float(item.message["wait"]), float(item.message["grace"])))
            elif item.message.get("kind") == "stacks":
                if self._job.reporting and item.message["generation"] == self._generation:
                    self._job.reporting.answer()
            else:
                self._inbox.append(item.message)
        return found

    def _obey(self) -> int:
        supervisor = self._job.supervisor
        while True:
            if self._facts.forks:
                self._job.starter.prepare_forks(self._facts.python, fork_server_environment(self._facts))
            while not self._inbox and not self._lost:
                signum = supervisor.pause(60.0, until=lambda: bool(self._inbox or self._lost))
                if signum is not None:
                    return self._stopped_before_a_start(signum)
            if not self._inbox:
                return self._without_head()
            message = self._inbox.pop(0)
            if message["kind"] == "stop":
                return self._told_to_stop(message)
            if message["kind"] == "start":
                ended = self._one_generation(message)
                if ended.signum is not None:
                    return self._stopped(ended)

    def _one_generation(self, message: dict[str, Any]) -> Generation:
        job = self._job
        if job.reporting:
            job.reporting.wanted, job.reporting.tell = bool(message.get("watch")), self._say
        self._generation = int(message["generation"])
        self.generations += 1
        facts = replace(
            self._facts,
            generation=self._generation,
            fence=int(message["fence"]),
            run_id=str(message["run_id"]),
            max_restarts=int(message["max_restarts"]),
            world_size=int(message["world_size"]),
            first_rank=int(message["first_rank"]),
            local_world_size=self._facts.world_size,
            node_rank=int(message["node_rank"]),
            nnodes=int(message["nnodes"]),
        )
        address = str(message["store_addr"])
        place = Meeting(
            str(message["master_addr"]),
            int(message["master_port"]),
            int(message["store_port"]),
            store_addr=address,
            interface=interfaces.interface_toward(address, int(message["store_port"])),
        )
        commands = plan(job.config, job.recipe, job.directory, place, facts)

        def tell(end: RankEnd) -> bool:
            command = commands[end.rank - facts.first_rank]
            victim = is_consequence(evidence.of_rank(end, command, job.directory, facts.generation))
            code = self._meant(end)
            self._say({"kind": "failed", "exit_code": code, "is_victim": victim, "rank": end.rank})
            return victim

        if self._halted == self._generation:  # over before it began
            ended = Generation(self._generation, ())
        else:
            ended = job.supervisor.run(facts.generation, commands, job.environ, started=_nothing, is_victim=tell)
        self._say({"kind": "ended", "ends": [_words(end) for end in ended.ends], "stopped_by": ended.signum})
        return ended

    def _say(self, message: dict[str, Any]) -> None:
        if not self._lost:
            self._hub.say(self._head, message | {"generation": self._generation})

    def _told_to_stop(self, message: dict[str, Any]) -> int:
        code = int(message.get("exit_code") or 0)
        if message.get("text"):
            self._job.console.say(f"error: {message['text']}")
        elif code:
            self._job.console.say(f"samestep: the head has ended the run with exit code {code}")
        return code

    def _stopped(self, ended: Generation) -> int:
        assert ended.signum is not None
        return policy.after_stop(
            ended.signum,
            [self._meant(end) for end in ended.ends],
            forced=ended.forced,
            saves=self._facts.resumes,
            committed=self._kept,
            trained=self._generation > 0 or any(end.step for end in ended.ends),
        )

    def _stopped_before_a_start(self, signum: int) -> int:
        return policy.after_stop(signum, (), forced=False, saves=True, committed=self._kept)

    def _meant(self, end: RankEnd) -> int:
        return policy.meant(end.returncode, ours=self._facts.resumes or holds_training(self._job.directory))

    @property
    def _kept(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return bool(manifest.committed(self._job.directory.checkpoints))

    def _without_head(self) -> int:
        code = ExitCode.PREEMPTED_KEPT if self._kept else ExitCode.FAILED
        self._job.console.say(
            f"samestep: the head of the run is gone ({self._lost}); the ranks of this machine are ended, "
            f"exit code {int(code)}"
        )
        return code

    def _call(self) -> tuple[admission.Admission, socket.socket] | int:
        """A connection to the head, or the operator's signal if that comes first.

        Raises:
            UsageError: it is not there, or can't be spoken to.
        """
        job, place = self._job, self._place
        end = time.monotonic() + place.timeouts.join_timeout
        answered = 0.0
        while True:
            known = admission.read(job.directory, job.environ)
            address = place.address or (known.address if known else "")
            port = place.port if place.address else (known.port if known else 0)
            connection = self._dial(address, port) if address else None
            if connection is not None and known is not None:
                return known, connection
            if connection is not None:  # somebody is there, and has published nothing that we can read
                connection.close()
                answered = answered or time.monotonic()
            if answered and time.monotonic() - answered > _CALL_SECONDS:
                raise UsageError(
                    f"the run directory {job.directory.path} is expected to be the head's, which is there at "
                    f"{address}:{port}, but its nodes.json is not in it",
                    "all machines need the same --run-dir, on a file system that they share",
                )
            if time.monotonic() > end:
                raise UsageError(
                    f"the head of the run is expected at {address or job.directory.path / 'nodes.json'} within "
                    f"{place.timeouts.join_timeout:.0f} s, but is not there",
                    "start it with --node-rank 0, and give all machines the same --run-dir on a shared file system",
                    ExitCode.FAILED,
                )
            if (signum := job.supervisor.pause(_CALL_AGAIN_SECONDS)) is not None:
                return signum

    def _dial(self, address: str, port: int) -> socket.socket | None:
        source = (self._place.source, 0) if self._place.source else None
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout=_CALL_SECONDS, source_address=source)
        return None


def _words(end: RankEnd) -> dict[str, Any]:
    return {
        "rank": end.rank,
        "pid": end.pid,
        "returncode": end.returncode,
        "signalled": end.signalled,
        "ended_ns": end.ended_ns,
        "step": end.step,
        "phase": end.phase,
        "stderr": [line[:_LINE_CHARACTERS] for line in end.stderr[-_LINES:]],
    }


def _nothing() -> None:
    """The socket for the ranks is the head's."""
