"""Where the launcher's own words end and the recipe's begin: `samestep run [options] RECIPE [anything]`.

Everything after the recipe belongs to it; the launcher looks there only for the run directory and the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from cyclopts import Parameter

from samestep.launcher.command_line import toml_file
from samestep.launcher.command_line.options import HELP, PRINT_CONFIG, nearest_hint, peek
from samestep.launcher.command_line.wrong_side import after
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import ENV_CONFIG, ENV_LAUNCHED, ENV_RUN_DIR, UsageError, default_run_dir

_WORDS = ("run", "verify", "chaos", "submit slurm", "submit kubernetes")
_BEFORE_RECIPES = frozenset(f"samestep {word}" for word in _WORDS)


class Kind(Enum):
    """How a recipe is started."""

    SCRIPT = "script"
    MODULE = "module"
    COMMAND = "command"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What every rank runs: a file, a module or a program, with arguments that are none of the launcher's business."""

    target: str
    arguments: tuple[str, ...] = ()
    kind: Kind = Kind.SCRIPT

    def run_dir(self, environ: Mapping[str, str], *, ours: bool = True) -> Path:
        """Flag, environment, TOML file, default: the order in which a worker reads it too.

        Args:
            environ: the launcher's environment.
            ours: it is a recipe that trains; flags of other programs are their own, whatever they are called.

        Raises:
            UsageError: it is empty, or no string in the TOML file.
        """
        flag = peek(self.arguments, "run-dir") if ours else None
        if flag == "":
            raise _no_folder("--run-dir")
        # below another run the variable names that run's directory, which is not ours to share
        inherited = None if environ.get(ENV_LAUNCHED) else environ.get(ENV_RUN_DIR)
        found = flag or inherited
        if not found and ours:
            found = _run_dir_in_file(peek(self.arguments, "config") or environ.get(ENV_CONFIG))
        name = self.target if self.kind is Kind.MODULE else f"{Path(self.target).stem}.py"
        return Path(found) if found else default_run_dir(name)

    @property
    def device(self) -> str:
        """`--device` among the recipe's arguments, `auto` if there is none."""
        return peek(self.arguments, "device") or "auto"


def _run_dir_in_file(path: str | None) -> str | None:
    if not path:
        return None
    try:
        value = toml_file.read(Path(path)).get("run-dir")
    except (UsageError, ValueError):
        return None  # the worker reads the same file and says what is wrong with it
    if value is not None and not (isinstance(value, str) and value):
        raise _no_folder(f"run_dir in {path}", value)
    return value


def _no_folder(setting: str, value: object = "") -> UsageError:
    shown = repr(value) if value != "" else "empty"
    return UsageError(f"{setting} is expected to be a folder, but is {shown}", "leave it out for runs/RECIPE")


@dataclass(frozen=True, slots=True)
class _Flag:
    field: str
    takes_value: bool


def split(
    argv: Sequence[str], config_type: type[Any] = LaunchConfig, program: str = "samestep run"
) -> tuple[list[str], list[str]]:
    """The launcher's tokens, with repeated flags reduced to the last, and the recipe with its arguments.

    Raises:
        UsageError: an unknown flag (names the nearest), one without its value, or two spellings that contradict.
    """
    known = _flags(config_type)
    given: dict[str, tuple[str, str | None]] = {}
    position = 0
    while position < len(argv):
        token = argv[position]
        if token == "--":
            return _tokens(given), list(argv[position + 1 :])
        if not token.startswith("-") or token == "-":
            break
        name, flag, value = _lookup(token, known, program)
        position += 1
        if flag.takes_value and value is None:
            if position == len(argv):
                raise UsageError(f"{name} is expected to be followed by a value, but is the last word", "add the value")
            value = argv[position]
            position += 1
        _note(given, flag.field, name, value)
    return _tokens(given), list(argv[position:])


def split_around(
    argv: Sequence[str], config_type: type[Any], program: str = "samestep submit"
) -> tuple[list[str], list[str]]:
    """As `split`, with options right after the recipe too: up to the first word that is none of them, or `--`.

    Raises:
        UsageError: as `split`.
    """
    own, words = split(argv, config_type, program)
    known, end = _flags(config_type), 1
    while end < len(words) and words[end].startswith("-") and words[end] not in ("-", "--"):
        name, equals, _ = words[end].partition("=")
        flag = known.get(name.replace("_", "-") if name.startswith("--") else name)
        if flag is None:
            break
        end += 2 if flag.takes_value and not equals else 1
    after, rest = words[1:end], words[end:]
    if rest[:1] == ["--"]:
        rest = rest[1:]
    return split([*own, *after], config_type, program)[0], [*words[:1], *rest]


def interleaved(argv: Sequence[str], config_type: type[Any], program: str) -> tuple[list[str], list[str]]:
    """As `split`, for a command whose options may stand before, between and after its words.

    Raises:
        UsageError: as `split`.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    own, words, rest = list[str](), list[str](), list(argv[:end])
    while rest:
        flags, rest = split(rest, config_type, program)
        own += flags
        words += rest[:1]
        rest = rest[1:]
    return own, [*words, *argv[end + 1 :]]


def one_word(
    argv: Sequence[str], command: str, what: str, usage: str, flags: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """The word of a command that takes one, and which flags stand around it; after `--`, no word is a flag.

    Raises:
        UsageError: another number of words, or an unknown flag.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    words = [word for word in argv[:end] if word not in flags]
    for word in words:
        if word.startswith("-"):
            raise UsageError(f"unknown option {word}", usage)
    words += argv[end + 1 :]
    if len(words) != 1:
        raise UsageError(f"{command} is expected to be followed by one {what}, but got {len(words)} words", usage)
    return words[0], [word for word in argv[:end] if word in flags]


def _flags(config_type: type[Any]) -> dict[str, _Flag]:
    hints = get_type_hints(config_type, include_extras=True)
    known = {word: _Flag(word, False) for word in (*HELP, PRINT_CONFIG)}
    for field in fields(config_type):
        hint = hints[field.name]
        parameter = next(item for item in hint.__metadata__ if isinstance(item, Parameter))
        flag = _Flag(field.name, takes_value=hint.__origin__ is not bool)
        for name in parameter.name or (f"--{field.name.replace('_', '-')}",):
            known[name] = flag
    return known


def _lookup(token: str, known: Mapping[str, _Flag], program: str) -> tuple[str, _Flag, str | None]:
    text, equals, rest = token.partition("=")
    name = text.replace("_", "-") if text.startswith("--") else text
    value = rest if equals else None
    if not name.startswith("--") and len(name) > 2 and name[:2] in known and known[name[:2]].takes_value:
        name, value = name[:2], token[2:].removeprefix("=")  # -t3, as argparse reads it
    if name not in known:
        hint = after(name, program) if program in _BEFORE_RECIPES else ""
        hint = hint or nearest_hint(name, {word for word in known if word.startswith("--")})
        raise UsageError(f"unknown option {text}", hint or f"{program} --help lists the options")
    return name, known[name], value


def _note(given: dict[str, tuple[str, str | None]], field: str, name: str, value: str | None) -> None:
    earlier = given.get(field)
    if earlier and earlier[0] != name and earlier[1] != value:
        raise UsageError(
            f"{earlier[0]} and {name} are expected to agree, but are {earlier[1]} and {value}",
            "they are two names of one option: drop one of them",
        )
    given[field] = (name, value)


def _tokens(given: Mapping[str, tuple[str, str | None]]) -> list[str]:
    # with "=", so that a value that starts with a dash is not taken for a flag
    return [name if value is None else f"{name}={value}" for name, value in given.values()]
