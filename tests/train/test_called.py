"""What `train` is called with: mistakes are named before anything is done."""

from __future__ import annotations

import functools
import io
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from torch import nn

from samestep.launcher.contract import UsageError
from samestep.train import Components, TrainConfig
from samestep.train.called import check_call
from samestep.train.observe.bar import PlainLines, bar


def build(config: TrainConfig) -> Components:
    raise NotImplementedError


@dataclass
class Options(TrainConfig):
    width: int = 3
    kinds: ClassVar[int] = 2
    widest = 9  # a constant of the recipe, no option


class Undecorated(TrainConfig):
    epochs: int = 3


@dataclass
class WithoutType(TrainConfig):
    width: int = 3
    epochs = 5


@dataclass
class OfWithoutType(WithoutType):
    depth: int = 1


class Constants(TrainConfig):
    kinds: ClassVar[int] = 2


PARTS = Components(model=nn.Linear(1, 1), loss=build, optimizer=None, train_data=[1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words", "hint"),
    [
        ((PARTS, TrainConfig), "function build first.*what it returned", "without parentheses"),
        ((Options, build), "function build first.*class Options", "train\\(build, MyConfig\\)"),
        ((None, Options), "function build first.*got None", "train\\(build"),
        ((lambda: None, Options), "build.*\\(config\\), but takes \\(\\)", "def .*\\(config\\)"),
        ((lambda config, data: None, Options), "build.*\\(config, data\\)", "\\(config\\)"),
        (
            (build, Options(width=4)),
            "class derived from TrainConfig.*an object of Options",
            "train\\(build, MyConfig\\)",
        ),
        ((build, {"epochs": 3}), "class derived from TrainConfig.*an object of dict", "@dataclass"),
        ((build, nn.Linear), "class derived from TrainConfig.*the class Linear", "@dataclass"),
        ((build, Undecorated), "Undecorated.*dataclass.*epochs", "@dataclass above class Undecorated"),
        ((build, WithoutType), "WithoutType.epochs.*type.*5", "epochs: int = 5"),
        ((build, OfWithoutType), "WithoutType.epochs.*type.*5", "epochs: int = 5"),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else value,
)
def test_a_mistake_in_the_call_is_named_with_its_fix(arguments: tuple[Any, Any], words: str, hint: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        check_call(*arguments)
    assert re.search(hint, raised.value.hint), raised.value.hint


@pytest.mark.parametrize(
    "arguments",
    [
        (build, TrainConfig),
        (build, Options),
        (build, Constants),
        (lambda config, verbose=False: build(config), Options),
        (functools.partial(build), Options),
        (lambda *words: build(*words), Options),
    ],
)
def test_whatever_can_be_called_with_a_configuration_is_fine(arguments: tuple[Any, Any]) -> None:
    check_call(*arguments)


def test_a_run_directory_whose_name_is_too_long_is_a_sentence(start: Any) -> None:
    ended = start("small", "--run-dir", "x" * 300)
    assert ended.codes == [2]
    assert ended.stderr.count("\n") == 2, ended.stderr
    assert "file name too long" in ended.stderr


def test_a_stdout_that_was_closed_before_gets_plain_lines() -> None:
    assert isinstance(bar(None, 10, 1), PlainLines)


def test_a_line_is_printed_in_any_encoding() -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    PlainLines().print("Größe: 1", stream)
    assert written.getvalue() == rb"Gr\xf6\xdfe: 1" + b"\n"
