"""Pods without a cluster: a manifest's container, run in network, process, mount and host name namespaces of its own.

One bridge in a namespace of its own is the cluster's network; every pod has one interface `eth0` on it and the names of
all pods in its /etc/hosts, as the cluster's DNS would tell them. Nothing of it touches the machine's own network.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

BIN = Path(sys.executable).parent
# what a container runtime does before it becomes the container's command, which has no privilege at all
_ENTER = """\
set -e
hostname "$1"
user=$2
shift 2
ip link set lo up
mount -t tmpfs -o size=512m tmpfs /dev/shm
exec setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


def need_namespaces() -> None:
    """Skip where namespaces can't be made."""
    missing = [tool for tool in ("ip", "unshare", "setpriv") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and iproute2, util-linux; missing: {', '.join(missing) or 'root'}")
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], check=False).returncode:
        pytest.skip("this machine lets nobody make namespaces")


@functools.cache
def user() -> int:
    """1000, as in the manifests; root without its privileges where the interpreter lies in root's own folder."""
    tried = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "test", "-x", sys.executable]
    return 0 if subprocess.run(tried, check=False).returncode else 1000


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Pod:
    """One of the pods of a job."""

    namespace: str
    hostname: str
    process: subprocess.Popen[str] = field(repr=False)

    def end(self, seconds: float = 90) -> tuple[int, str]:
        """Wait; exit code as the kubelet would report it, and all output."""
        output, _ = self.process.communicate(timeout=seconds)
        code = self.process.returncode
        return (128 - code if code < 0 else code), output

    def first_process(self) -> psutil.Process:
        """Number 1 of the pod, which gets the signals of the kubelet."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def sigterm(self) -> None:
        """What deleting a pod, or draining its node, does."""
        self.first_process().send_signal(signal.SIGTERM)


class Network:
    """Bridge, namespaces and names; everything is gone after `close`."""

    def __init__(self, volume: Path, hostnames: Mapping[str, Sequence[str]]) -> None:
        """`hostnames` maps each pod's host name to the names by which the others find it."""
        self.volume = volume
        self._tag = f"s{secrets.token_hex(3)}"
        self._etc: list[Path] = []
        self._made: list[str] = []
        self.started: list[Pod] = []
        self.names = list(hostnames)
        try:
            self._build(hostnames)
        except BaseException:
            self.close()
            raise

    def _build(self, hostnames: Mapping[str, Sequence[str]]) -> None:
        self._add(f"{self._tag}sw")
        _ip("-n", f"{self._tag}sw", "link", "add", "bridge", "type", "bridge")
        _ip("-n", f"{self._tag}sw", "link", "set", "bridge", "up")
        hosts = "127.0.0.1 localhost\n" + "".join(
            f"10.77.0.{index + 1} {' '.join([*others, name])}\n"
            for index, (name, others) in enumerate(hostnames.items())
        )
        for index in range(len(hostnames)):
            namespace, port = f"{self._tag}p{index}", f"{self._tag}v{index}"
            self._add(namespace)
            _ip("link", "add", port, "netns", f"{self._tag}sw", "type", "veth", "peer", "eth0", "netns", namespace)
            _ip("-n", f"{self._tag}sw", "link", "set", port, "master", "bridge", "up")
            _ip("-n", namespace, "address", "add", f"10.77.0.{index + 1}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            folder = Path("/etc/netns") / namespace  # `ip netns exec` lays its files over /etc
            folder.mkdir(parents=True)
            self._etc.append(folder)
            (folder / "hosts").write_text(hosts)

    def _add(self, namespace: str) -> None:
        _ip("netns", "add", namespace)
        self._made.append(namespace)

    def start(self, index: int, command: Sequence[str], env: Mapping[str, str]) -> Pod:
        """Run a container's command as the first process of pod `index`, in the volume."""
        namespace, hostname = f"{self._tag}p{index}", self.names[index]
        enter = ["ip", "netns", "exec", namespace, "unshare", "--uts", "--pid", "--ipc", "--fork", "--kill-child"]
        process = subprocess.Popen(
            [*enter, "--mount-proc", "sh", "-c", _ENTER, "sh", hostname, str(user()), *command],
            env={"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(self.volume), "LANG": "C.UTF-8", **env},
            cwd=self.volume,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        pod = Pod(namespace, hostname, process)
        self.started.append(pod)
        return pod

    def close(self) -> None:
        """End what still runs and take everything away."""
        for pod in self.started:
            if pod.process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(pod.process.pid).children():
                        child.kill()
                pod.process.kill()
            with pod.process:  # waits, and closes its pipe
                pass
        for namespace in self._made:
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)
        for folder in self._etc:
            shutil.rmtree(folder, ignore_errors=True)


class Pods:
    """Pods that share one volume."""

    def __init__(self, volume: Path) -> None:
        self.volume = volume

    @contextlib.contextmanager
    def network(self, hostnames: Mapping[str, Sequence[str]]) -> Iterator[Network]:
        """A network for one test."""
        made = Network(self.volume, hostnames)
        try:
            yield made
        finally:
            made.close()

    def environment(self, container: Mapping[str, Any], index: int) -> dict[str, str]:
        """The container's variables in pod `index`, as the kubelet resolves them, with the volume mounted at /runs."""
        found = {}
        for variable in container["env"]:
            source = variable.get("valueFrom", {})
            if "fieldRef" in source:
                assert "job-completion-index" in source["fieldRef"]["fieldPath"]
                found[variable["name"]] = str(index)
            elif "secretKeyRef" in source:
                found[variable["name"]] = "0123456789abcdef" * 4
            else:
                found[variable["name"]] = variable["value"].replace("$$(", "$(").replace("/runs/", f"{self.volume}/", 1)
        return found


@pytest.fixture
def pods() -> Iterator[Pods]:
    """With a volume that belongs to the pods' user, as fsGroup makes it; skipped where namespaces can't be made."""
    need_namespaces()
    with tempfile.TemporaryDirectory(prefix="samestep-volume-") as folder:
        os.chown(folder, user(), user())
        yield Pods(Path(folder))
