"""torch's compiler is imported where something is compiled, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).with_name("recipes")


def said_by(text: str, **environ: str) -> str:
    """What a program prints that begins in a process without the compiler."""
    start = """
import os, sys, torch
from torch import nn
from samestep.train import without_compiler

def is_there(): return "torch._dynamo" in sys.modules

model = nn.Linear(2, 1)
assert not is_there()
"""
    ran = subprocess.run(
        [sys.executable, "-c", start + text],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1"} | environ,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize(
    ("recipe", "flags"), [("small", ()), ("everything", ("--clip-grad-norm", 1)), ("checkpointed", ())]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_and_its_resume_do_not_import_it(
    trained: Any, recipe: str, flags: tuple[object, ...], ranks: int
) -> None:
    more = {"ranks": ranks, "env": {"PROGRAM": str(RECIPES / f"{recipe}.py")}}
    flags = ("--checkpoint-every", 2, "--shards", 3, *flags)
    trained("uncompiled", *flags, "--max-steps", 3, **more)
    again = trained("uncompiled", *flags, "--max-steps", 5, **more)
    assert again.events("run_finished")[-1]["steps"] == 5


def test_deterministic_mode_is_on_for_what_is_compiled_later() -> None:
    text = """
without_compiler.use_deterministic_algorithms(True, warn_only=True)
assert torch.is_deterministic_algorithms_warn_only_enabled() and not is_there()
import torch._inductor.config as config
print(config.deterministic)
without_compiler.use_deterministic_algorithms(False)
print(config.deterministic, torch.are_deterministic_algorithms_enabled())
"""
    assert said_by(text).split() == ["True", "False", "False"]


def test_a_caller_gets_back_what_the_compiler_would_read() -> None:
    text = """
from samestep.train import caller, environment
with caller.undisturbed():
    environment.pin(1, False)
    assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1" and torch.are_deterministic_algorithms_enabled()
print(os.environ.get("TORCHINDUCTOR_DETERMINISTIC"), torch.are_deterministic_algorithms_enabled(), is_there())
"""
    assert said_by(text).split() == ["None", "False", "False"]
    assert said_by(text, TORCHINDUCTOR_DETERMINISTIC="0").split() == ["0", "False", "False"]


def test_once_it_is_there_optimizers_are_torchs_own() -> None:
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


def test_whoever_asks_for_the_compiler_while_a_model_is_wrapped_gets_it() -> None:
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
