"""The global generators from which code draws on the host: Python's, numpy's and torch's.

A stream can be held: it is left alone while other code runs, and compared afterwards. That costs a fraction of seeding
it for each sample. Code that brings a stream back to where it was hides what it drew; `brought_back` notices it.
"""

from __future__ import annotations

import _random
import ctypes
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from samestep.train.data.imported_names import ImportedNames
from samestep.train.data.order import key_tables

Words = npt.NDArray[np.uint32]

_MT19937_WORDS = 625  # 624 of the state and the position (numpy/random/src/mt19937/mt19937.h, mt19937_state)
_AT_ONCE = 64  # samples; their words fit into a core's cache


PYTHON: Any = random._inst  # behind the functions of `random`
_seed_python = super(random.Random, PYTHON).seed


class Stream(Protocol):
    """One generator."""

    def seed(self, value: int) -> None:
        """Begin anew from 64 bits."""

    def seed_each(self, values: Sequence[int]) -> Iterator[None]:
        """At each turn begin anew from the next of these 64 bits, for what makes one sample after the other."""

    def save(self) -> Any:
        """The whole state."""

    def load(self, state: Any) -> None:
        """Go back to a saved state."""

    def mark(self) -> Any:
        """Something that compares equal until somebody draws; meant for a stream that was just seeded."""

    def hold(self) -> Callable[[], bool]:
        """Begin to watch; the function tells whether somebody drew since, and leaves the stream as it was before."""


class PythonStream:
    """The functions of `random`."""

    def __init__(self) -> None:
        self._words = _memory_of_python()

    def seed(self, value: int) -> None:
        """See Stream; as `random.seed`, a quarter of whose time goes into looking at what it was given."""
        _seed_python(value)
        PYTHON.gauss_next = None

    def seed_each(self, values: Sequence[int]) -> Iterator[None]:
        """See Stream.

        The 624 words of a sample's state are the halves of `extend(value, 0)`, `extend(value, 1)`, … (see order.py),
        made for many samples at once and put in place. `random.seed` spreads a number over the words one after the
        other, and the first draw mixes them all once more: together they take twice as long.
        """
        for begin in range(0, len(values), _AT_ONCE):
            tables = key_tables(values[begin : begin + _AT_ONCE], _MT19937_WORDS // 2)
            for words in tables.astype("<u8", copy=False).view("<u4"):
                self._put(words)
                yield

    def _put(self, words: Words) -> None:
        if self._words is None:
            random.setstate((3, (*words.tolist(), 0), None))
            return
        self._words[0] = 0  # the next word to draw
        self._words[1:] = words
        PYTHON.gauss_next = None

    def save(self) -> Any:
        """See Stream; `random.getstate` makes 624 Python numbers, which takes ten times as long as the memory."""
        return random.getstate() if self._words is None else (self._words.tobytes(), PYTHON.gauss_next)

    mark = save

    def load(self, state: Any) -> None:
        """See Stream."""
        if self._words is None:
            random.setstate(state)
            return
        words, PYTHON.gauss_next = state
        self._words[:] = np.frombuffer(words, dtype=np.uint32)

    def hold(self) -> Callable[[], bool]:
        """See Stream."""
        return _compared(self, self.mark())


class TorchStream:
    """The generator of CPU tensors."""

    def seed(self, value: int) -> None:
        """See Stream; a negative number for the same bits would cost as much again, for torch tries it as unsigned."""
        torch.default_generator.manual_seed(value)

    def seed_each(self, values: Sequence[int]) -> Iterator[None]:
        """See Stream."""
        return _one_by_one(self, values)

    def save(self) -> Any:
        """See Stream."""
        return torch.get_rng_state()

    load = staticmethod(torch.set_rng_state)

    def mark(self) -> bytes:
        """See Stream."""
        return _bytes(torch.get_rng_state())

    def hold(self) -> Callable[[], bool]:
        """See Stream."""
        state = self.save()
        return _compared(self, _bytes(state), state)


def _bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _one_by_one(stream: Stream, values: Sequence[int]) -> Iterator[None]:
    for value in values:
        stream.seed(value)
        yield


def _compared(stream: Stream, mark: Any, state: Any = None) -> Callable[[], bool]:
    def drawn() -> bool:
        if stream.mark() == mark:
            return False
        stream.load(mark if state is None else state)
        return True

    return drawn


class NumpyStream:
    """The functions of `numpy.random`.

    Reading the state takes numpy 30 us, a hundred times as long as its memory, which numpy shows to ctypes. A caller's
    second normal number, which numpy keeps beside it, is lost where a stream is held.
    """

    def __init__(self) -> None:
        self._generator: Any = None

    def seed(self, value: int) -> None:
        """See Stream."""
        np.random.seed(value & 0xFFFFFFFF)  # as much as torch's own CPU stream takes; 64 bits cost 4 times more

    def seed_each(self, values: Sequence[int]) -> Iterator[None]:
        """See Stream; words put in place would leave a second normal number, of which numpy shows nothing."""
        return _one_by_one(self, values)

    def save(self) -> Any:
        """See Stream."""
        return np.random.get_state()

    load = staticmethod(np.random.set_state)

    def mark(self) -> Any:
        """See Stream; where somebody has put another kind of generator in place, nothing is equal."""
        return self._words.tobytes() if self._is_known() else object()

    def hold(self) -> Callable[[], bool]:
        """See Stream."""
        if not self._is_known():
            return lambda: True
        before = self._words.copy()
        self.seed(0)  # leaves no second normal number, which could be drawn without a trace
        seeded = self.mark()

        def drawn() -> bool:
            touched: bool = self.mark() != seeded
            if touched:
                self.seed(0)  # a normal number may be left once more
            self._words[:] = before
            return touched

        return drawn

    def _is_known(self) -> bool:
        generator: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]  # documented, not in __all__
        if generator is not self._generator:
            self._generator = generator  # the memory is its own
            self._known = isinstance(generator, np.random.MT19937)
            self._words = _memory(generator.ctypes.state_address) if self._known else np.empty(0, np.uint32)
        return self._known


