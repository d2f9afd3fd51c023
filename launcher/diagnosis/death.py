"""Pure: what the signal that ended a rank means, from its number, its last words and what the kernel counted."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from samestep.launcher.diagnosis.memory_signs import NOTHING_COUNTED, MemorySigns, size

_MUCH = 0.5  # of the memory that there is
_FULL = 0.9
# What native code prints before it aborts; the last one counts.
_LAST_WORDS = re.compile(
    r"^\s*what\(\):\s*(?P<what>.+)"
    r"|^terminate called after throwing an instance of '(?P<thrown>.+)'"
    r"|(?P<assertion>\S.*Assertion .+ failed.*)"
    r"|^(?P<glibc>(free\(\)|malloc\(\)|double free|corrupted|munmap_chunk|realloc\(\)|\*\*\* stack smashing).*)"
    r"|^(?P<fatal>F\d{4} .*|Fatal Python error: (?!Aborted|Segmentation|Bus|Illegal|Floating).+|fatal error: .+)",
    re.IGNORECASE,
)
_CHECKED_AT = re.compile(r"\[enforce fail at [^\]]*\] ")  # where in gloo's sources: of no use to the reader
_HINTS = {
    signal.SIGSEGV: "it crashed in native code: the log has its Python stack; {alone}",
    signal.SIGABRT: "native code gave up: the log says why",
    signal.SIGILL: "an instruction that this CPU doesn't have: install builds for it, torch's and other libraries'",
    signal.SIGFPE: "native code divided by zero: the log has its Python stack",
    signal.SIGXCPU: "the limit of CPU time is used up: see ulimit -t",
    signal.SIGXFSZ: "a file grew beyond the limit: see ulimit -f",
    signal.SIGSYS: "a system call is forbidden here: see the container's seccomp profile",
    signal.SIGTERM: "somebody asked this process alone to end: a batch system asks the launcher",
    signal.SIGPIPE: "it wrote to a pipe whose reader has gone",
}
_ALONE = "run it alone with --num-workers 0 to see it in one process"

_ALONE_WITHOUT_OPTIONS = "run it alone, without data loading processes, to see it in one process"


@dataclass(frozen=True, slots=True)
class Death:
    """What a signal tells: `cause` in a few words, `hint` with the fix."""

    cause: str
    hint: str


def explain(signum: int, stderr: Sequence[str], peak: int, signs: MemorySigns, *, trains: bool = True) -> Death:
    """Decode a signal that nobody of us sent.

    Args:
        signum: its number.
        stderr: the rank's last lines.
        peak: most memory the rank ever held, in bytes; 0 if unknown.
        signs: the kernel's counters, with kills counted since the generation started.
        trains: it had told a phase of training, so it knows a recipe's options.
    """
    name = name_of(signum)
    if signum == signal.SIGKILL:
        return _killed(name, peak, signs)
    if signum == signal.SIGBUS:
        return _bus(name, signs)
    if signum == signal.SIGABRT:
        words = last_words(stderr)
        told = f": {words}" if words else ""
        return Death(f"killed by {name}{told}", hint_for(words) or _HINTS[signal.SIGABRT])
    hints: dict[int, str] = {int(number): text for number, text in _HINTS.items()}
    return Death(f"killed by {name}", hints.get(signum, "").format(alone=_ALONE if trains else _ALONE_WITHOUT_OPTIONS))


def name_of(signum: int) -> str:
    """`SIGSEGV (signal 11)`."""
    try:
        return f"{signal.Signals(signum).name} (signal {signum})"
    except ValueError:
        return f"signal {signum}"


def last_words(stderr: Sequence[str]) -> str:
    """What native code said before it aborted, in one line; empty if nothing."""
    found = [match for line in stderr if (match := _LAST_WORDS.search(line.rstrip()))]
    if not found:
        return ""
    last = found[-1]
    text = next(value for value in last.groupdict().values() if value)
    thrown = found[-2]["thrown"] if last["what"] and len(found) > 1 else None
    text = _CHECKED_AT.sub("", text)
    return f"{thrown}: {text}"[:300] if thrown else text.strip()[:300]


def _killed(name: str, peak: int, signs: MemorySigns) -> Death:
    held = f"it held {size(peak)} of {size(signs.limit)} at most" if peak and signs.limit else ""
    if signs.oom_kills:
        return Death(
            f"killed by {name}: the kernel ended it for lack of memory" + (f", {held}" if held else ""),
            "smaller batches (--global-batch-size, more --shards), fewer --num-workers, or a higher memory limit",
        )
    if signs.limit and peak > _MUCH * signs.limit:
        return Death(f"killed by {name}", f"{held}: memory may have run out, dmesg tells")
    reason = f"memory was not short ({held})" if held else "see dmesg whether memory was short"
    return Death(f"killed by {name}", f"somebody killed it; {reason}")


def _space(signs: MemorySigns) -> str:
    return f"/dev/shm has {size(signs.shared_size)}, {size(signs.shared_used)} used"  # noqa: S108 (a text)


def _bus(name: str, signs: MemorySigns) -> Death:
    if not signs.shared_size:
        return Death(f"killed by {name}", "a file that is mapped in became shorter, or its disk is full")
    space = _space(signs)
    if signs.shared_used > _FULL * signs.shared_size:
        return Death(
            f"killed by {name}: shared memory is full, {space}",
            "remove what fills /dev/shm, give the container more (docker run --shm-size=8g), or fewer --num-workers",
        )
    return Death(f"killed by {name}", f"shared memory was full, or a file that is mapped in became shorter; {space}")


_SHARED_FULL, _LOADER_KILLED = "shared memory is full", "a data loading process was killed"
# What people read about errors whose own text does not say what to do.
_KNOWN: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), hint)
    for pattern, hint in (
        (
            r"CUDA out of memory",
            "more --shards makes each rank's batches smaller at the same step; also a smaller --global-batch-size, "
            "or --precision bf16",
        ),
        (
            r"DataLoader worker \(pid.*?\) is killed by signal: Bus error|insufficient shared memory|"
            r"unable to (open|write to|mmap|allocate) .*(shared memory|</torch_)",
            f"{_SHARED_FULL}: docker run --shm-size=8g, fewer --num-workers, or --num-workers 0",
        ),
        (
            r"DataLoader worker \(pid.*?\) is killed by signal: Killed",
            f"{_LOADER_KILLED}: memory may have run out (dmesg tells), fewer --num-workers",
        ),
        (
            r"DataLoader worker \(pid.*?\) (is killed by signal|exited unexpectedly)",
            "a data loading process died: the log has its last words; --num-workers 0 shows its error in the rank",
        ),
        (
            r"preamble\.(length|nbytes|opcode|slot)|mismatch between collectives|"
            r"collectives? (type|shape)s? (are|is)? ?(mismatch|differ)",
            "ranks called different collectives: a collective or an early return that depends on the rank or its data",
        ),
        (
            r"device-side assert",
            "an index is out of range on the device: CUDA_LAUNCH_BLOCKING=1 shows where, --device cpu says which",
        ),
        (
            r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
            "device memory is full: more --shards, a smaller --global-batch-size, or --precision bf16",
        ),
        (
            r"EADDRINUSE|Address already in use",
            "another process listens on that port: choose another, or leave --master-port out for a free one",
        ),
        (r"Too many open files", "raise the limit: ulimit -n 65536, or fewer --num-workers"),
        (r"can't start new thread|Resource temporarily unavailable", "raise the limit of processes: ulimit -u"),
        (r"No space left on device", "the disk is full: df tells which, --run-dir may lie on another"),
        (r"^MemoryError|DefaultCPUAllocator: can't allocate memory", "memory is full: smaller batches, more --shards"),
    )
)


def hint_for(text: str, signs: MemorySigns = NOTHING_COUNTED) -> str:
    """The fix for an error that is known by its text, or an empty string."""
    hint = next((hint for pattern, hint in _KNOWN if pattern.search(text)), "")
    if hint.startswith(_SHARED_FULL) and signs.shared_size:
        return f"{hint}; {_space(signs)}"
    if hint.startswith(_LOADER_KILLED) and signs.oom_kills:
        return f"the kernel ended a data loading process for lack of memory ({size(signs.limit)}): fewer --num-workers"
    return hint
