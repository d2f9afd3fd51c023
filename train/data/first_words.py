"""Python's stream for samples that draw little from it: only the first words of each sample's state are made.

A state has 624 words (see PythonStream.seed_each) of which most samples draw a few. Here the first words of many
samples stand one after the other in the generator's memory, and a sample gets its own by the position alone. What it
draws is what the whole state would give, unless it draws more words than it has; `more_was_drawn` tells that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from samestep.train.data.order import key_tables
from samestep.train.data.streams import PYTHON, PYTHONS_NAMES, PythonStream

WORDS = 32  # of each sample, or 16 random floats; 64 take a quarter longer
_SAMPLES = 19  # have room beside each other
_LAST = 0x51AB7E5DC2D96A3F  # the last two words, until the generator makes all of them anew


class FirstWords(PythonStream):
    """The functions of `random`, for a few draws after each turn of `seed_each`."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = memoryview(b"") if self._words is None else self._words.data  # twice as fast as numpy
        self._last = self._memory[-2:].cast("B").cast("Q")
        self._end = 0  # of the words of the sample that is being made
        self._more = False

    def is_safe(self) -> bool:
        """Whether all that a sample can do to the generator is noticed, here or by `brought_back`.

        Who has got `random.getstate` in a way that is not seen could bring the generator back without a trace. Nor is
        a batch safe that is made inside another's sample: `brought_back` has it then, and there is one FirstWords.
        """
        return self._words is not None and PYTHONS_NAMES.are_all()

    def seed_each(self, values: Sequence[int]) -> Iterator[None]:
        """See Stream; only where it `is_safe`. The turn after a sample's looks whether it drew more than it had."""
        assert self._words is not None
        self._more = False
        tables = key_tables(values, WORDS // 2).astype("<u8", copy=False).view("<u4")
        for begin in range(0, len(values), _SAMPLES):
            words = tables[begin : begin + _SAMPLES].ravel()
            self._words[1 : 1 + len(words)] = words
            self._last[0] = _LAST
            for position in range(0, len(words), WORDS):
                self._memory[0] = position
                self._end = position + WORDS
                PYTHON.gauss_next = None
                yield
                self._more = self._more or self._is_past_end()

    def more_was_drawn(self) -> bool:
        """Whether a sample since `seed_each` drew more words than it had, the one that was made last included."""
        return self._more or self._is_past_end()

    def _is_past_end(self) -> bool:
        """The next word is another sample's, or all words have been made anew: the last two are equal once in 2**64.

        `random.seed` leaves the position at the very end.
        """
        return self._memory[0] > self._end or self._last[0] != _LAST
