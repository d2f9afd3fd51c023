"""What the doctor thinks of a machine, as a table of machines; and the doctor itself on this one."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from samestep.launcher.doctor import machine
from samestep.launcher.doctor.verdict import GIB, MIB, Row, judge, unknown_interfaces, worst

TORCH: dict[str, Any] = {
    "version": "2.13.0+cpu",
    "cuda_build": None,
    "cuda_problem": "",
    "devices": [],
    "gloo": True,
    "nccl": False,
}
CUDA = TORCH | {"version": "2.13.0", "cuda_build": "13.0", "nccl": True}
DISK = {"path": "runs", "free_bytes": 100 * GIB, "write_bytes_per_s": 500 * MIB, "fsync_seconds": 0.004}
PORTS = {"problem": "", "holder": "", "range": [32768, 60999]}
LINK = {"ranks": 2, "latency_seconds": 1e-4, "bus_bytes_per_s": 1e9, "largest_bytes": 64 * MIB}
GOOD: dict[str, Any] = {
    "python": "3.11.7",
    "torch": TORCH,
    "gpus": 0,
    "gpu_driver": "",
    "cpus": 8,
    "cpus_present": 8,
    "cpus_physical": 4,
    "cpu_quota": None,
    "numa_nodes": 1,
    "memory_bytes": 64 * GIB,
    "memory_free_bytes": 60 * GIB,
    "shm_bytes": 8 * GIB,
    "open_files": 65536,
    "processes": float("inf"),
    "disk": DISK,
    "clock_seconds": 1e-9,
    "clock_synced": True,
    "interfaces": {"lo": True, "eth0": True, "ib0": False},
    "interface_choice": {},
    "loopback": True,
    "host": "node1",
    "host_resolves": True,
    "ports": PORTS,
    "links": {"gloo": LINK},
}

# what differs from GOOD, then row, level and a word of its value or hint
MACHINES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no torch": ({"torch": {"problem": "No module named 'torch'"}}, "torch", "error", "No module named"),
    "old torch": ({"torch": TORCH | {"version": "2.9.1"}}, "torch", "error", "2.10 or newer"),
    "new torch": ({"torch": TORCH | {"version": "3.0.0a0+git12"}}, "torch", "ok", "3.0.0a0"),
    "no gloo": ({"torch": TORCH | {"gloo": False}}, "backends", "error", "gloo"),
    "GPU": ({"torch": CUDA | {"devices": ["H100"] * 2}, "gpus": 2}, "devices", "ok", "2 x H100"),
    "GPU, no NCCL": ({"torch": CUDA | {"devices": ["H100"], "nccl": False}, "gpus": 1}, "devices", "warning", "NCCL"),
    "GPU, CPU build": ({"gpus": 1}, "devices", "warning", "CPU build"),
    "GPU, old driver": (
        {"torch": CUDA | {"cuda_problem": "driver is too old"}, "gpus": 1, "gpu_driver": "470.1"},
        "devices",
        "error",
        "470.1: driver is too old",
    ),
    "quota": ({"cpu_quota": 1.5}, "processors", "warning", "quota of 1.5"),
    "quota above the CPUs": ({"cpu_quota": 16.0}, "processors", "ok", "8 of 8"),
    "pinned": ({"cpus": 2}, "processors", "ok", "2 of 8 usable"),
    "unknown cores": ({"cpus_physical": None}, "processors", "ok", "unknown physical"),
    "two nodes": ({"numa_nodes": 2}, "NUMA", "warning", "numactl"),
    "little memory": ({"memory_free_bytes": GIB // 2}, "memory", "warning", "512 MiB free"),
    "container": ({"shm_bytes": 64 * MIB}, "shared memory", "warning", "--shm-size"),
    "tiny shm": ({"shm_bytes": MIB}, "shared memory", "error", "--shm-size"),
    "no shm": ({"shm_bytes": None}, "shared memory", "error", "missing"),
    "1024 files": ({"open_files": 1024}, "open files", "warning", "ulimit -n"),
    "64 files": ({"open_files": 64}, "open files", "error", "ulimit -n"),
    "few processes": ({"processes": 100}, "processes", "warning", "ulimit -u"),
    "unlimited": ({}, "processes", "ok", "unlimited"),
    "read-only": ({"disk": {"path": "/x", "problem": "Read-only file system"}}, "disk", "error", "--run-dir"),
    "full": ({"disk": DISK | {"free_bytes": MIB}}, "disk space", "error", "1 MiB free"),
    "nearly full": ({"disk": DISK | {"free_bytes": 2 * GIB}}, "disk space", "warning", "2.0 GiB free"),
    "slow disk": ({"disk": DISK | {"write_bytes_per_s": 5 * MIB}}, "disk speed", "warning", "5 MiB/s"),
    "slow fsync": ({"disk": DISK | {"fsync_seconds": 0.5}}, "fsync", "warning", "500.00 ms"),
    "coarse clock": ({"clock_seconds": 1e-2}, "clock", "warning", "phase times"),
    "free clock": ({"clock_synced": False}, "clock", "warning", "NTP"),
    "unknown clock": ({"clock_synced": None}, "clock", "ok", "not known"),
    "no loopback": ({"loopback": False}, "network", "error", "ip link set lo up"),
    "no such interface": ({"interface_choice": {"GLOO_SOCKET_IFNAME": "eth"}}, "GLOO_SOCKET_IFNAME", "error", "eth0"),
    "an interface": ({"interface_choice": {"GLOO_SOCKET_IFNAME": "lo"}}, "GLOO_SOCKET_IFNAME", "ok", "lo"),
    "no name": ({"host_resolves": False}, "host name", "warning", "/etc/hosts"),
    "no ports": ({"ports": PORTS | {"problem": "no connection"}}, "ports", "error", "no connection"),
    "taken port": ({"ports": PORTS | {"holder": "pid 7 (python)"}}, "ports", "warning", "pid 7"),
    "slow link": ({"links": {"gloo": LINK | {"bus_bytes_per_s": 1e6}}}, "2 ranks, gloo", "warning", "0.00 GB/s"),
    "late link": ({"links": {"gloo": LINK | {"latency_seconds": 0.02}}}, "2 ranks, gloo", "warning", "20000 us"),
    "broken link": ({"links": {"gloo": {"ranks": 2, "problem": "boom"}}}, "2 ranks, gloo", "error", "boom"),
    "NCCL below its own bar": ({"links": {"nccl": LINK}}, "2 ranks, nccl", "warning", "1.00 GB/s"),
}


def test_nothing_is_wrong_with_a_good_machine():
    rows = judge(GOOD)
    assert [row for row in rows if row.level != "ok" or row.hint] == []
    assert worst(rows) == "ok"


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_gets_the_row_it_deserves_and_no_other_alarm(name):
    change, row_name, level, word = MACHINES[name]
    rows = judge(GOOD | change)
    (row,) = [row for row in rows if row.name == row_name]
    assert row.level == level
    assert word in f"{row.value} {row.hint}"
    assert bool(row.hint) == (level != "ok"), "a hint for each alarm, and for nothing else"
    others = [other for other in rows if other is not row and other.level != "ok"]
    assert others == []


def test_the_worst_row_counts():
    rows = [Row("a", "ok", ""), Row("b", "warning", "")]
    assert worst(rows) == "warning"
    assert worst([*rows, Row("c", "error", "")]) == "error"
    assert worst([]) == "ok"


@pytest.mark.parametrize(
    ("variable", "text", "unknown"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", []),
        ("GLOO_SOCKET_IFNAME", "eth0,lo", []),
        ("GLOO_SOCKET_IFNAME", "eth", ["eth"]),
        ("NCCL_SOCKET_IFNAME", "eth", []),
        ("NCCL_SOCKET_IFNAME", "=eth", ["eth"]),
        ("NCCL_SOCKET_IFNAME", "=eth0,bond0", ["bond0"]),
        ("NCCL_SOCKET_IFNAME", "^docker,veth", []),
        ("NCCL_SOCKET_IFNAME", "ens", ["ens"]),
    ],
)
def test_interfaces_are_chosen_as_each_backend_reads_its_variable(variable, text, unknown):
    assert unknown_interfaces(variable, text, {"lo": True, "eth0": True}) == unknown


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_either_kind_of_control_group_is_read(tmp_path, files, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.cpu_quota(tmp_path) == quota


def test_nodes_without_a_cpu_of_ours_do_not_count(tmp_path):
    mine = min(os.sched_getaffinity(0))
    for node, cpus in enumerate([f"{mine}", "4000-4003,4010", ""]):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(f"{cpus}\n")
    assert machine.numa_nodes(tmp_path) == 1
    assert machine.numa_nodes(tmp_path / "nowhere") == 1


def test_the_disk_is_measured_and_left_as_it_was(tmp_path):
    found = machine.disk(tmp_path / "runs" / "not yet")
    assert found["path"] == str(tmp_path)
    assert min(found["free_bytes"], found["write_bytes_per_s"], found["fsync_seconds"]) > 0
    assert list(tmp_path.iterdir()) == []


def test_this_machine_is_described_with_torch_and_without_ranks(samestep):
    ended = samestep("doctor", "--nproc-per-node", "1", "--json")
    assert ended.stderr == ""
    answer = json.loads(ended.stdout)
    assert ended.code == (answer["level"] == "error")
    assert answer["facts"]["torch"]["gloo"] is True
    assert {"torch", "disk speed", "fsync", "clock", "ports"} <= {row["name"] for row in answer["rows"]}


@pytest.mark.slow
def test_two_real_ranks_are_measured_from_4_bytes_to_64_mebibytes(samestep):
    ended = samestep("doctor", "--json", env={"RANK": "0"})  # a stray variable of somebody else
    link = json.loads(ended.stdout)["facts"]["links"]["gloo"]
    assert "problem" not in link, link
    times = {int(size): seconds for size, seconds in link["seconds_by_bytes"].items()}
    assert (min(times), max(times)) == (4, 64 * MIB)
    assert 0 < times[4] < times[64 * MIB]
    assert not list(samestep.cwd.iterdir()), "the ranks' run directory is gone"


def test_a_broken_torch_and_a_wrong_interface_are_errors_with_exit_1(samestep):
    (samestep.cwd / "torch.py").write_text("raise ImportError('libcudart.so.99: cannot open shared object file')")
    env = {"PYTHONPATH": str(samestep.cwd), "GLOO_SOCKET_IFNAME": "nope0"}
    ended = samestep("doctor", "--quiet", env=env)
    assert ended.code == 1
    assert "libcudart.so.99" in ended.stdout
    assert "no interface nope0" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
    assert not [line for line in ended.stdout.splitlines() if line.startswith("ok ")]


def test_a_machine_that_gets_too_little_time_is_told_the_option(samestep):
    ended = samestep("doctor", "--nproc-per-node", "1", "--timeout", "0.01")
    assert ended.code == 1
    assert "no answer within 0.01 s of --timeout" in ended.stdout
    assert "give it longer with --timeout" in ended.stdout
    assert "install samestep" not in ended.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--nproc-per-node", "0"), "at least 1"), (("--timeout", "0"), "above 0"), (("--josn",), "did you mean --json?")],
)
def test_mistakes_are_named(samestep, words, said):
    ended = samestep("doctor", *words)
    assert (ended.code, ended.stdout) == (2, "")
    assert said in ended.stderr
