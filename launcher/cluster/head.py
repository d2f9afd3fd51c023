"""The launcher that decides for all machines: who takes part, when all stop, and what follows.

It holds the run directory's lock and starts rank zero, the only rank that publishes checkpoints. So however the network
falls apart, one side at most ever commits: that of the head. Machines that lose the head end their ranks.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from samestep.launcher import interfaces, manifest, meeting
from samestep.launcher.cluster import admission
from samestep.launcher.cluster.hub import Gone, Hub, Peer, Said
from samestep.launcher.cluster.layout import Layout
from samestep.launcher.cluster.roster import Candidate, choose
from samestep.launcher.cluster.team import Assembled, NotStartedError
from samestep.launcher.cluster.wide_watch import FarRanks
from samestep.launcher.contract import ExitCode, RunDir
from samestep.launcher.diagnosis.diagnose import Failure
from samestep.launcher.plan import Facts, Meeting
from samestep.launcher.supervise import policy
from samestep.launcher.supervise.console import Console
from samestep.launcher.supervise.outcome import Generation, RankEnd
from samestep.launcher.supervise.peers import Halt
from samestep.launcher.supervise.supervisor import Supervisor

_END_SECONDS = 60.0  # for machines to report how their ranks ended, after they were told to end them
_GROWTH_GRACE = 30.0  # for ranks to save, when machines join


class Head:
    """A Team of this machine and those that have called."""

    def __init__(
        self,
        place: Layout,
        listener: socket.socket,
        run_dir: RunDir,
        supervisor: Supervisor,
        console: Console,
        environ: Mapping[str, str],
        far: FarRanks,
    ) -> None:
        self._far = far
        self._place, self._run_dir, self._supervisor, self._console = place, run_dir, supervisor, console
        self._address, port = listener.getsockname()[:2]
        key = admission.publish(run_dir, environ, self._address, port).key
        self._hub = Hub(key, "head", place.timeouts.keep_alive_interval, place.timeouts.silence)
        self._hub.listen(listener)
        self._callers: list[Peer] = []  # have said hello, in the order in which they came
        self._members: list[Peer] = []  # take part in the generation, in the order of their ranks
        self._generation = -1
        self._running = self._halted = self._saves = False
        self._missing: Failure | None = None
        self._reshaped = ""
        self._committed = -1
        supervisor.attend(self, place.timeouts.keep_alive_interval)

    def fileno(self) -> int:
        """Readable when another machine has said something."""
        return self._hub.fileno()

    def read(self) -> list[Halt]:
        """Take what the others say; the answer is what it means for the ranks here."""
        found: list[Halt] = []
        for item in self._hub.pump():
            found += self._gone(item) if isinstance(item, Gone) else self._said(item)
        return found + self._growth()

    def assemble(self, facts: Facts) -> Assembled:
        """See Team."""
        self._members, self._missing, self._reshaped = self._gather(facts), None, ""
        sizes = [facts.world_size, *[int(peer.facts["nproc"]) for peer in self._members]]
        world_size, nnodes = sum(sizes), len(sizes)
        place, store = meeting.open_store(self._address, None, self._address)
        place = replace(place, interface=interfaces.interface_toward(self._address, place.store_port))
        self._generation, self._committed = facts.generation, manifest.newest_step(self._run_dir.checkpoints)
        self._saves = facts.resumes
        first = sizes[0]
        for node_rank, peer in enumerate(self._members, 1):
            peer.facts |= {"first_rank": first, "rank_of_node": node_rank, "ended": None}
            start = _start(facts, place, world_size, first, node_rank, nnodes)
            self._hub.say(peer, start | {"watch": self._far.wanted})
            first += sizes[node_rank]
        self._far.begin(range(sizes[0], world_size), self._ask_for_stacks)
        self._running, self._halted = True, False
        self._console.say(
            _who(
                world_size,
                [
                    (socket.gethostname(), sizes[0]),
                    *[(str(peer.facts["host"]), int(peer.facts["nproc"])) for peer in self._members],
                ],
            )
        )
        return Assembled(replace(facts, world_size=world_size, local_world_size=sizes[0], nnodes=nnodes), place, store)

    def failed(self, exit_code: int, *, is_victim: bool) -> None:
        """See Team."""
        self._halt_others(policy.after_exit(exit_code, is_victim=is_victim))

    def finish(self, generation: Generation) -> Generation:
        """See Team."""
        if generation.stopped_by is not None or any(end.returncode for end in generation.ends):
            self._halt_others(policy.after_hang() if generation.hang else policy.Patience(0.0, 5.0))
        end = time.monotonic() + _END_SECONDS
        halted_at, asked = time.monotonic() if self._halted else None, generation.signum
        while pending := [peer for peer in self._members if peer.facts["ended"] is None]:
            if halted_at is None and self._halted:
                halted_at = time.monotonic()
            if halted_at is not None and time.monotonic() > max(end, halted_at + _END_SECONDS):
                for peer in pending:
                    self._lose(peer, "it does not end its ranks")
                    self._hub.drop(peer)
                break
            asked = self._supervisor.pause(1.0, until=self._all_told) or asked
        self._running = False
        ends = list(generation.ends)
        for peer in self._members:
            said = peer.facts["ended"]
            ends += [RankEnd(**{**end, "stdout": (), "stderr": tuple(end["stderr"])}) for end in said["ends"]]
            if said.get("stopped_by") is not None:
                self._reshaped = f"{peer.facts['host']} leaves"
                if peer in self._callers:  # it may have left already
                    self._callers.remove(peer)
                    self._hub.say(peer, {"kind": "stop", "exit_code": None})
        done = self._saves and not any(end.returncode for end in ends)
        if generation.stopped_by is not None or done:
            self._reshaped = ""
        return replace(generation, ends=tuple(ends), signum=asked)

    def missing(self) -> Failure | None:
        """See Team."""
        return self._missing

    def reshaped(self) -> str:
        """See Team."""
        return self._reshaped

    def stop(self, exit_code: int) -> None:
        """See Team."""
        for peer in self._callers:
            self._hub.say(peer, {"kind": "stop", "exit_code": int(exit_code)})
        admission.withdraw(self._run_dir)

    def close(self) -> None:
        """End all conversations."""
        self._hub.close()

    def _gather(self, facts: Facts) -> list[Peer]:
        times = self._place.timeouts
        began, enough = time.monotonic(), None
        told = False
        while True:
            now = time.monotonic()
            chosen = choose([_candidate(peer) for peer in self._callers], self._place.most - 1)
            count = len(chosen) + 1
            enough = (enough if enough is not None else now) if count >= self._place.fewest else None
            # after the first start nobody is waited for: who comes later joins at the next checkpoint
            last_call = 0.0 if facts.generation else times.last_call_timeout
            if count == self._place.most or (enough is not None and now - enough >= last_call):
                return [self._callers[index] for index in chosen]
            if now - began > times.join_timeout:
                kept = manifest.newest_step(self._run_dir.checkpoints) >= 0
                raise NotStartedError(
                    f"{self._place.fewest} machines are expected within {times.join_timeout:.0f} s, but {count} came",
                    ExitCode.PREEMPTED_KEPT if kept else ExitCode.FAILED,
                )
            if not told and now - began > 1.0:
                told = True
                self._console.say(f"samestep: {count} of {self._place.fewest} machines are here, waiting for others")
            callers = len(self._callers)
            signum = self._supervisor.pause(0.5, until=lambda: len(self._callers) != callers)  # noqa: B023 (called now)
            if signum is not None:
                committed = manifest.newest_step(self._run_dir.checkpoints) >= 0
                code = policy.after_stop(signum, (), forced=False, saves=facts.resumes, committed=committed)
                raise NotStartedError("stopped while waiting for other machines", code)

    def _ask_for_stacks(self) -> None:
        for peer in self._members:
            if peer in self._callers:
                self._hub.say(peer, {"kind": "stacks", "generation": self._generation})

    def _all_told(self) -> bool:
        return all(peer.facts["ended"] is not None for peer in self._members)

    def _said(self, item: Said) -> list[Halt]:
        peer, message = item.peer, item.message
        match message.get("kind"):
            case "hello":
                self._hello(peer, message)
            case "failed" if message.get("generation") == self._generation and peer in self._members:
                patience = policy.after_exit(int(message["exit_code"]), is_victim=bool(message["is_victim"]))
                self._halt_others(patience, but=peer)
                return [Halt(patience.wait, patience.grace)]
            case "ranks" if message.get("generation") == self._generation and peer in self._members:
                self._far.hear(message)
            case "ended" if message.get("generation") == self._generation:
                peer.facts["ended"] = message
                if message.get("stopped_by") is not None or any(end["returncode"] for end in message["ends"]):
                    self._halt_others(policy.Patience(0.5, 0.5), but=peer)
                    return [Halt(0.5, 0.5)]
        return []

    def _hello(self, peer: Peer, message: dict[str, Any]) -> None:
        if message.get("node_rank") is not None:
            same = [other for other in self._callers if other.facts.get("node_rank") == message["node_rank"]]
            if same or not 0 < message["node_rank"] < self._place.most:
                text = f"--node-rank {message['node_rank']} is expected to be free, but is taken or the head's"
                self._hub.say(peer, {"kind": "stop", "exit_code": int(ExitCode.USAGE), "text": text})
                return
        peer.facts = {name: message.get(name) for name in ("host", "nproc", "node_rank", "pid")} | {"ended": None}
        self._callers.append(peer)

    def _gone(self, item: Gone) -> list[Halt]:
        peer = item.peer
        if peer not in self._callers:
            return []
        taking_part = self._running and peer in self._members and peer.facts["ended"] is None
        self._lose(peer, item.why)
        if not taking_part:
            return []
        self._halt_others(policy.Patience(0.0, 0.5))
        return [Halt(0.0, 0.5)]

    def _lose(self, peer: Peer, why: str) -> None:
        self._callers.remove(peer)
        if peer in self._members and peer.facts["ended"] is None:
            peer.facts["ended"] = {"ends": []}
            first = peer.facts["first_rank"]
            self._missing = self._missing or Failure(
                rank=first,
                cause=f"its machine {peer.facts['host']} (node {peer.facts['rank_of_node']}) is gone: {why}",
                exit_code=ExitCode.FAILED,
                log=str(self._run_dir.log(first)),
                others_stopped=1,
                hint="look at that machine's own output; this run goes on with the machines that are left, if it may",
            )

    def _growth(self) -> list[Halt]:
        """At a new checkpoint nothing is lost by starting anew with the machines that wait."""
        waiting = len(set(self._callers) - set(self._members))  # asked at each message of each machine
        room = self._place.most - 1 - len(self._members)
        if not self._running or self._halted or not waiting or room <= 0:
            return []
        if manifest.newest_step(self._run_dir.checkpoints) <= self._committed:
            return []
        self._reshaped = f"{min(waiting, room)} more machine{'s' if min(waiting, room) > 1 else ''}"
        patience = policy.Patience(0.0, _GROWTH_GRACE)
        self._halt_others(patience)
        return [Halt(patience.wait, patience.grace)]

    def _halt_others(self, patience: policy.Patience, but: Peer | None = None) -> None:
        if self._halted:
            return
        self._halted = True
        message = {"kind": "halt", "generation": self._generation, "wait": patience.wait, "grace": patience.grace}
        for peer in self._members:
            if peer is not but and peer in self._callers:
                self._hub.say(peer, message)


def _who(world_size: int, hosts: list[tuple[str, int]]) -> str:
    names = ", ".join(f"{host} ({ranks})" for host, ranks in hosts)
    plural = "s" if world_size > 1 else "", "s" if len(hosts) > 1 else ""
    return f"samestep: {world_size} rank{plural[0]} on {len(hosts)} machine{plural[1]}: {names}"


def _candidate(peer: Peer) -> Candidate:
    return Candidate(peer.facts["node_rank"], peer.facts["host"])


def _start(facts: Facts, place: Meeting, world_size: int, first: int, node_rank: int, nnodes: int) -> dict[str, Any]:
    return {
        "kind": "start",
        "generation": facts.generation,
        "fence": facts.fence,
        "run_id": facts.run_id,
        "max_restarts": facts.max_restarts,
        "world_size": world_size,
        "first_rank": first,
        "node_rank": node_rank,
        "nnodes": nnodes,
        "master_addr": place.master_addr,
        "master_port": place.master_port,
        "store_addr": place.store_addr,
        "store_port": place.store_port,
    }
