"""DataLoader workers that outlive a signal meant for their rank, and never the rank itself.

Terminals, torchrun and schedulers signal whole process groups. A worker that dies of it takes the step with it that
the rank wants to finish. So workers take no notice; in return, those that are left when training or the interpreter
ends are killed, and the kernel ends them with a rank that was killed (torch's would look for it every five seconds).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader, _utils
from torch.utils.data._utils import signal_handling

from samestep.launcher.liveness import end_with

SHIELDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()  # each holds two descriptors
_streams: weakref.WeakSet[Any] = weakref.WeakSet()  # torch's iterators
_starting: set[int] = set()  # threads that start workers
_forked: list[bool] = []  # in a worker that its rank itself has forked, as no fork server did
_at_exit: list[Finalize] = []


def shield(worker: int) -> None:  # noqa: ARG001 (worker_init_fn's form)
    """In a worker: notice none of SHIELDED. Handlers, because a program that a dataset starts would inherit SIG_IGN.

    A dataset is not told which worker it is in, as in the rank itself: samples would depend on their number.
    """
    _utils.worker._worker_info = None
    for signum in SHIELDED:
        signal.signal(signum, _nothing)
    rank = multiprocessing.parent_process()
    if rank is not None and rank.pid is not None:
        end_with(rank.pid)
        if _forked and os.getppid() != rank.pid:  # it died before we got here, and nobody would tell us any more
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SHIELDED)


def _in_child() -> None:
    """Threads and workers of the streams are the parent's; a worker leaves its garbage alone too.

    A CUDA event or tensor among it can't be destroyed in a fork, which aborts in trying.
    """
    _streams.clear()
    if threading.get_ident() in _starting:
        _forked.append(True)
        gc.freeze()


os.register_at_fork(after_in_child=_in_child)


def _nothing(signum: int, frame: FrameType | None) -> None:
    pass


class ShieldedLoader(DataLoader[Any]):
    """To be made with `worker_init_fn=shield`."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch's own iterator
        """Workers begin with the signals blocked, so that none comes before `shield`."""
        before = set(multiprocessing.active_children())
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED if self.num_workers else ())
        _starting.add(threading.get_ident())
        try:
            stream = super().__iter__()
            _streams.add(stream)
            return stream
        finally:
            _starting.discard(threading.get_ident())
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            _remember(set(multiprocessing.active_children()) - before)


def _remember(workers: set[BaseProcess]) -> None:
    if not _at_exit:
        # runs after torch has asked its workers to end, and before multiprocessing waits for them without a limit
        _at_exit.append(Finalize(None, kill_the_rest, exitpriority=0))
    _started.update(workers)


def kill_the_rest() -> None:
    """End workers that nobody has closed.

    Whoever holds an exception's traceback holds their iterator: torch asks them to end when that is collected, possibly
    in vain, since their queues may be collected before it, and waits five seconds for each and as long again.
    """
    for stream in list(_streams):
        if getattr(stream, "_worker_pids_set", False):
            # torch's handler would raise at each of these ends, in the main thread
            signal_handling._remove_worker_pids(id(stream))
            stream._worker_pids_set = False
    left = set(_started) & set(multiprocessing.active_children())
    for worker in left:
        worker.kill()
    for worker in left:
        worker.join()
    for stream in list(_streams):
        _end_threads(stream)


def _end_threads(stream: Any) -> None:
    """Of an iterator without workers: torch's own way could wait for ever for a lock that one of them held."""
    stream._shutdown = True  # nothing is left for torch to do
    for queue in getattr(stream, "_index_queues", ()):
        queue.cancel_join_thread()
        queue.close()  # ends the thread that feeds it
    if hasattr(stream, "_pin_memory_thread_done_event"):
        stream._pin_memory_thread_done_event.set()
