"""What `--resume` comes to at this start, and a run directory that agrees with it.

`never` and a PATH say where a run begins, and it begins once. Later starts of the same launch have the same flags, and
so has a command that is typed again because the run was preempted: they go on from what was saved since. config.json
keeps how the run was begun.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from samestep.launcher import lock, manifest
from samestep.launcher.contract import RunDir, UsageError
from samestep.train.state import checkpoint

# Events that describe starts and faults, not training: they stay when a resume cuts what is done again.
_LIFECYCLE = frozenset({"run_started", "restarted", "resumed", "preempted", "worker_failed", "warning"})
# Events that say after which step: those of steps that the checkpoint holds came late, because the disk was full.
_STEP_OF = {"checkpoint": "step", "run_finished": "steps", "step": "step", "eval": "step"}


@dataclass(frozen=True, slots=True)
class Begun:
    """How a run was begun; empty where nobody knows.

    Attributes:
        resume: auto, never, or the absolute path of a checkpoint.
        launch: what the launcher calls itself, in each of its starts of ranks.
        job: Slurm's number, which a requeued job keeps.
    """

    resume: str = ""
    launch: str = ""
    job: str = ""

    @classmethod
    def here(cls, resume: str, environ: Mapping[str, str]) -> Begun:
        """By this process."""
        launch = environ.get("TORCHELASTIC_RUN_ID", "")
        if launch == "none":  # torchrun's default: the agent, our parent, is all that tells two launches apart
            launch = f"{socket.gethostname()}-{os.getppid()}-{lock.start_time(os.getppid())}"
        return cls(_name(resume), launch, environ.get("SLURM_JOB_ID", ""))

    @classmethod
    def read(cls, run_dir: RunDir) -> Begun:
        """As the last start has written it."""
        try:
            known = json.loads(run_dir.config.read_text())["begun"]
            return cls(*(str(known[name]) for name in ("resume", "launch", "job")))
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def by_this_launch(self, environ: Mapping[str, str]) -> bool:
        """Whether this start is a later one of the launch, or of the requeued job, that began the run."""
        here = Begun.here("auto", environ)
        restarted = _count(environ, "TORCHELASTIC_RESTART_COUNT") > 0 and here.launch == self.launch != ""
        requeued = _count(environ, "SLURM_RESTART_COUNT") > 0 and here.job == self.job != ""
        return restarted or requeued


def _count(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def _name(resume: str) -> str:
    return resume if resume in ("auto", "never") else str(Path(resume).resolve())


def is_elsewhere(run_dir: RunDir, resume: str) -> bool:
    """Whether `--resume` names a checkpoint that is none of this run directory's own."""
    if resume in ("auto", "never"):
        return False
    path = Path(resume).resolve()
    return path.parent != run_dir.checkpoints.resolve() or not manifest.is_step(path)


