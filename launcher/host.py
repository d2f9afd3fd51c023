"""What this machine offers, found without torch: CPUs, GPUs, memory, and who holds a port."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from samestep.launcher.contract import UsageError

_NVIDIA_SMI_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class HostFacts:
    """CPUs that this process may use, visible GPUs, bytes of memory."""

    cpus: int
    gpus: int
    memory_bytes: int


def inspect(environ: Mapping[str, str]) -> HostFacts:
    """Look at this machine as a rank with `environ` would see it."""
    import psutil

    return HostFacts(
        cpus=_cpus(), gpus=_visible(_installed_gpus(), environ), memory_bytes=psutil.virtual_memory().total
    )


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _installed_gpus() -> int:
    """NVIDIA GPUs. In a container /proc lists the host's, so the driver's own tool is asked first."""
    tool = shutil.which("nvidia-smi")
    if tool:
        try:
            listing = subprocess.run(
                [tool, "-L"], capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True
            )
            return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
        except (OSError, subprocess.SubprocessError):
            pass  # installed, but without a driver
    devices = Path("/proc/driver/nvidia/gpus")
    return len(list(devices.iterdir())) if devices.is_dir() else 0


def _visible(installed: int, environ: Mapping[str, str]) -> int:
    """CUDA_VISIBLE_DEVICES as the CUDA runtime reads it: entries up to the first invalid one."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return installed
    count = 0
    for entry in (part.strip() for part in chosen.split(",")):
        if entry.startswith(("GPU-", "MIG-")) or (entry.isdecimal() and int(entry) < installed):
            count += 1
        else:
            break
    return min(count, installed)


def count_ranks(text: str, host: HostFacts, *, on_cpu: bool) -> int:
    """Turn `--nproc-per-node` into a number for this host; `on_cpu` says that ranks leave GPUs alone.

    Raises:
        UsageError: gpu without GPUs, or more ranks than GPUs.
    """
    if text == "cpu":
        return host.cpus
    if text == "gpu" and host.gpus == 0:
        raise UsageError(
            "--nproc-per-node gpu is expected to find GPUs, but there are none", "use auto, cpu or a number"
        )
    if text in ("gpu", "auto"):
        return host.gpus if host.gpus and not on_cpu else host.cpus
    count = int(text)
    if host.gpus and count > host.gpus and not on_cpu:
        raise UsageError(
            f"--nproc-per-node is expected to be at most {host.gpus} (GPUs on this host), but is {count}",
            f"use --nproc-per-node {host.gpus}, or give the recipe --device cpu",
        )
    return count


def port_holder(port: int) -> str:
    """Who listens on a TCP port here: `pid 12 (python)`, or `another process` where the system won't tell."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return f"pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return "another process"