def _memory(address: int, words: int = _MT19937_WORDS) -> Words:
    memory: Any = (ctypes.c_uint32 * words).from_address(address)
    return np.frombuffer(memory, dtype=np.uint32)


def _memory_of_python() -> Words | None:
    """Where the generator behind `random` has its position and its 624 words (Modules/_randommodule.c, RandomObject).

    They are looked for by their values. None where they are not found in this order: another Python may differ.
    """
    *words, position = random.getstate()[1]
    memory = _memory(id(PYTHON), _random.Random.__basicsize__ // 4)
    wanted = np.array([position, *words], dtype=np.uint32)
    places = range(len(memory) - len(wanted) + 1)
    return next((found for at in places if np.array_equal(found := memory[at : at + len(wanted)], wanted)), None)


STREAMS: tuple[Stream, ...] = (PythonStream(), NumpyStream(), TorchStream())
PYTHONS_NAMES = ImportedNames(random, "getstate", "setstate")
_TELLTALES = (  # what reads a state, or goes back to one; Python's are looked for each time
    ((np.random, "get_state"), (np.random, "set_state")),
    tuple(
        (place, name) for place in (torch, torch.random) for name in ("get_rng_state", "set_rng_state", "initial_seed")
    ),
)


@contextmanager
def brought_back() -> Iterator[set[int]]:
    """Inside, the set fills with positions in STREAMS of those whose state somebody reads or sets, as fork_rng does."""
    found: set[int] = set()
    telltales = (PYTHONS_NAMES.places(), *_TELLTALES)
    originals = [(module, name, getattr(module, name)) for places in telltales for module, name in places]
    try:
        for number, places in enumerate(telltales):
            for module, name in places:
                setattr(module, name, _noted(getattr(module, name), number, found))
        yield found
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _noted(function: Callable[..., Any], number: int, found: set[int]) -> Callable[..., Any]:
    def noting(*state: Any, **named: Any) -> Any:
        found.add(number)
        return function(*state, **named)

    return noting
