"""What running ranks say, until it is in their logs: one pipe for each of their streams, one log for each rank."""

from __future__ import annotations

import os

from samestep.launcher.supervise.events import EventSource, Stream
from samestep.launcher.supervise.logs import RankLog
from samestep.launcher.supervise.process import Worker

_DRAIN_READS = 1024  # a pipe holds far less, unless somebody who outlives the rank goes on writing


class Listening:
    """To the ranks of one generation after the other."""

    def __init__(self, source: EventSource) -> None:
        self._source = source
        self._logs: dict[int, RankLog] = {}
        self._pipes: dict[tuple[int, Stream], int] = {}

    def begin(self, generation: int, worker: Worker, log: RankLog) -> None:
        """Listen to a rank that has just been started; one that has the terminal has no pipes.

        Raises:
            UsageError: its log can't be opened.
        """
        rank = worker.command.rank
        self._logs[rank] = log
        for stream, fd in worker.pipes.items():
            self._pipes[rank, stream] = fd
            self._source.watch_output(rank, stream, fd)
        log.open(generation, worker.pid)
        if not worker.pipes:
            log.note("its input and output are the terminal's of samestep run --pdb, and not kept here")

    def take(self, rank: int, stream: Stream, data: bytes) -> None:
        """Bytes of a pipe; none where the rank has closed it."""
        if data:
            self._logs[rank].feed(stream, data)
        else:
            self._close_pipe(rank, stream)

    def last_words(self, rank: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The last lines of stdout and stderr of a rank that has ended."""
        self._drain(rank)
        log = self._logs[rank]
        return log.tail("stdout"), log.tail("stderr")

    def end(self) -> None:
        """No rank is left: take what is still in the pipes, close everything."""
        for rank, log in self._logs.items():
            self._drain(rank)
            for stream in ("stdout", "stderr"):
                self._close_pipe(rank, stream)
            log.close()
        self._logs = {}

    def _drain(self, rank: int) -> None:
        """Read what an ended rank has left; a process that outlives it may still hold the other end."""
        for stream in ("stdout", "stderr"):
            for _ in range(_DRAIN_READS):
                fd = self._pipes.get((rank, stream))
                if fd is None:
                    break
                try:
                    self.take(rank, stream, os.read(fd, 1 << 16))
                except BlockingIOError:
                    break

    def _close_pipe(self, rank: int, stream: Stream) -> None:
        fd = self._pipes.pop((rank, stream), None)
        if fd is not None:
            self._source.forget(fd)
            os.close(fd)
