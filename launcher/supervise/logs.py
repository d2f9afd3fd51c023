"""What the ranks say: everything into a file a rank, a chosen part of it onto the console. Bytes throughout."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from samestep.launcher.config import LaunchConfig, shown_ranks, streams
from samestep.launcher.contract import UsageError
from samestep.launcher.supervise.console import Console
from samestep.launcher.supervise.events import Stream

_TAIL_LINES = 200  # enough for a traceback and what came before it
_LONGEST_LINE = 1 << 16  # a line longer than this is cut, so that no rank can fill our memory


class Route(Enum):
    """What the console gets of one stream."""

    HIDDEN = "hidden"
    VERBATIM = "verbatim"
    PREFIXED = "prefixed"


def routes(config: LaunchConfig, local_rank: int) -> dict[Stream, Route]:
    """Pure: rank zero as it is, errors of the others with their rank, unless the options say otherwise."""
    shown = shown_ranks(config.local_ranks_filter)
    both: tuple[Stream, Stream] = ("stdout", "stderr")
    if shown is not None and local_rank not in shown:
        return dict.fromkeys(both, Route.HIDDEN)
    plain = Route.VERBATIM if local_rank == 0 else Route.PREFIXED
    chosen: dict[Stream, Route] = {
        "stdout": plain if local_rank == 0 or shown is not None else Route.HIDDEN,
        "stderr": plain,
    }
    if config.quiet:
        chosen["stdout"] = Route.HIDDEN
    for stream in both:
        if stream in streams("--redirects", config.redirects, local_rank):
            chosen[stream] = Route.HIDDEN
        if stream in streams("--tee", config.tee, local_rank):
            chosen[stream] = Route.PREFIXED
    return chosen


class _Lines:
    """Bytes in, whole lines out."""

    def __init__(self, emit: Callable[[bytes], None]) -> None:
        self._emit = emit
        self._partial = b""

    def feed(self, data: bytes) -> None:
        *whole, self._partial = (self._partial + data).split(b"\n")
        for line in whole:
            self._emit(line)
        if len(self._partial) > _LONGEST_LINE:
            self.flush()

    def flush(self) -> None:
        if self._partial:
            partial, self._partial = self._partial, b""
            self._emit(partial)


class RankLog:
    """Output of one rank in one generation."""

    def __init__(self, rank: int, path: Path, chosen: dict[Stream, Route], console: Console) -> None:
        self._rank = rank
        self._path = path
        self._routes = chosen
        self._console = console
        self._file: int | None = None
        self._tail: dict[Stream, deque[bytes]] = {"stdout": deque(maxlen=20), "stderr": deque(maxlen=_TAIL_LINES)}
        self._lines = {stream: _Lines(self._line(stream)) for stream in chosen}

    def open(self, generation: int, pid: int) -> None:
        """Append to the file, after a line that says which start this is.

        Raises:
            UsageError: the file can't be opened.
        """
        try:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(
                f"the log {self._path} is expected to be writable, but: {error.strerror or error}",
                "remove what is in its place, or choose another folder with --log-dir before the recipe",
            ) from None
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self._write(f"--- rank {self._rank}, generation {generation}, pid {pid}, {at} ---\n".encode())

    def note(self, text: str) -> None:
        """A line of ours, for whoever reads the file."""
        self._write(f"--- {text} ---\n".encode())

    def feed(self, stream: Stream, data: bytes) -> None:
        """Take what the rank wrote; a script's broken bytes are passed on as they are."""
        self._write(data)
        if self._routes[stream] is Route.VERBATIM:
            self._console.write(stream, data)
        self._lines[stream].feed(data)

    def close(self) -> None:
        """Print what is left of unfinished lines and close the file."""
        for lines in self._lines.values():
            lines.flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def tail(self, stream: Stream) -> tuple[str, ...]:
        """The last lines, as evidence."""
        return tuple(line.decode(errors="replace") for line in self._tail[stream])

    def _line(self, stream: Stream) -> Callable[[bytes], None]:
        def take(line: bytes) -> None:
            self._tail[stream].append(line[:2000])
            if self._routes[stream] is Route.PREFIXED:
                shown = line.rstrip(b"\r").rsplit(b"\r", 1)[-1]  # of a progress bar, its last state
                self._console.write_line(stream, b"[rank %d] %s" % (self._rank, shown))

        return take

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while self._file is not None and view:
                view = view[os.write(self._file, view) :]
        except OSError as error:  # a full disk must not end the training
            if self._file is not None:
                os.close(self._file)
            self._file = None
            self._console.say(f"samestep: warning: {self._path} is not written any more: {error.strerror}")
