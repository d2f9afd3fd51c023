"""Reads events.jsonl while it is written, cut and replaced by the run that it belongs to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK = 1 << 22
_STEP = b'{"event": "step"'
_LAST_STEPS = 200  # of a chunk: a display shows the newest ones, and a long past is read quickly


class Follower:
    """Gives what was added since the last look; a file that was replaced or cut is read anew.

    Args:
        path: events.jsonl, which need not be there yet.
        past: limits how many bytes of what is there already are read; None reads all of it.
        all_steps: give every step; else, of many that come at once, the last ones alone, as a display needs them.
    """

    def __init__(self, path: Path, past: int | None = None, *, all_steps: bool = False) -> None:
        self._path = path
        self._past = past
        self._all_steps = all_steps
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._partial = b""

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether the file is read anew, which makes everything told before void, and the next events in order.

        A line is given once it has its end; one that is no JSON object is passed over.
        """
        try:
            file = self._path.open("rb")
        except OSError:
            return False, []
        with file:
            anew = self._place(file)
            events: list[dict[str, Any]] = []
            while data := file.read(_CHUNK):
                self._offset += len(data)
                *lines, self._partial = (self._partial + data).split(b"\n")
                events += filter(None, map(_parse, lines if self._all_steps else sift(lines)))
            return anew, events

    def _place(self, file: BinaryIO) -> bool:
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        anew = identity != self._identity or status.st_size < self._offset
        if anew:
            self._identity, self._partial = identity, b""
            self._offset = 0 if self._past is None else max(0, status.st_size - self._past)
            if self._offset:
                file.seek(self._offset - 1)
                self._offset += len(file.readline()) - 1  # a line of which we would see only the end
        file.seek(self._offset)
        return anew


def sift(lines: Iterable[bytes]) -> list[bytes]:
    """Pure: all lines but those of old steps, in order."""
    lines = list(lines)
    steps = [index for index, line in enumerate(lines) if line.startswith(_STEP)]
    old = set(steps[:-_LAST_STEPS])
    return [line for index, line in enumerate(lines) if index not in old]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
