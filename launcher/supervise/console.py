"""The launcher's own stdout and stderr, shared by the ranks' output, our messages and the progress bar.

Whoever wants to print goes through here, so that no two of them ever end up in one line.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence

from samestep.launcher.supervise.events import Stream

_CLEAR = b"\r\x1b[2K"
_UP = b"\x1b[1A"
_LOOK_SECONDS = 0.1  # how often somebody whose output nobody takes looks whether he is asked to stop


class Console:
    """Two byte streams, and below them a display of a few lines that is redrawn.

    Who reads slowly is waited for, until `asked` says that the operator wants to stop.
    """

    def __init__(
        self, *, stdout: int | None = None, stderr: int | None = None, asked: Callable[[], bool] = bool
    ) -> None:
        self._asked = asked
        sys.stdout.flush()
        sys.stderr.flush()
        self._fds: dict[Stream, int | None] = {
            "stdout": sys.stdout.fileno() if stdout is None else stdout,
            "stderr": sys.stderr.fileno() if stderr is None else stderr,
        }
        self._is_terminal = {name: os.isatty(fd) for name, fd in self._fds.items() if fd is not None}
        self._inside_line: dict[Stream, bool] = {"stdout": False, "stderr": False}
        self._cut: dict[Stream, bool] = {"stdout": False, "stderr": False}  # we ended a line that the rank had begun
        self._display: Sequence[str] = ()
        self._shown_lines = 0

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
            self._draw()

    def write_line(self, stream: Stream, line: bytes) -> None:
        """One line that begins at the left edge."""
        self._end_line(stream)
        cut, self._cut[stream] = self._cut[stream], False
        self.write(stream, line + b"\n")
        self._cut[stream] = cut

    def say(self, text: str) -> None:
        """A message of the launcher."""
        self.write_line("stderr", text.encode(errors="backslashreplace"))

    def show_bar(self, lines: Sequence[str]) -> None:
        """Replace the display by `lines`, none of which may wrap; it stays below all words until it is replaced."""
        if lines != self._display or not self._shown_lines:
            self._clear_bar()
            self._display = lines
            self._draw()

    def close(self) -> None:
        """Leave the cursor below everything."""
        self.show_bar(())

    def _draw(self) -> None:
        """Below whole lines only: a rank in the middle of a line goes on where it stopped."""
        if self._display and not any(self._inside_line.values()):
            self._put("stderr", _CLEAR + "\n".join(self._display).encode(errors="replace"))
            self._shown_lines = len(self._display)

    def _clear_bar(self) -> None:
        if self._shown_lines:
            self._put("stderr", _CLEAR + (_UP + _CLEAR) * (self._shown_lines - 1))
            self._shown_lines = 0

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
                if self._is_taken(fd):
                    view = view[os.write(fd, view[: select.PIPE_BUF]) :]  # so much a pipe takes at once
                else:
                    fd = self._fds[stream] = None
            except BlockingIOError:  # somebody made the shared terminal non-blocking, and was faster
                continue
            except OSError:  # the reader has gone, as in `| head`: the run goes on, its logs have everything
                fd = self._fds[stream] = None

    def _is_taken(self, fd: int) -> bool:
        """Wait until somebody takes what is written; False where the operator asks to stop before."""
        while not select.select([], [fd], [], _LOOK_SECONDS)[1]:
            if self._asked():
                return False
        return True