def settle(run_dir: RunDir, resume: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """What `--resume` comes to here: auto, never or a path; and a sentence for who typed it, where it is not that.

    The same path again is taken for "run it again", unless the run that began there has ended inside its own directory.
    """
    begun, own = Begun.read(run_dir), manifest.committed(run_dir.checkpoints)
    if resume == "auto" or not own or begun.resume != _name(resume):
        return resume, ""
    later = begun.by_this_launch(environ)
    if resume == "never":
        return ("auto" if later else resume), ""
    elsewhere, newest = is_elsewhere(run_dir, resume), manifest.step_of(own[0])
    if not elsewhere and newest <= manifest.step_of(Path(resume).resolve()):
        return resume, ""
    if later:
        return "auto", ""
    if not elsewhere and _ended_with(run_dir, newest):
        return resume, ""
    return "auto", f"--resume {resume}: the run was begun there before, and goes on from what it has saved since"


def look(run_dir: RunDir, resume: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """Choose a checkpoint, set damaged ones aside, cut events to what the choice knows; the answer is JSON.

    Raises:
        UsageError: see `checkpoint.find`; a run with checkpoints of its own is told to go on from another run's; or
            its events can't be read.
    """
    starts = _starts(run_dir)  # first: nothing is set aside where events can't be read
    checkpoint.remove_unfinished(run_dir)
    meant, note = settle(run_dir, resume, environ)
    path, damaged = checkpoint.find(run_dir, meant)
    own = manifest.committed(run_dir.checkpoints)
    if own and is_elsewhere(run_dir, meant):
        raise UsageError(
            f"--resume is expected to name a checkpoint of {run_dir.path}, which has {len(own)} of its own, "
            f"but is {resume}",
            "begin another run there with another --run-dir, or leave --resume out to go on with this one",
        )
    warnings = []
    for folder, problem in damaged:
        aside = checkpoint.set_aside(folder)
        warnings.append(f"checkpoint {folder.name} is damaged ({problem}); set aside as {aside.name}")
    begun = Begun.read(run_dir) if meant == "auto" and path else Begun.here(resume, environ)
    elsewhere = path is not None and is_elsewhere(run_dir, str(path))
    seen = {"path": str(path or ""), "warnings": warnings, "ended": False, "note": note, "begun": asdict(begun)}
    seen |= {"elsewhere": elsewhere, "starts": starts}
    if path is None or elsewhere:
        cut_events(run_dir, 0, 0)
        return seen
    step = manifest.step_of(path)
    for folder in manifest.committed(run_dir.checkpoints):
        if manifest.step_of(folder) > step:  # only where --resume names an older one: its future is written anew
            aside = checkpoint.set_aside(folder, "superseded")
            warnings.append(f"checkpoint {folder.name} is newer than the one resumed from; set aside as {aside.name}")
    cut_events(run_dir, checkpoint.load_state(path)["events_offset"], step)
    return seen | {"ended": _ended_with(run_dir, step)}


def _events(run_dir: RunDir) -> bytes:
    try:
        return run_dir.events.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UsageError(
            f"{run_dir.events} is expected to be a file that can be read, but: {error.strerror}",
            "move it away, or pass another --run-dir",
        ) from None


def _starts(run_dir: RunDir) -> list[float]:
    """Times of the starts so far, seconds since 1970."""
    times = []
    for line in _events(run_dir).splitlines():
        if b'"run_started"' in line or b'"restarted"' in line:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(line)
                times += [float(event["time"])] if event["event"] in ("run_started", "restarted") else []
    return times


def _ended_with(run_dir: RunDir, step: int) -> bool:
    for line in _events(run_dir).splitlines():
        if b'"run_finished"' in line:
            with contextlib.suppress(ValueError):  # half a line, of a run that was killed
                if json.loads(line).get("steps") == step:
                    return True
    return False


def cut_events(run_dir: RunDir, offset: int, step: int) -> None:
    """Drop events of what comes after `step` and will be done again; what tells of starts and faults stays.

    A checkpoint's own event, and the end of a run that ended with it, were written behind the offset that it holds.
    """
    content = _events(run_dir)
    kept = b"".join(line for line in content[offset:].splitlines(keepends=True) if _is_kept(line, step))
    if content[offset:] == kept:
        return
    temporary = run_dir.events.with_suffix(".tmp")
    try:
        temporary.write_bytes(content[:offset] + kept)
        temporary.rename(run_dir.events)
    except OSError:  # a full disk has room for what is no longer than what was there
        temporary.unlink(missing_ok=True)
        with run_dir.events.open("r+b") as file:
            file.seek(min(offset, len(content)))
            file.write(kept)
            file.truncate()


def _is_kept(line: bytes, step: int) -> bool:
    try:
        event = json.loads(line)
        done = _STEP_OF.get(event.get("event"))
        kept = event[done] <= step if done else event.get("event") in _LIFECYCLE
    except (ValueError, AttributeError, KeyError, TypeError):
        return False
    return line.endswith(b"\n") and bool(kept)
