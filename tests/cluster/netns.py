"""Hosts for tests: network namespaces on a bridge, each with an address and a name of its own; needs root."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.conftest import environment


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True, timeout=30)


@dataclass
class Host:
    """One machine: what runs in its namespace."""

    name: str
    address: str
    link: str  # the bridge's end of its cable
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: list[object], cwd: Path, output: Path) -> subprocess.Popen[bytes]:
        # a UTS namespace besides, so that the host has a name of its own
        words = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c"]
        words += ['hostname "$0" && exec "$@"', self.name, *map(str, command)]
        with output.open("ab") as file:
            process = subprocess.Popen(
                words, cwd=cwd, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.started.append(process)
        return process

    def pids(self) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, timeout=30)
        return [int(word) for word in listed.stdout.split()]

    def power_off(self) -> None:
        """All at once, and without a word on the network: the cable goes first."""
        self.unplug()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def unplug(self) -> None:
        ip("link", "set", self.link, "down")

    def plug(self) -> None:
        ip("link", "set", self.link, "up")

    def slow_down(self, megabits: float) -> None:
        """So many a second leave the host, and what does not fit waits up to 0.4 s: what is said comes late, too."""
        limit = ["tbf", "rate", f"{megabits}mbit", "burst", "16kb", "latency", "400ms"]
        self._tc("replace", *limit)

    def speed_up(self) -> None:
        """The cable is as fast as before."""
        self._tc("del")

    def _tc(self, verb: str, *limit: str) -> None:
        words = ["ip", "netns", "exec", self.name, "tc", "qdisc", verb, "dev", "eth0", "root", *limit]
        subprocess.run(words, check=True, capture_output=True, timeout=30)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """As many hosts; whatever runs on them is ended, and nothing of them is left."""
    tag = f"s{os.getpid() % 10000:04d}"
    bridge, subnet = f"{tag}br", f"10.{200 + os.getpid() % 50}.{os.getpid() % 250}"
    made = [Host(f"{tag}n{number}", f"{subnet}.{number + 1}", f"{tag}v{number}") for number in range(count)]
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for host in made:
            ip("netns", "add", host.name)
            ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            ip("link", "set", host.link, "master", bridge, "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield made
    finally:
        for host in made:
            for pid in host.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in host.started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)
            subprocess.run(["ip", "link", "del", host.link], capture_output=True, timeout=30)
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, timeout=30)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, timeout=30)


def available() -> str:
    """Empty where hosts can be made, else why not."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=30)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, timeout=30)
    return ""


def listening(host: Host) -> set[str]:
    """Local addresses, with ports, on which something of the host listens for TCP."""
    shown = subprocess.run(
        ["ip", "netns", "exec", host.name, "ss", "-Hltn"], capture_output=True, text=True, timeout=30, check=True
    )
    return {line.split()[3] for line in shown.stdout.splitlines()}
