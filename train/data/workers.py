"""How many loader workers a rank gets: a pure function of what was measured and of the room there is.

A list is what one shard fetches. Without workers it costs fetch + step. With n workers the slowest of three counts: the
step (and taking the batch over), fetch / n, and the work of both over the cores of this rank. Waiting for a disk or a
network takes no core, so many more workers than cores can be right.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_WORKERS = 16
_WORKER_BYTES = 128 << 20  # what a forked worker writes to of its parent's memory, without the dataset
_TAKE_SECONDS, _TAKE_BYTES_A_SECOND = 0.0003, 2e9  # one batch from a worker: a message, and its shared memory mapped
GAIN, _TIE = 0.95, 1.02  # workers have to bring 5 %; among equals within 2 % the fewest


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians in seconds a list, measured in this rank."""

    fetch: float  # in one process
    longest: float  # of the fetches measured
    cpu: float  # share of a fetch that computes rather than waits
    step: float  # between two fetches
    batch_bytes: int


@dataclass(frozen=True, slots=True)
class Room:
    """What this rank may use of its host; ranks on one host share it."""

    cores: float
    threads: int  # that a step keeps busy
    shared_bytes: int  # free in /dev/shm, where workers leave their batches
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Loader workers, the batches that each prepares ahead, and why."""

    workers: int
    prefetch: int = 2
    reason: str = ""


def seconds_a_list(timing: Timing, room: Room, workers: int) -> float:
    """What one list is expected to take."""
    if workers == 0:
        return timing.fetch + timing.step
    take = _TAKE_SECONDS + timing.batch_bytes / _TAKE_BYTES_A_SECOND
    return max(timing.step + take, timing.fetch / workers, _of_cores(timing, room))


def _of_cores(timing: Timing, room: Room) -> float:
    """The work of the rank and its workers, on all cores all the time."""
    take = _TAKE_SECONDS + timing.batch_bytes / _TAKE_BYTES_A_SECOND
    return (timing.step * room.threads + timing.fetch * timing.cpu + take) / room.cores


def choose(timing: Timing, room: Room, slower: float = 1.0) -> Choice:
    """The fewest workers that are about as fast as any number that there is room for.

    Where cores are what is short there is one more, since each waits at times for the rank to take what it has: 3 took
    2 % less than 2 beside a rank on 2 cores.

    `slower`: times that workers were seen to take what is expected of them.
    """
    prefetch = 4 if timing.longest > 4 * timing.fetch else 2  # uneven samples need more in store
    ahead = prefetch * timing.batch_bytes
    by_shared = room.shared_bytes // 2 // max(1, ahead)
    by_memory = room.memory_bytes // 2 // (_WORKER_BYTES + ahead)
    most = max(0, min(MOST_WORKERS, by_shared, by_memory))
    expected = [seconds_a_list(timing, room, workers) * (slower if workers else 1.0) for workers in range(most + 1)]
    best = min(expected)
    workers = next(n for n, seconds in enumerate(expected) if seconds <= best * _TIE)
    if expected[workers] > expected[0] * GAIN:
        workers = 0
    elif workers < most and expected[workers] == _of_cores(timing, room) * slower:
        workers += 1
    return Choice(workers, prefetch, _reason(timing, room, workers, min(by_shared, by_memory)))


def _reason(timing: Timing, room: Room, workers: int, limit: int) -> str:
    told = (
        f"fetching a batch takes {1000 * timing.fetch:.3g} ms ({100 * timing.cpu:.0f}% of it computing) "
        f"beside {1000 * timing.step:.3g} ms of step, on {room.cores:.3g} core{'' if room.cores == 1 else 's'}"
    )
    if workers == 0:
        why = "shared memory or memory have no room for workers" if limit < 1 else "workers would not save 5%"
        return f"{told}: {why}"
    return told + (f"; memory has room for no more than {limit}" if limit == workers else "")
