"""`--compile`: torch.compile in place, in a way that no bit depends on what a rank has seen before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from samestep.train.parallel.group import Group, gather_json

_MANY = 64  # graphs: each shard size of training and evaluation gets its own, and hardly anything else should
# Past its own limits torch runs a function uncompiled, in other bits, and sooner on a rank of more shards.
_NO_LIMIT = 1 << 30


def compile_in_place(
    model: nn.Module, device: torch.device, group: Group, warn: Callable[[str], None] = lambda _: None
) -> str:
    """Compile the model's forward and backward at their first use; names of weights stay. A collective.

    `warn` is told where more and more is compiled.

    A graph is made for each shape. A graph for any shape, which torch makes when it has seen two, would make the bits
    depend on the order of shapes, so on the number of ranks and on where a run was resumed.

    Returns:
        Why the model was not compiled, on any rank or all of them; empty if it was.
    """
    # A worker pool of the compiler's own would be left behind by a rank that is killed.
    torch._inductor.config.compile_threads = 1
    problems = gather_json(group, _problem(device))
    for rank, problem in enumerate(problems):
        if problem:
            return f"--compile is left out, because torch.compile does not work here (rank {rank}: {problem})"
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _NO_LIMIT
    _count.begin(warn)
    model._compiled_call_impl = torch.compile(_in_a_frame_of_ours(model._call_impl), dynamic=False)
    return ""


@dataclass(slots=True)
class _Count:
    """Called whenever a graph is compiled, for the run that goes on: a process has one at a time."""

    warn: Callable[[str], None] = lambda _: None
    graphs: int = 0
    registered: bool = False

    def begin(self, warn: Callable[[str], None]) -> None:
        """Count anew, and tell this run."""
        self.warn, self.graphs = warn, 0
        if not self.registered:
            torch._dynamo.callback.on_compile_start(self)
            self.registered = True

    def __call__(self, *_: object) -> None:
        self.graphs += 1
        if self.graphs == _MANY:
            self.warn(
                f"--compile has compiled {_MANY} graphs so far, and goes on: one for each shape, and for each number "
                "that the model's code looks at (item(), a counter of its own), which takes seconds each time; "
                "hint: pad samples to few lengths, keep such numbers in tensors, or leave out --compile"
            )


_count = _Count()


def _in_a_frame_of_ours(call: Callable[..., Any]) -> Callable[..., Any]:
    """What `model.compile()` compiles, in a function that is no file of torch.

    The compiler leaves out frames of torch's own files: `compile()` of a model that is made of torch's modules alone,
    such as Sequential, does nothing (https://github.com/pytorch/pytorch/issues/132923).
    """

    def forward(*arguments: Any, **named: Any) -> Any:
        return call(*arguments, **named)

    return forward


def _problem(device: torch.device) -> str:
    """Try the compiler on one line: a missing C++ compiler or Triton shows only then."""
    try:
        torch.compile(_one_line, dynamic=False)(torch.ones(2, device=device))
    except Exception as error:  # noqa: BLE001 (whatever the compiler stumbles over)
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


def _one_line(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).sin()
