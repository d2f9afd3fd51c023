"""The blows themselves. Whatever is hit was started by the run at hand: its launcher, or a process below that."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil

from samestep.launcher import manifest
from samestep.launcher.chaos.kinds import Aim, Kind
from samestep.launcher.contract import RunDir
from samestep.launcher.supervise.process import end

_SERVER = "fork_server import main"


def present(kind: Kind, launcher: subprocess.Popen[bytes], ranks: dict[int, int]) -> bool:
    """Whether what a fault hits while ranks join has been started."""
    if kind.aim in (Aim.RANK, Aim.ALL_RANKS, Aim.LOADER):
        return bool(_ranks(launcher.pid, ranks))
    return kind.aim is not Aim.SERVER or bool(_servers(launcher.pid, ranks))


def strike(kind: Kind, rank: int, launcher: subprocess.Popen[bytes], ranks: dict[int, int], run_dir: RunDir) -> bool:
    """Do it; False if what it would hit isn't there. `ranks` are the process ids that the run has told."""
    below = _below(launcher.pid)
    hit: list[psutil.Process] = []
    match kind.aim:
        case Aim.LAUNCHER:
            launcher.send_signal(kind.signum)
            return True
        case Aim.FILES:
            return _harm_files(kind, launcher, run_dir)
        case Aim.SERVER:
            hit = _servers(launcher.pid, ranks)[:1]
        case Aim.LOADER:
            hit = [child for child in below if child.ppid() == ranks.get(rank)][:1]
        case Aim.ALL_RANKS:
            hit = _ranks(launcher.pid, ranks)
        case Aim.RANK:
            known = [process for process in below if process.pid == ranks.get(rank)]
            others = _ranks(launcher.pid, ranks)
            hit = known or others[rank % len(others) :][:1] if known or others else []
    for process in hit:
        _hit(process, kind)
    return bool(hit)


def _below(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def _servers(launcher: int, ranks: dict[int, int]) -> list[psutil.Process]:
    """A fork of the server has its command line: it is the oldest that the run does not know as a rank."""
    with contextlib.suppress(psutil.Error):
        unknown = [child for child in psutil.Process(launcher).children() if child.pid not in ranks.values()]
        found = [child for child in unknown if any(_SERVER in word for word in child.cmdline())]
        return sorted(found, key=lambda process: process.create_time())
    return []


def _ranks(launcher: int, ranks: dict[int, int]) -> list[psutil.Process]:
    """Ranks as the system knows them, also while they have not told who they are yet."""
    servers = _servers(launcher, ranks)[:1]
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(launcher)
        unready = parent.cmdline()  # what a child is called until it has become its program
        return [child for child in parent.children() if child not in servers and child.cmdline() != unready]
    return []


def _hit(process: psutil.Process, kind: Kind) -> None:
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        if kind.signum:
            process.send_signal(kind.signum)
            if kind.resumed_after is not None:
                time.sleep(kind.resumed_after)
                process.send_signal(signal.SIGCONT)
            return
        limit = resource.RLIMIT_FSIZE if kind.name.endswith("disk") else resource.RLIMIT_NOFILE
        before = process.rlimit(limit)
        process.rlimit(limit, (8, before[1]))
        time.sleep(kind.resumed_after or 0.0)
        process.rlimit(limit, before)


def _harm_files(kind: Kind, launcher: subprocess.Popen[bytes], run_dir: RunDir) -> bool:
    if kind.needs_two_checkpoints and not _may_lose_one(run_dir):
        return False
    end(launcher)
    if kind.needs_two_checkpoints and not _may_lose_one(run_dir):  # what was seen a moment ago was replaced meanwhile
        return True
    newest = manifest.committed(run_dir.checkpoints)[:1]
    choose = random.Random(run_dir.events.stat().st_size if run_dir.events.exists() else 0)
    if kind.needs_two_checkpoints:
        _damage(newest[0], kind, choose)
    elif kind.name == "unfinished-save":
        step = manifest.step_of(newest[0]) if newest else 0
        shutil.rmtree(run_dir.checkpoint(step + 1).with_suffix(".tmp-9"), ignore_errors=True)
        run_dir.checkpoint(step + 1).with_suffix(".tmp-9").mkdir(parents=True)
        (run_dir.checkpoint(step + 1).with_suffix(".tmp-9") / "model.safetensors").write_bytes(b"half")
    elif kind.name == "torn-events" and run_dir.events.exists():
        with run_dir.events.open("ab") as file:
            file.write(b'{"event": "step", "st')
    elif kind.name == "lost-errors":
        shutil.rmtree(run_dir.errors, ignore_errors=True)
    return True


def _may_lose_one(run_dir: RunDir) -> bool:
    """Whether another valid one stays where the newest is damaged: of all that are kept, none may be left otherwise."""
    folders = manifest.committed(run_dir.checkpoints)
    return bool(folders) and any(not manifest.verify(folder) for folder in folders[1:])


def _damage(folder: Path, kind: Kind, choose: random.Random) -> None:
    file = choose.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    data = bytearray(file.read_bytes())
    if kind.name.endswith("flip"):
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        file.write_bytes(bytes(data))
    elif kind.name.endswith("truncate"):
        os.truncate(file, choose.randrange(len(data)))
    else:
        file.unlink()
