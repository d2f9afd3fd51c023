"""Under which names modules have a function: `from random import getstate` is one beside `random.getstate`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

Place = tuple[ModuleType, str]

_BY_LIST = next(map(sys.getrefcount, [object()]))  # references to what only a list has, while they are counted


class ImportedNames:
    """All places of some functions of a module.

    Who refers to a function is counted each time. All modules are searched, which takes 30 ms, when the number is
    another one than before.
    """

    def __init__(self, module: ModuleType, *names: str) -> None:
        self._own = [(module, name) for name in names]
        self._functions = [getattr(module, name) for name in names]
        self._places = self._own
        self._others = 0  # that refer to a function, beside the module

    def places(self) -> list[Place]:
        """The module's own and those that import them."""
        others = sum(map(sys.getrefcount, self._functions)) - (_BY_LIST + 1) * len(self._functions)
        if others != self._others:
            self._others, self._places = others, self._search() if others else self._own
        return self._places

    def are_all(self) -> bool:
        """Whether nobody refers to a function in another way, such as an attribute of an object."""
        return len(self.places()) == len(self._own) + self._others

    def _search(self) -> list[Place]:
        wanted = set(map(id, self._functions))
        dictionaries: dict[int, tuple[Any, dict[str, Any]]] = {}  # a module may be in sys.modules twice
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", {})
            dictionaries[id(names)] = (module, names)
        return [
            (module, name)
            for module, names in dictionaries.values()
            for name, value in list(names.items())
            if id(value) in wanted
        ]
