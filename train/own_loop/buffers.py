"""The buffers of all models of a loop of one's own as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from samestep.train.parallel.buffers import BufferCombiner
from samestep.train.parallel.no_buffers import NoBuffers


class AllBuffers:
    """Buffers that change in any model's passes, as the state of a run asks for them."""

    def __init__(self, combiners: Sequence[BufferCombiner | NoBuffers], known: set[str]) -> None:
        self._combiners = combiners
        self.known = known

    @property
    def known(self) -> set[str]:
        """Names of those that changed before the start of this process."""
        return self._known

    @known.setter
    def known(self, names: set[str]) -> None:
        self._known = names
        for combiner in self._combiners:
            combiner.known = names

    @property
    def changing(self) -> list[str] | None:
        """Names of those that change; None before the first step."""
        found = [combiner.changing for combiner in self._combiners]
        return None if None in found else sorted({name for names in found for name in names or ()})

    def unsaved(self) -> dict[str, torch.Tensor]:
        """Those that change and are no part of a state_dict."""
        return {name: buffer for combiner in self._combiners for name, buffer in combiner.unsaved().items()}

    def settle(self) -> None:
        """Judge what was not read from a GPU yet."""
        for combiner in self._combiners:
            combiner.settle()
