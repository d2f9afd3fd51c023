"""Facts about this machine, found without torch: what the system says, and what a write to the disk takes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from samestep.launcher import host
from samestep.launcher.diagnosis import memory_signs

_WRITTEN_BYTES = 64 << 20
_FSYNCS = 9
_TORCHRUN_PORT = 29500


def inspect(environ: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """All facts that `verdict.judge` needs but those of torch and of real ranks; `folder` is where runs are kept."""
    seen = host.inspect(environ)
    memory = psutil.virtual_memory()
    return {
        "python": platform.python_version(),
        "gpus": seen.gpus,
        "gpu_driver": _driver(),
        "cpus": seen.cpus,
        "cpus_present": os.cpu_count() or 1,
        "cpus_physical": psutil.cpu_count(logical=False),
        "cpu_quota": cpu_quota(Path("/sys/fs/cgroup")),
        "numa_nodes": numa_nodes(Path("/sys/devices/system/node")),
        "memory_bytes": min(memory.total, memory_signs.read().limit or memory.total),
        "memory_free_bytes": min(memory.available, memory_signs.left()),
        "shm_bytes": _free(Path("/dev/shm")),  # noqa: S108 (asked for its size, nothing is written)
        "open_files": _soft(resource.RLIMIT_NOFILE),
        "processes": _soft(resource.RLIMIT_NPROC),
        "disk": disk(folder),
        "clock_seconds": time.get_clock_info("perf_counter").resolution,
        "clock_synced": _synced(),
        "interfaces": {name: stats.isup for name, stats in psutil.net_if_stats().items()},
        "interface_choice": {n: environ[n] for n in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if environ.get(n)},
        "loopback": _loopback(),
        "host": socket.gethostname(),
        "host_resolves": _resolves(socket.gethostname()),
        "ports": _ports(),
    }


def cpu_quota(cgroup: Path) -> float | None:
    """CPUs that the control group may use at once, None without a limit (kernel documentation: cgroup-v2)."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
        return None if quota_us < 0 else quota_us / int((cgroup / "cpu" / "cpu.cfs_period_us").read_text())
    return None


def numa_nodes(folder: Path) -> int:
    """NUMA nodes with a CPU that this process may use; 1 where the system does not tell."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    nodes = 0
    for path in folder.glob("node[0-9]*/cpulist"):
        with contextlib.suppress(OSError, ValueError):
            nodes += bool(_cpus(path.read_text()) & allowed)
    return max(1, nodes)


def _cpus(text: str) -> set[int]:
    """`0-3,8` as the kernel writes it."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    return found


def disk(folder: Path) -> dict[str, Any]:
    """Free space, and what writing and syncing take, in the file system of `folder`; nothing is left behind."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    probe = place / f".samestep-doctor-{os.getpid()}"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        return {"path": str(place), "problem": error.strerror or str(error)}
    try:
        waits = []
        for _ in range(_FSYNCS):
            os.write(descriptor, os.urandom(4096))
            begin = time.perf_counter()
            os.fsync(descriptor)
            waits.append(time.perf_counter() - begin)
        block = os.urandom(1 << 20)  # what compresses well would flatter some file systems
        begin = time.perf_counter()
        for _ in range(_WRITTEN_BYTES // len(block)):
            os.write(descriptor, block)
        os.fsync(descriptor)
        seconds = time.perf_counter() - begin
    except OSError as error:
        return {"path": str(place), "problem": error.strerror or str(error)}
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)
    return {
        "path": str(place),
        "free_bytes": shutil.disk_usage(place).free,
        "write_bytes_per_s": _WRITTEN_BYTES / seconds,
        "fsync_seconds": statistics.median(waits),
    }


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if not tool:
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        return next(iter(asked.stdout.split()), "")
    return ""


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _soft(limit: int) -> float:
    soft, _ = resource.getrlimit(limit)
    return float("inf") if soft == resource.RLIM_INFINITY else soft


def _synced() -> bool | None:
    """What the kernel says of the clock: adjtimex(2) gives TIME_ERROR (5) while nobody disciplines it."""
    with contextlib.suppress(OSError, AttributeError):
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # struct timex, modes 0: only read
        return None if state < 0 else state != 5
    return None


def _loopback() -> bool:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return True
    except OSError:
        return False


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def _ports() -> dict[str, Any]:
    found: dict[str, Any] = {"problem": "", "holder": "", "range": [32768, 60999]}
    with contextlib.suppress(OSError, ValueError):
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        found["range"] = [int(low), int(high)]
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 10):
            pass
    except OSError as error:
        found["problem"] = f"no connection over 127.0.0.1: {error.strerror or error}"
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", _TORCHRUN_PORT)) == 0:
            found["holder"] = host.port_holder(_TORCHRUN_PORT)
    return found
