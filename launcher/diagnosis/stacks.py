"""Pure: stacks of processes, read from what py-spy or faulthandler wrote, and who waits for whom by them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from samestep.launcher.diagnosis.traceback_text import is_ours, is_users

_HEADER = re.compile(r"^(Current thread|Thread) 0x[0-9a-f]+ .*\(most recent call first\):")
_LINE = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<name>.+)$')
_NAME_CHARS = 100  # a C++ template can fill a screen
# torch's, and our own that call them or wait by themselves
_COLLECTIVE = re.compile(r"/torch/distributed/|/parallel/(group|exchange|shared_memory)\.py$")


@dataclass(frozen=True, slots=True)
class Frame:
    """One call; `line` is 0 in native code, where `file` is a library."""

    file: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.name}" if self.line else f"{self.name} ({self.file})"


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread, innermost frame first."""

    name: str
    frames: tuple[Frame, ...]
    is_main: bool = False
    owns_gil: bool = False

    @property
    def python(self) -> tuple[Frame, ...]:
        """Frames of Python code."""
        return tuple(frame for frame in self.frames if frame.line)


@dataclass(frozen=True, slots=True)
class Stacks:
    """All threads of one process; `problem` says why there are none."""

    pid: int
    threads: tuple[Thread, ...] = ()
    problem: str = ""
    parent: int = 0  # of a process that a rank has started: the rank's pid

    @property
    def main(self) -> Thread | None:
        """The thread that trains."""
        return next((thread for thread in self.threads if thread.is_main), None)

    @property
    def user_frame(self) -> str:
        """Innermost frame of the user's code in the main thread, or an empty string.

        Above the first frame of ours is only the script's call of `train`, which tells nothing.
        """
        frames = self.main.python if self.main else ()
        called = itertools.takewhile(lambda frame: not is_ours(frame.file), frames)
        return next((str(frame) for frame in called if is_users(frame.file)), "")

    @property
    def innermost(self) -> str:
        """Innermost Python frame of the main thread, whosever code it is."""
        return str(self.main.python[0]) if self.main and self.main.python else ""

    @property
    def waits_for_others(self) -> bool:
        """Whether the main thread is inside a collective."""
        frames = self.main.python if self.main else ()
        return bool(frames) and _COLLECTIVE.search(frames[0].file) is not None


def parse_spy(text: bytes) -> tuple[Thread, ...]:
    """Threads in what `py-spy dump --json` prints.

    Raises:
        ValueError: that is something else.
    """
    try:
        return tuple(
            Thread(
                name=str(thread.get("thread_name") or f"thread {thread.get('os_thread_id')}"),
                frames=tuple(_frame(frame) for frame in thread["frames"]),
                is_main=thread.get("thread_name") == "MainThread" or thread.get("os_thread_id") == thread.get("pid"),
                owns_gil=bool(thread.get("owns_gil")),
            )
            for thread in json.loads(text)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a dump of py-spy: {error}") from error


def _frame(frame: Mapping[str, object]) -> Frame:
    file, line = str(frame.get("filename") or ""), frame.get("line")
    is_python = isinstance(line, int) and file.endswith(".py")
    return Frame(file, line if is_python and isinstance(line, int) else 0, str(frame.get("name"))[:_NAME_CHARS])


def parse_faulthandler(text: str) -> tuple[Thread, ...]:
    """Threads in what faulthandler writes; its last one is the main thread."""
    threads: list[list[Frame]] = []
    for line in text.splitlines():
        found = _LINE.match(line)
        if _HEADER.match(line):
            threads.append([])
        elif found and threads:
            threads[-1].append(Frame(found["file"], int(found["line"]), found["name"]))
    last = len(threads) - 1
    return tuple(
        Thread("MainThread" if number == last else f"thread {number}", tuple(frames), is_main=number == last)
        for number, frames in enumerate(threads)
    )


def render(stacks: Stacks, title: str) -> list[str]:
    """For people: a title, then thread by thread, the main one first."""
    lines = [title]
    if stacks.problem:
        lines.append(f"  no stacks: {stacks.problem}")
    for thread in sorted(stacks.threads, key=lambda thread: not thread.is_main):
        lines.append(f"  {thread.name}" + (", holds the interpreter lock" if thread.owns_gil else ""))
        lines += [f"    {frame}" for frame in thread.frames]
    return lines


def render_all(found: Mapping[int, Stacks], ranks: Mapping[int, int], about: Mapping[int, str]) -> str:
    """All ranks, given rank -> pid, each with a word `about` it, and below each the processes that it started."""
    lines = []
    for rank, pid in sorted(ranks.items()):
        lines += render(found[pid], f"rank {rank}, pid {pid}" + (f": {about[rank]}" if about.get(rank) else ""))
        for child in found.values():
            if child.parent == pid:
                lines += render(child, f"rank {rank} started pid {child.pid}")
        lines.append("")
    return "\n".join(lines)
