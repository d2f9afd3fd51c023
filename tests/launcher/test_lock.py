"""One owner a run directory: named to whom comes second, forgotten when dead, and only the newest start publishes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
from dataclasses import replace

import pytest

from samestep.launcher.contract import RunDir, UsageError
from samestep.launcher.lock import Owner, RunLock, SupersededError, check
from samestep.launcher.run_dir import own

from .conftest import WORKERS, wait_until


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path)


def stored(run_dir):
    return json.loads(run_dir.lock.read_bytes())


def test_the_file_tells_who_holds_it(run_dir):
    lock = RunLock(run_dir)
    assert (stored(run_dir)["pid"], stored(run_dir)["host"]) == (os.getpid(), socket.gethostname())
    assert Owner.of(run_dir.lock.read_bytes()).may_live()
    lock.release()
    assert stored(run_dir)["pid"] == 0
    assert not Owner.of(run_dir.lock.read_bytes()).may_live()


def test_a_second_owner_is_refused_with_pid_and_host_of_the_first(run_dir):
    lock = RunLock(run_dir)
    with pytest.raises(UsageError, match=f"in use by pid {os.getpid()} on {socket.gethostname()}"):
        RunLock(run_dir)
    lock.release()
    RunLock(run_dir).release()


def test_generations_grow_over_starts_and_owners(run_dir):
    first = RunLock(run_dir)
    begun = first.generation
    assert first.next_generation() == begun + 1
    first.release()
    first.release()
    second = RunLock(run_dir)
    assert second.generation == begun + 2
    second.release()


@pytest.mark.parametrize(
    ("change", "lives"),
    [
        ({}, True),
        ({"pid": 2**22 + 1}, False),
        ({"boot_id": "another boot"}, False),
        ({"start_time": 1}, False),  # the number was given to another process
        ({"pid": 0}, False),
        ({"host": "elsewhere"}, True),  # nobody here can tell
    ],
)
def test_a_stale_owner_is_recognised(change, lives):
    assert replace(Owner.here(1), **change).may_live() == lives


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff"])
def test_a_damaged_file_is_nobodys(text, run_dir):
    run_dir.lock.write_bytes(text)
    lock = RunLock(run_dir)
    assert stored(run_dir)["generation"] == lock.generation > 0
    lock.release()


def test_no_two_owners_get_the_same_generation_however_late_the_first_one_lets_go(run_dir, monkeypatch):
    first, flock = RunLock(run_dir), fcntl.flock

    def late(descriptor, operation):
        if operation & fcntl.LOCK_NB:
            first.next_generation()
            first.release()
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    second = RunLock(run_dir)
    assert second.generation == first.generation + 1
    second.release()


def test_a_lock_that_does_not_fit_on_the_disk_is_nobodys_and_a_restart_keeps_its_generation(run_dir, limit):
    for most in (0, 100):
        limit(most)
        with pytest.raises(OSError, match=r"File too large|No space left"):
            RunLock(run_dir)
    with pytest.raises(UsageError, match=r"is expected to be writable, but (file too large|no space left)"):
        own(run_dir.path)
    limit(1 << 20)
    lock = RunLock(run_dir)
    limit(0)
    before = lock.generation
    assert lock.next_generation() == before == stored(run_dir)["generation"]
    check(run_dir, lock.generation)
    limit(1 << 20)
    assert lock.next_generation() == stored(run_dir)["generation"] == before + 1
    lock.release()


def test_an_earlier_start_may_publish_nothing(run_dir):
    lock = RunLock(run_dir)
    check(run_dir, lock.generation)
    check(run_dir, None)
    earlier, later = lock.generation, lock.next_generation()
    check(run_dir, later)
    with pytest.raises(SupersededError, match=f"no longer the newest start of the run.*pid {os.getpid()} "):
        check(run_dir, earlier)
    lock.release()
    check(run_dir, later)
    run_dir.lock.unlink()
    with pytest.raises(SupersededError, match="was removed") as error:
        check(run_dir, later)
    assert "leave the folder in place" in error.value.hint


def test_a_run_begun_anew_where_the_folder_was_removed_is_not_taken_for_the_old_one(run_dir):
    old = RunLock(run_dir)
    old.next_generation()
    run_dir.lock.unlink()
    new = RunLock(run_dir)
    new.next_generation()
    check(run_dir, new.generation)
    with pytest.raises(SupersededError):
        check(run_dir, old.generation)
    for lock in (old, new):
        lock.release()


def test_a_forked_child_holds_no_lock(run_dir):
    lock = RunLock(run_dir)
    done, finish = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(done, 1)
        os._exit(0)
    try:
        lock.release()
        RunLock(run_dir).release()  # while the child still lives
    finally:
        os.write(finish, b".")
        assert os.waitpid(child, 0)[1] == 0
        os.close(done)
        os.close(finish)


def test_two_launchers_on_one_run_directory(samestep):
    process = samestep.start_acting("*=wait")
    second = samestep.act("*=say:mine")
    assert (second.code, second.stdout) == (2, "")
    assert f"runs/actor is expected to be free, but is in use by pid {process.pid} on" in second.stderr
    assert "--run-dir after a recipe, the variable SAMESTEP_RUN_DIR for another program" in second.stderr
    beside = samestep("run", WORKERS / "actor.py", "*=say:mine", env={"SAMESTEP_RUN_DIR": "runs/beside"})
    assert (beside.code, beside.stdout) == (0, "mine\n")
    process.send_signal(signal.SIGKILL)
    process.wait()
    third = samestep.act("*=say:mine")
    assert (third.code, third.stdout, third.stderr) == (0, "mine\n", "")


def test_every_start_of_ranks_has_a_generation_of_its_own(samestep):
    (samestep.cwd / "show.py").write_text("import os; print(os.environ['SAMESTEP_FENCE']); os._exit(3)")
    ended = samestep("run", "--max-restarts", "1", "show.py")
    first, second = map(int, ended.stdout.split())
    assert second == first + 1
    assert json.loads((samestep.cwd / "runs/show/lock").read_text())["generation"] == second


def test_a_killed_launchers_ranks_and_all_that_they_started_are_gone(samestep):
    process = samestep.start_acting("*=ignore-term,spawn,wait", ranks=3)
    pids = [int(path.read_text()) for path in samestep.cwd.glob("*.pid")]
    assert len(pids) == 9  # each rank left its own twice, and that of its child
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(map(alive, pids)), "nobody of the run lives", seconds=2)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 (a race: opened or gone)
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ranks_die_although_their_interpreter_is_locked(samestep):
    (samestep.cwd / "busy.py").write_text(
        "import re, pathlib\n"
        "import os, signal\n"
        "[signal.signal(number, signal.SIG_IGN) for number in (1, 2, 15, 29)]\n"
        "pathlib.Path('busy.pid').write_text(str(os.getpid()))\n"
        "re.match(r'(a?){40}a{40}', 'a' * 40)\n"
    )
    process = samestep.start("run", "busy.py")
    note = samestep.cwd / "busy.pid"
    wait_until(lambda: note.exists() and bool(note.read_text()), "it is busy")
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not alive(int(note.read_text())), "it is gone", seconds=2)
