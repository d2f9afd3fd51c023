"""What the kernel counts, read from folders as both versions of cgroups write them, and from a real lack of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from samestep.launcher.diagnosis import memory_signs
from samestep.launcher.diagnosis.memory_signs import MemorySigns, footprint, peak_resident, read, size

ACTOR = Path(__file__).parent.parent / "workers" / "actor.py"
V1 = Path("/sys/fs/cgroup/memory")


def tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("own", "files"),
    [
        (
            "0::/a/b\n",
            {
                "a/b/memory.events": "low 0\noom 4\noom_kill 3\noom_group_kill 0\n",
                "a/b/memory.max": "max\n",
                "a/memory.events": "oom_kill 9\n",
                "a/memory.max": "1048576\n",
            },
        ),
        (
            "5:cpu:/x\n4:memory:/a/b\n0::/\n",
            {
                "memory/a/b/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
                "memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/a/memory.oom_control": "oom_kill 9\n",
                "memory/a/memory.limit_in_bytes": "1048576\n",
            },
        ),
        (  # in a container the path is the host's, and our own folder is the root
            "0::/docker/123\n",
            {"memory.events": "oom_kill 3\n", "memory.max": "1048576\n"},
        ),
    ],
    ids=["v2", "v1", "container"],
)
def test_counters_and_the_tightest_limit_are_found(own, files, tmp_path):
    tree(tmp_path / "cgroup", files)
    (tmp_path / "own").write_text(own)
    signs = read(tmp_path / "cgroup", tmp_path / "own", tmp_path)
    assert (signs.oom_kills, signs.limit) == (3, 1 << 20)
    assert 0 < signs.shared_used <= signs.shared_size


def test_a_system_that_tells_nothing_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_signs, "_machine", lambda: 1 << 60)
    assert read(tmp_path / "none", tmp_path / "none", tmp_path / "none") == MemorySigns(0, 1 << 60, 0, 0)


def test_kills_are_counted_from_the_start_of_the_generation():
    assert MemorySigns(5, 7, 8, 9).since(MemorySigns(3, 1, 1, 1)) == MemorySigns(2, 7, 8, 9)


def test_pages_shared_with_others_count_in_part():
    mine = footprint(os.getpid())
    assert mine is None or 0 < mine.proportional <= mine.resident
    assert footprint(0) is None


@pytest.mark.parametrize(
    ("number", "text"), [(12, "12 B"), (3 << 29, "1.5 GiB"), (64 << 20, "64.0 MiB"), (2048, "2 KiB")]
)
def test_sizes_are_read_by_people(number, text):
    assert size(number) == text


@pytest.fixture
def tight():
    """A memory cgroup of 200 MB of our own."""
    group = V1 / f"samestep-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("200000000")
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield group
    group.rmdir()


@pytest.mark.processes
def test_a_rank_that_the_kernel_ended_for_lack_of_memory_is_said_so(tight, tmp_path):
    words = [sys.executable, "-m", "samestep.launcher", "run", "--nproc-per-node", "2", str(ACTOR), "0=wait", "1=eat"]
    enter = f"import os, pathlib; pathlib.Path('{tight}/cgroup.procs').write_text(str(os.getpid())); "
    code = enter + f"os.execv({sys.executable!r}, {words!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "rank 1 failed: killed by SIGKILL (signal 9): the kernel ended it for lack of memory" in done.stderr
    assert "MiB of 190.7 MiB at most" in done.stderr


@pytest.mark.parametrize(
    ("own", "files"),
    [
        (
            "0::/a/b\n",
            {
                "a/b/memory.events": "",
                "a/b/memory.max": "max\n",
                "a/memory.events": "",
                "a/memory.max": "1000000\n",
                "a/memory.current": "700000\n",
                "a/memory.stat": "anon 400000\ninactive_file 300000\n",
            },
        ),
        (
            "4:memory:/a\n",
            {
                "memory/a/memory.oom_control": "",
                "memory/a/memory.limit_in_bytes": "1000000\n",
                "memory/a/memory.usage_in_bytes": "700000\n",
                "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 300000\n",
            },
        ),
    ],
    ids=["v2", "v1"],
)
def test_what_a_container_has_left_is_less_than_what_the_machine_has(own, files, tmp_path):
    tree(tmp_path / "cgroup", files)
    (tmp_path / "own").write_text(own)
    assert memory_signs.left(tmp_path / "cgroup", tmp_path / "own") == 600_000


def test_without_a_limit_nothing_is_told_of_what_is_left(tmp_path):
    (tmp_path / "own").write_text("0::/\n")
    assert memory_signs.left(tmp_path, tmp_path / "own") >= 1 << 60


def test_the_peak_is_that_of_this_program_not_of_whoever_has_started_it():
    child = "from samestep.launcher.diagnosis.memory_signs import peak_resident; print(peak_resident())"
    parent = f"import subprocess, sys; held = b'x' * (400 << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    said = subprocess.run([sys.executable, "-c", parent], check=True, capture_output=True, text=True, timeout=60)
    assert 1 << 20 < int(said.stdout) < 200 << 20


def test_where_the_system_does_not_tell_there_is_no_peak(tmp_path):
    assert peak_resident(tmp_path) is None
    tree(tmp_path, {"self/status": "Name:\tx\nVmRSS:\t  10 kB\n"})
    assert peak_resident(tmp_path) is None
    tree(tmp_path, {"self/status": "Name:\tx\nVmHWM:\t  10 kB\n"})
    assert peak_resident(tmp_path) == 10240
