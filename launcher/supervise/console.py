"""The launcher's own stdout and stderr, shared by the ranks' output, our messages and the progress bar.

Whoever wants to print goes through here, so that no two of them ever end up in one line.
"""

from __future__ import annotations

import os
import select
import sys

from samestep.launcher.supervise.events import Stream

_CLEAR = b"\r\x1b[2K"


class Console:
    """Two byte streams and at most one progress line below them."""

    def __init__(self, *, stdout: int | None = None, stderr: int | None = None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._fds: dict[Stream, int | None] = {
            "stdout": sys.stdout.fileno() if stdout is None else stdout,
            "stderr": sys.stderr.fileno() if stderr is None else stderr,
        }
        self._is_terminal = {name: os.isatty(fd) for name, fd in self._fds.items() if fd is not None}
        self._inside_line: dict[Stream, bool] = {"stdout": False, "stderr": False}
        self._cut: dict[Stream, bool] = {"stdout": False, "stderr": False}  # we ended a line that the rank had begun
        self._bar_shown = False

    @property
    def has_bar(self) -> bool:
        """Whether a progress line makes sense: people look at it."""
        return self._is_terminal["stderr"] and os.environ.get("TERM") != "dumb"

    def write(self, stream: Stream, data: bytes) -> None:
        """Bytes as they are, whole lines or not; the end of a line that we had to end already is not written twice."""
        if data and self._cut[stream]:
            self._cut[stream] = False
            data = data.removeprefix(b"\n")  # unbuffered ranks write a line and its end one after the other
        if data:
            self._clear_bar()
            self._put(stream, data)
            self._inside_line[stream] = not data.endswith((b"\n", b"\r"))

    def write_line(self, stream: Stream, line: bytes) -> None:
        """One line that begins at the left edge."""
        self._end_line(stream)
        cut, self._cut[stream] = self._cut[stream], False
        self.write(stream, line + b"\n")
        self._cut[stream] = cut

    def say(self, text: str) -> None:
        """A message of the launcher."""
        self.write_line("stderr", text.encode(errors="backslashreplace"))

    def show_bar(self, line: str) -> None:
        """Replace the progress line, unless a rank is in the middle of a line of its own."""
        if any(self._inside_line.values()):
            return
        self._put("stderr", _CLEAR + line.encode(errors="replace"))
        self._bar_shown = True

    def close(self) -> None:
        """Leave the cursor below everything."""
        self._clear_bar()

    def _clear_bar(self) -> None:
        if self._bar_shown:
            self._bar_shown = False
            self._put("stderr", _CLEAR)

    def _end_line(self, stream: Stream) -> None:
        same_screen = all(self._is_terminal.values())
        if self._inside_line[stream] or (same_screen and any(self._inside_line.values())):
            self._put(stream, b"\n")
            for name, inside in self._inside_line.items():
                self._cut[name] |= inside and (same_screen or name == stream)
            self._inside_line = {"stdout": False, "stderr": False} if same_screen else self._inside_line
            self._inside_line[stream] = False

    def _put(self, stream: Stream, data: bytes) -> None:
        fd = self._fds[stream]
        view = memoryview(data)
        while fd is not None and view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:  # somebody made the shared terminal non-blocking
                select.select([], [fd], [])
            except OSError:  # the reader has gone, as in `| head`: the run goes on, its logs have everything
                fd = self._fds[stream] = None
