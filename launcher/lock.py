"""Who owns a run directory, and which start of it is the newest: `lock`, a JSON object held with flock.

The kernel lets go of the lock when its owner ends, however it ends, so an old file never stands in the way; what it
says is for people, and for file systems whose locks don't reach other hosts. Its generation grows with every start of
ranks, from a random number on: a process of an earlier start, also one whose run directory was removed and made anew,
sees that it was replaced, and publishes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path

from samestep.launcher.contract import ENV_RUN_DIR, ExitCode, RunDir, UsageError

# Other programs' arguments are their own
OTHER_RUN_DIR = f"--run-dir after a recipe, the variable {ENV_RUN_DIR} for another program"
_BYTES = 512  # always as many, so that one write replaces all of it
_MOST_FIRST = 1 << 30
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SupersededError(UsageError):
    """A newer start of the run owns the directory: this process must not publish anything."""

    def __init__(self, message: str, hint: str = "the newest start goes on; nothing of this one is needed") -> None:
        super().__init__(message, hint, ExitCode.FAILED)


@dataclass(frozen=True, slots=True)
class Owner:
    """What the file says; `pid` is 0 when nobody holds the lock."""

    pid: int = 0
    host: str = ""
    boot_id: str = ""
    start_time: int = 0  # of the process, in clock ticks since boot: a number of a dead process may be given again
    generation: int = 0

    @classmethod
    def here(cls, generation: int) -> Owner:
        """This process."""
        return cls(os.getpid(), socket.gethostname(), _boot_id(), start_time(os.getpid()), generation)

    @classmethod
    def of(cls, text: bytes) -> Owner:
        """Inverse of `encode`; whatever can't be read is nobody's."""
        try:
            data = json.loads(text)
            return cls(*(kind(data[name]) for name, kind in _FIELDS.items()))
        except (ValueError, KeyError, TypeError):
            return cls()

    def encode(self) -> bytes:
        """As it is stored."""
        return json.dumps(asdict(self)).encode().ljust(_BYTES - 1) + b"\n"

    def may_live(self) -> bool:
        """False where the owner is certainly gone."""
        if not self.pid:
            return False
        if self.host != socket.gethostname():
            return True
        return self.boot_id == _boot_id() and self.start_time == start_time(self.pid)


_FIELDS = {"pid": int, "host": str, "boot_id": str, "start_time": int, "generation": int}


class RunLock:
    """The lock of one run directory, held until `release` or the end of this process."""

    def __init__(self, run_dir: RunDir) -> None:
        """Take it.

        Raises:
            UsageError: somebody else holds it.
            OSError: the file can't be opened or written.
        """
        self._path = run_dir.lock
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _held.add(self)
        refusal = self._try()
        found = Owner.of(os.pread(self._fd, _BYTES, 0))  # not before: its owner may have begun another start until then
        # a file system without locks: what the file says has to do
        if refusal in (errno.EWOULDBLOCK, errno.EACCES) or (refusal and found.may_live()):
            self._forget()
            raise _in_use(run_dir, found)
        self.generation = (found.generation or secrets.randbelow(_MOST_FIRST)) + 1
        try:
            self._write(Owner.here(self.generation))
        except OSError:
            self._forget()
            raise

    def _try(self) -> int:
        """0 where the lock is ours, else the errno."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def next_generation(self) -> int:
        """Begin a new start of ranks; every earlier one may publish nothing from now on.

        Where the disk is full the file and so the number stay: the ranks of the start before, whose it is, have ended.
        """
        with contextlib.suppress(OSError):
            self._write(Owner.here(self.generation + 1))
            self.generation += 1
        return self.generation

    def release(self) -> None:
        """Let others have the directory; the generation stays in the file."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # a full disk: who reads it sees that we are gone
                self._write(Owner(generation=self.generation))
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # a child forked this instant may not have closed its copy yet
            self._forget()

    def _write(self, owner: Owner) -> None:
        if os.pwrite(self._fd, owner.encode(), 0) != _BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _forget(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked child would hold them for longer than we live."""
    for held in list(_held):
        held._forget()


os.register_at_fork(after_in_child=_forget_in_child)


def check(run_dir: RunDir, generation: int | None) -> None:
    """Judge whether the start with this generation is the newest one; None is not fenced.

    Raises:
        SupersededError: it is not.
    """
    if generation is None:
        return
    try:
        owner = Owner.of(run_dir.lock.read_bytes())
    except OSError as error:
        raise SupersededError(
            f"{run_dir.lock} can't be read ({error.strerror}): it was removed while we run",
            "without it nobody knows whose the run directory is, and nothing is published: leave the folder in place "
            "while it trains, and start again",
        ) from None
    if owner.generation != generation:
        raise SupersededError(
            f"this is no longer the newest start of the run: {run_dir.lock} belongs to another one "
            f"(pid {owner.pid} on {owner.host}), and nothing is published"
        )


def _in_use(run_dir: RunDir, owner: Owner) -> UsageError:
    who = f"pid {owner.pid} on {owner.host}" if owner.pid else "another process"
    return UsageError(
        f"the run directory {run_dir.path} is expected to be free, but is in use by {who}",
        f"wait for it or stop it, or choose another directory: {OTHER_RUN_DIR}",
    )


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat, counted behind the name, which may hold spaces; -1 if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return -1
