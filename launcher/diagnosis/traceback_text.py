"""Pure: find in the last lines of a log what a script that knows nothing of samestep said about its end."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TRAIN = f"{Path(__file__).parent.parent.with_name('train')}/"  # our own code in a rank
_LIBRARIES = ("site-packages", "dist-packages", "/lib/python")
_RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")  # torch's own excepthook
_FRAME = re.compile(r'^\s+File "(?P<file>.+?)", line (?P<line>\d+),? in (?P<name>.+)$')
_EXCEPTION = re.compile(r"^(?P<kind>[A-Za-z_][\w.]*)(: (?P<message>.*))?$")
_GROUP = re.compile(r"^ +\+ Exception Group (?=Traceback \(most recent call last\))")
_MARGIN = re.compile(r"^ +[|+] ?")  # of all lines of a group and what is in it
_OURS = tuple(str(Path(__file__).resolve().parents[2] / package) + os.sep for package in ("launcher", "train"))
_PLACE = re.compile(r'^\s+File "(?P<file>.+?)", line (?P<line>\d+)$')
_NO_PYTHON = re.compile(r"^(?P<kind>SyntaxError|IndentationError|TabError)(: (?P<message>.*))?$")
_NOT_A_CAUSE = frozenset({"SystemExit", "KeyboardInterrupt", "SignalException"})

# What a rank says when another one has gone away, or when the group never came together.
_OTHER_RANK_GONE = re.compile(
    r"connection (was )?(closed|reset|aborted|refused)|broken pipe|remote (process|peer) (exited|closed)"
    r"|socket (closed|timeout)|unexpected EOF|failed to recv, got 0 bytes|recvBytes|sendBytes"
    r"|application timeout caused pair closure|timed out waiting \d+ms for (send|recv)|connectFullMesh"
    r"|DistNetworkError|DistStoreError|nccl(RemoteError|SystemError)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Said:
    """An exception as its traceback shows it; `frame` is in the user's code where one is."""

    kind: str
    message: str
    frame: str

    @property
    def text(self) -> str:
        """`ValueError: boom`."""
        return f"{self.kind}: {self.message}" if self.message else self.kind


def last_exception(lines: Sequence[str]) -> Said | None:
    """The last traceback among `lines`, None if there is none or it tells of being stopped."""
    clean = [_RANK_PREFIX.sub("", line).rstrip() for line in lines]
    starts = [index for index, line in enumerate(clean) if line.startswith("Traceback (most recent call last)")]
    groups = [index for index, line in enumerate(clean) if _GROUP.match(line)]
    if groups and groups[-1] > max(starts, default=-1):
        return last_exception([_MARGIN.sub("", _GROUP.sub("", line)) for line in clean[groups[-1] :]])
    broken = _syntax_error(clean[starts[-1] :] if starts else clean)
    if broken is not None or not starts:
        return broken
    frames: list[tuple[str, str]] = []
    for line in clean[starts[-1] + 1 :]:
        frame = _FRAME.match(line)
        found = None if frame or line.startswith(" ") else _EXCEPTION.match(line)
        if frame:
            frames.append(_described(frame))
        elif found and frames:
            if found["kind"].rsplit(".", 1)[-1] in _NOT_A_CAUSE:
                return None
            return Said(found["kind"], (found["message"] or "").strip(), _users(frames[::-1]))
    return None


def _syntax_error(clean: Sequence[str]) -> Said | None:
    """Text that is no Python, and where: of the file that is run it is shown without a traceback."""
    place = None
    for line in clean:
        place = _PLACE.match(line) or place
        found = _NO_PYTHON.match(line)
        if found and place:
            where = f"{place['file']}:{place['line']}"
            return Said(found["kind"], f"{(found['message'] or '').strip()} at {where}", where)
    return None


def crash_frame(lines: Sequence[str]) -> str:
    """Innermost user frame of faulthandler's `Fatal Python error`, or an empty string."""
    return _users(_crash(lines))


def crash_stack(lines: Sequence[str]) -> tuple[str, ...]:
    """The user's frames of faulthandler's `Fatal Python error`, innermost first; the library's if there are none."""
    frames = _crash(lines)
    own = tuple(text for file, text in frames if not _is_library(file))
    return own or tuple(text for _, text in frames)


def _crash(lines: Sequence[str]) -> list[tuple[str, str]]:
    clean = [_RANK_PREFIX.sub("", line).rstrip() for line in lines]
    starts = [index for index, line in enumerate(clean) if line.startswith("Fatal Python error")]
    frames: list[tuple[str, str]] = []
    inside = False  # the stack of the thread that crashed; others follow or precede it
    for line in clean[starts[-1] :] if starts else ():
        match = _FRAME.match(line)
        if line.startswith(("Current thread", "Thread")):
            inside = line.startswith("Current thread")
        elif match and inside:
            frames.append(_described(match))
    return frames


def tells_of_another_rank(text: str) -> bool:
    """Whether an error is what a victim sees when a connection to another rank breaks."""
    return bool(_OTHER_RANK_GONE.search(text))


def _described(match: re.Match[str]) -> tuple[str, str]:
    return match["file"], f"{match['file']}:{match['line']} in {match['name']}"


def _users(innermost_first: Sequence[tuple[str, str]]) -> str:
    own = [text for file, text in innermost_first if not _is_library(file)]
    return own[0] if own else (innermost_first[0][1] if innermost_first else "")


def is_ours(file: str) -> bool:
    """Whether a file is samestep's own."""
    return file.startswith(_OURS)


def is_users(file: str) -> bool:
    """Whether a file is neither a library's nor samestep's own."""
    return not _is_library(file) and not is_ours(file)


def _is_library(file: str) -> bool:
    return file.startswith((_TRAIN, "<")) or any(part in file for part in _LIBRARIES)
