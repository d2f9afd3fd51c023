"""torch's compiler is imported where something is compiled, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).with_name("recipes")


START = """
import os, sys, torch
from torch import nn
from samestep.train import without_compiler

def is_there(): return "torch._dynamo" in sys.modules

model = nn.Linear(2, 1)
assert not is_there()
"""


@pytest.fixture
def said_by(start: Any, tmp_path: Path) -> Callable[..., str]:
    """`said_by(text)`: what a program prints that begins in a process without the compiler."""

    def run(text: str, **environ: str) -> str:
        script = tmp_path / "program.py"
        script.write_text(START + text)
        ended = start(script, env=environ)
        assert ended.codes == [0], ended.stderr
        return str(ended.stdout)

    return run


@pytest.mark.parametrize(("recipe", "flags"), [("small", ()), ("everything", ("--clip-grad-norm", 1))])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_and_its_resume_do_not_import_it(
    trained: Any, recipe: str, flags: tuple[object, ...], ranks: int
) -> None:
    more = {"ranks": ranks, "env": {"PROGRAM": str(RECIPES / f"{recipe}.py")}}
    flags = ("--checkpoint-every", 2, "--shards", 3, *flags)
    trained("uncompiled", *flags, "--max-steps", 3, **more)
    again = trained("uncompiled", *flags, "--max-steps", 5, **more)
    assert again.events("run_finished")[-1]["steps"] == 5


def test_deterministic_mode_is_on_for_what_is_compiled_later(said_by: Callable[..., str]) -> None:
    text = """
without_compiler.use_deterministic_algorithms(True, warn_only=True)
assert torch.is_deterministic_algorithms_warn_only_enabled() and not is_there()
import torch._inductor.config as config
print(config.deterministic)
without_compiler.use_deterministic_algorithms(False)
print(config.deterministic, torch.are_deterministic_algorithms_enabled())
"""
    assert said_by(text).split() == ["True", "False", "False"]


def test_a_caller_gets_back_what_the_compiler_would_read(said_by: Callable[..., str]) -> None:
    text = """
from samestep.train import caller, environment
with caller.undisturbed():
    environment.pin(1, False)
    assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1" and torch.are_deterministic_algorithms_enabled()
print(os.environ.get("TORCHINDUCTOR_DETERMINISTIC"), torch.are_deterministic_algorithms_enabled(), is_there())
"""
    assert said_by(text).split() == ["None", "False", "False"]
    assert said_by(text, TORCHINDUCTOR_DETERMINISTIC="0").split() == ["0", "False", "False"]


def test_once_it_is_there_optimizers_are_torchs_own(said_by: Callable[..., str]) -> None:
    text = """
without_compiler.keep_unloaded()
without_compiler.keep_unloaded()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
inner = torch.optim.Optimizer.add_param_group.__wrapped__
assert not is_there() and inner.__dynamo_disable.__module__ == "samestep.train.without_compiler"
import torch._dynamo
torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
print(inner.__dynamo_disable.__module__)
without_compiler.keep_unloaded()
print(inner.__dynamo_disable.__module__)
"""
    assert said_by(text).split() == ["torch._dynamo.eval_frame"] * 2


def test_whoever_asks_for_the_compiler_while_a_model_is_wrapped_gets_it(said_by: Callable[..., str]) -> None:
    text = """
with without_compiler.wrapping():
    assert torch._dynamo.utils.get_optimize_ddp_mode() == "ddp_optimizer" and not is_there()
assert not is_there() and "_dynamo" not in vars(torch)
with without_compiler.wrapping():
    found = torch._dynamo.config.optimize_ddp
    assert torch._dynamo is sys.modules["torch._dynamo"]
assert torch._dynamo is sys.modules["torch._dynamo"]
with without_compiler.wrapping():
    print(found, torch._dynamo.utils.get_optimize_ddp_mode())
"""
    assert said_by(text).split() == ["True", "ddp_optimizer"]
