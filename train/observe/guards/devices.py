"""Tensors that are not where this rank computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from samestep.train.observe.guards.check import Check, Finding, Subject, listed


class SameDevice(Check):
    """Parameters and buffers must be on the device; other tensors of modules and of batches are named."""

    def __init__(self, subject: Subject, device: torch.device) -> None:
        self._model = subject.model
        self._device = device

    def before_loss(self, batch: Any, samples: int) -> Iterator[Finding]:  # noqa: ARG002
        """Before torch itself stumbles over it without a name."""
        state = [*self._model.named_parameters(), *self._model.named_buffers()]
        yield from self._judge(
            [(name, tensor) for name, tensor in state],
            "of the model",
            "make it in __init__, without .to() or .cuda() in forward: the model is moved as a whole",
            fatal=True,
        )
        yield from self._judge(
            [(f"{path}.{key}", value) for path, key, value in _plain_tensors(self._model)],
            "of the model is a plain tensor and",
            "register_buffer(name, tensor, persistent=False) makes it move with the model",
        )
        yield from self._judge(
            [(f"batch{path}", value) for path, value in _leaves(batch)],
            "was not moved and",
            "return dicts, lists and tuples of tensors from collate_fn, or give its class a method to(device)",
        )

    def _judge(
        self, found: list[tuple[str, Tensor]], what: str, hint: str, *, fatal: bool = False
    ) -> Iterator[Finding]:
        wrong = [(name, tensor.device) for name, tensor in found if not same(tensor.device, self._device)]
        if wrong:
            names, devices = listed(name for name, _ in wrong), listed({str(device): 0 for _, device in wrong})
            yield Finding(f"{names} {what} is on {devices}, but this rank computes on {self._device}", hint, fatal)


def same(one: torch.device, other: torch.device) -> bool:
    """`cuda` is any index."""
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)


def _plain_tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.dim():  # torch takes CPU scalars anywhere
                yield path or type(model).__name__, key, value


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.dim():
            yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name, None), f"{path}.{field.name}")
