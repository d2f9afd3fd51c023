"""What `train` is called with, judged before anything else: a function that builds, and a class of options."""

from __future__ import annotations

import dataclasses
import inspect

from samestep.launcher.contract import UsageError
from samestep.train.config import TrainConfig
from samestep.train.parts import kind, require_arguments
from samestep.train.recipe import Components


def check_call(build: object, config_type: object) -> None:
    """Judge both arguments.

    Raises:
        UsageError: `build` can't be called with a configuration, or `config_type` is no dataclass of options.
    """
    if not callable(build) or (isinstance(build, type) and issubclass(build, TrainConfig)):
        what = "what it returned" if isinstance(build, Components) else kind(build)
        raise UsageError(
            f"train is expected to get the function build first, but got {what}",
            "train(build, MyConfig), without parentheses after either",
        )
    require_arguments("build", build, "config")
    check_config_type(config_type, "train is expected to get {} second", "train(build, MyConfig)")


def check_config_type(config_type: object, expected: str, example: str) -> None:
    """Judge a class of options; `expected` and `example` say for whom it is.

    Raises:
        UsageError: it is something else, or some of its options would not count.
    """
    if not (isinstance(config_type, type) and issubclass(config_type, TrainConfig)):
        raise UsageError(
            f"{expected.format('a class derived from TrainConfig')}, but got {kind(config_type)}",
            f"@dataclass above class MyConfig(TrainConfig): …, and then {example}",
        )
    for cls in config_type.__mro__[: config_type.__mro__.index(TrainConfig)]:
        _check_options(cls, config_type)


def _check_options(cls: type, config_type: type[TrainConfig]) -> None:
    """What looks like an option and would be passed over without a word."""
    own = [name for name, hint in inspect.get_annotations(cls).items() if "ClassVar" not in str(hint)]
    if own and "__dataclass_fields__" not in vars(cls):
        raise UsageError(
            f"{cls.__name__} is expected to be a dataclass, but is none, so its {own[0]} would be no option",
            f"write @dataclass above class {cls.__name__}",
        )
    known = {field.name for field in dataclasses.fields(config_type)}
    for name, value in vars(cls).items():
        if name not in known or name in own:
            continue
        raise UsageError(
            f"{cls.__name__}.{name} is expected to have a type, but has none, so its {value!r} would not count",
            f"write {name}: {type(value).__name__} = {value!r}",
        )
