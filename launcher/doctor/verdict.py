"""Pure: facts about a machine -> rows of the doctor's table. Every threshold is here, with its unit in its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["ok", "warning", "error"]
GIB, MIB = 1 << 30, 1 << 20

MEMORY_BYTES = 1 * GIB
SHM_WARNING_BYTES, SHM_ERROR_BYTES = 1 * GIB, 16 * MIB  # 64 MiB is what a container gets unless told otherwise
FILES_WARNING, FILES_ERROR = 4096, 256
PROCESSES_WARNING = 1024
DISK_WARNING_BYTES, DISK_ERROR_BYTES = 10 * GIB, 1 * GIB
WRITE_BYTES_PER_S = 50 * MIB
FSYNC_SECONDS = 0.1
CLOCK_SECONDS = 1e-6
LATENCY_SECONDS = {"gloo": 5e-3, "nccl": 1e-3}
BANDWIDTH_BYTES_PER_S = {"gloo": 100e6, "nccl": 2e9}  # bus bandwidth of the largest message
TORCH = (2, 10)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    level: Level
    value: str
    hint: str = ""


def judge(facts: Mapping[str, Any]) -> list[Row]:
    """All rows, in the order in which they are read. `facts` is what `machine.inspect` and the two programs gave."""
    rows: list[Row] = []
    for judgement in (_torch, _devices, _processors, _memory, _limits, _disk, _clock, _network, _ports):
        rows += judgement(facts)
    return rows + list(links(facts["links"]))


def worst(rows: Sequence[Row]) -> Level:
    """error, else warning, else ok."""
    levels = {row.level for row in rows}
    return "error" if "error" in levels else "warning" if "warning" in levels else "ok"


def _slow(found: Mapping[str, Any]) -> str:
    return "give it longer with --timeout" if "--timeout" in found["problem"] else ""


def _torch(facts: Mapping[str, Any]) -> Iterator[Row]:
    torch = facts["torch"]
    if "problem" in torch:
        yield Row(
            "torch", "error", torch["problem"], _slow(torch) or "install samestep's requirements into this environment"
        )
        return
    version = tuple(int(part) for part in torch["version"].split("+")[0].split(".")[:2])
    build = f"CUDA {torch['cuda_build']}" if torch["cuda_build"] else "CPU"
    shown = f"{torch['version']}, {build} build, Python {facts['python']}"
    if version < TORCH:
        yield Row("torch", "error", shown, f"samestep needs torch {TORCH[0]}.{TORCH[1]} or newer")
    else:
        yield Row("torch", "ok", shown)
    backends = [name for name in ("gloo", "nccl") if torch[name]]
    if not torch["gloo"]:
        yield Row("backends", "error", ", ".join(backends) or "none", "this torch was built without gloo")
    else:
        yield Row("backends", "ok", ", ".join(backends))


def _devices(facts: Mapping[str, Any]) -> Iterator[Row]:
    torch, driver = facts["torch"], facts["gpu_driver"]
    installed, usable = facts["gpus"], torch.get("devices", [])
    if not installed and not usable:
        yield Row("devices", "ok", "no GPU, ranks compute on the CPU")
    elif usable:
        missing = "" if torch["nccl"] else "this torch has no NCCL, so several GPUs can't talk to each other"
        shown = f"{len(usable)} x {usable[0]}, driver {driver or 'unknown'}"
        yield Row("devices", "warning" if missing else "ok", shown, missing)
    elif torch.get("cuda_build"):
        why = torch.get("cuda_problem") or "torch finds none of them"
        yield Row("devices", "error", f"{installed} GPU, driver {driver or 'unknown'}: {why}", "update the driver")
    else:
        yield Row(
            "devices", "warning", f"{installed} GPU, not used", "this torch is the CPU build: install one for CUDA"
        )


def _processors(facts: Mapping[str, Any]) -> Iterator[Row]:
    usable, present, quota, nodes = facts["cpus"], facts["cpus_present"], facts["cpu_quota"], facts["numa_nodes"]
    shown = f"{usable} of {present} usable, {facts['cpus_physical'] or 'unknown'} physical cores"
    if quota is not None and quota < usable:
        hint = "torch counts CPUs, not the quota: pass --threads, and start no more ranks than the quota has CPUs"
        yield Row("processors", "warning", f"{shown}, quota of {quota:g}", hint)
    else:
        yield Row("processors", "ok", shown)
    if nodes > 1:
        hint = "memory of the other node is slower: numactl --cpunodebind=0 --membind=0 samestep run ..."
        yield Row("NUMA", "warning", f"this process may run on {nodes} nodes", hint)
    else:
        yield Row("NUMA", "ok", "one node")


def _memory(facts: Mapping[str, Any]) -> Iterator[Row]:
    free, total = facts["memory_free_bytes"], facts["memory_bytes"]
    low = free < MEMORY_BYTES
    yield Row(
        "memory",
        "warning" if low else "ok",
        f"{size(free)} free of {size(total)}",
        "a rank needs 0.3 GiB for torch alone" if low else "",
    )
    shm = facts["shm_bytes"]
    hint = "DataLoader workers pass batches through it: docker run --shm-size=1g"
    if shm is None or shm < SHM_ERROR_BYTES:
        yield Row("shared memory", "error", "missing" if shm is None else f"{size(shm)} free", hint)
    elif shm < SHM_WARNING_BYTES:
        yield Row("shared memory", "warning", f"{size(shm)} free", hint)
    else:
        yield Row("shared memory", "ok", f"{size(shm)} free")


def _limits(facts: Mapping[str, Any]) -> Iterator[Row]:
    files, processes = facts["open_files"], facts["processes"]
    level: Level = "error" if files < FILES_ERROR else "warning" if files < FILES_WARNING else "ok"
    yield Row("open files", level, _limit(files), "" if level == "ok" else f"ulimit -n {FILES_WARNING}")
    low = processes < PROCESSES_WARNING
    hint = f"ulimit -u {PROCESSES_WARNING}: threads count too" if low else ""
    yield Row("processes", "warning" if low else "ok", _limit(processes), hint)


def _disk(facts: Mapping[str, Any]) -> Iterator[Row]:
    disk = facts["disk"]
    if "problem" in disk:
        yield Row(
            "disk", "error", f"{disk['path']}: {disk['problem']}", "pass --run-dir with a folder you may write to"
        )
        return
    free, speed, fsync = disk["free_bytes"], disk["write_bytes_per_s"], disk["fsync_seconds"]
    shown = f"{size(free)} free in {disk['path']}"
    level: Level = "error" if free < DISK_ERROR_BYTES else "warning" if free < DISK_WARNING_BYTES else "ok"
    hint = "" if level == "ok" else "checkpoints are kept whole: free some, or pass another --run-dir"
    yield Row("disk space", level, shown, hint)
    slow = speed < WRITE_BYTES_PER_S
    hint = "a checkpoint takes its size divided by this: a larger --checkpoint-every, or a faster disk" if slow else ""
    yield Row("disk speed", "warning" if slow else "ok", f"{speed / MIB:.0f} MiB/s written and synced", hint)
    slow = fsync > FSYNC_SECONDS
    hint = "each checkpoint syncs about ten files; network file systems are slow at that" if slow else ""
    yield Row("fsync", "warning" if slow else "ok", f"{1000 * fsync:.2f} ms", hint)


def _clock(facts: Mapping[str, Any]) -> Iterator[Row]:
    resolution, synced = facts["clock_seconds"], facts["clock_synced"]
    coarse = resolution > CLOCK_SECONDS
    words = {True: "synchronised", False: "not synchronised", None: "not known whether synchronised"}
    shown = f"resolution {1e9 * resolution:.0f} ns, wall clock {words[synced]}"
    hint = "phase times will be rough" if coarse else ""
    if synced is False:
        hint = "times of several machines can't be compared: run an NTP client"
    yield Row("clock", "warning" if hint else "ok", shown, hint)


def _network(facts: Mapping[str, Any]) -> Iterator[Row]:
    up = [name for name, is_up in facts["interfaces"].items() if is_up]
    if not facts["loopback"]:
        yield Row("network", "error", "no loopback", "ranks of one machine meet on 127.0.0.1: ip link set lo up")
    else:
        yield Row("network", "ok", f"up: {', '.join(up)}")
    for variable, text in facts["interface_choice"].items():
        unknown = unknown_interfaces(variable, text, facts["interfaces"])
        if unknown:
            known = ", ".join(facts["interfaces"])
            yield Row(variable, "error", f"{text}: no interface {unknown[0]}", f"unset it, or choose among {known}")
        else:
            yield Row(variable, "ok", text)
    if not facts["host_resolves"]:
        hint = "scripts other than recipes look it up: add it to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo"
        yield Row("host name", "warning", f"{facts['host']} has no address", hint)


def unknown_interfaces(variable: str, text: str, interfaces: Mapping[str, Any]) -> list[str]:
    """Names in `text` that fit no interface. NCCL takes prefixes, `=` for exact names and `^` for exclusion."""
    if variable.startswith("NCCL") and text.startswith("^"):
        return []
    names = [name for name in text.lstrip("=").split(",") if name]
    exact = variable.startswith("GLOO") or text.startswith("=")
    return [n for n in names if not (n in interfaces if exact else any(i.startswith(n) for i in interfaces))]


def _ports(facts: Mapping[str, Any]) -> Iterator[Row]:
    ports = facts["ports"]
    if ports["problem"]:
        yield Row("ports", "error", ports["problem"], "a run needs free ports on 127.0.0.1")
    elif ports["holder"]:
        hint = "only torchrun and scripts other than recipes use it: --master-port for another"
        yield Row("ports", "warning", f"29500 is used by {ports['holder']}", hint)
    else:
        low, high = ports["range"]
        yield Row("ports", "ok", f"{low} to {high} given out, 29500 is free")


def links(measured: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """Rows of the measurement with real ranks, a backend each."""
    for backend, found in measured.items():
        name = f"{found['ranks']} ranks, {backend}"
        if "problem" in found:
            hint = _slow(found) or "ranks of this machine can't train together: see the rows above"
            yield Row(name, "error", found["problem"], hint)
            continue
        latency, bandwidth, largest = found["latency_seconds"], found["bus_bytes_per_s"], found["largest_bytes"]
        slow = latency > LATENCY_SECONDS[backend] or bandwidth < BANDWIDTH_BYTES_PER_S[backend]
        yield Row(
            name,
            "warning" if slow else "ok",
            f"all_reduce of 4 B in {1e6 * latency:.0f} us, of {size(largest)} at {bandwidth / 1e9:.2f} GB/s",
            "other programs on this machine, or a quota, slow it down" if slow else "",
        )


def _limit(value: float) -> str:
    return "unlimited" if value == float("inf") else f"{value:.0f}"


def size(count: float) -> str:
    """`1.5 GiB`."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
