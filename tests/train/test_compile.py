"""--compile: the same bits on any number of ranks, and a sentence where there is no compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from samestep.train import compilation
from samestep.train.compilation import compile_in_place
from samestep.train.parallel.group import SoloGroup

CPU = torch.device("cpu")


def test_without_a_compiler_the_model_stays_and_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = nn.Linear(2, 1)
    text = compile_in_place(model, CPU, SoloGroup())
    assert "--compile is left out" in text
    assert "No working C++ compiler found" in text
    assert model._compiled_call_impl is None


def test_one_rank_without_a_compiler_is_enough_for_none_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(SoloGroup):
        def gather_bytes(self, data: bytes) -> list[bytes]:
            return [data, b'"no triton"']

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = nn.Linear(2, 1)
    assert "rank 1: no triton" in compile_in_place(model, CPU, Two())
    assert model._compiled_call_impl is None


def test_a_model_of_torchs_own_modules_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=count, **options))
    model = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
    assert compile_in_place(model, CPU, SoloGroup()) == ""
    graphs.clear()  # that of the try
    for rows in (3, 3, 4):
        model(torch.ones(rows, 2))
    assert len(graphs) == 2, "one for each shape"
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


CUT = """
import torch, torch.distributed as dist
from torch import nn
from samestep.train.parallel.replica import replicate

graphs = []

def count(graph, _):
    graphs.append(graph)
    return graph.forward

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = nn.Sequential(*(nn.Linear(600, 600) for _ in range(3)))
replica = replicate(model, find_unused=False, bucket_mb=1.0)
compiled = torch.compile(lambda *words: model._call_impl(*words), backend=count)
model._compiled_call_impl = compiled
model(torch.ones(2, 600)).sum().backward()
print(len(graphs))
"""


@pytest.mark.compiler
def test_a_graph_is_not_cut_where_buckets_of_gradients_end(start: Any, tmp_path: Path) -> None:
    script = tmp_path / "cut.py"
    script.write_text(CUT)
    ended = start(script)
    assert ended.codes == [0], ended.stderr
    assert ended.stdout == "1\n"


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.timeout(600)
def test_compiled_runs_have_the_same_bits_on_any_world_size_and_over_a_stop(trained: Any) -> None:
    flags = ("--compile", "--shards", 2, "--global-batch-size", 15, "--epochs", 1)
    more = {"seconds": 300, "env": {"PROGRAM": str(Path(__file__).with_name("recipes") / "small.py")}}
    one = trained("compiled", *flags, cwd="one", **more)
    two = trained("compiled", *flags, cwd="two", ranks=2, **more)
    assert two.bits == one.bits
    trained("compiled", *flags, "--max-steps", 3, cwd="stopped", **more)
    again = trained("compiled", *flags, cwd="stopped", ranks=2, **more)
    assert again.digest == one.digest
    assert not any("left out" in event["text"] for event in one.events("warning"))


def test_past_torchs_limit_everything_is_compiled_still_and_that_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, said = [], list[str]()

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Looks(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=count, **options))
    monkeypatch.setattr(compilation, "_MANY", 9)
    model = Looks()
    compile_in_place(nn.Linear(2, 1), CPU, SoloGroup(), lambda _: pytest.fail("told a run before"))
    assert compile_in_place(model, CPU, SoloGroup(), said.append) == ""
    graphs.clear()
    limit = 8  # of torch, by default
    for call in range(1, 2 * limit):
        assert model(torch.ones(2)).tolist() == [call, call]
    assert len(graphs) == 2 * limit - 1
    assert [text.partition(" graphs")[0] for text in said] == ["--compile has compiled 9"]
