"""From a dataclass to a configuration: flags, environment, TOML file and defaults, in that order.

An option is one dataclass field annotated with `Option(help, unit)`. Everything else (flag, environment name, TOML
key, `--help`, README table) is derived from that field by cyclopts or by `table`. Both sides use this file: the
launcher for its own flags, a worker for the recipe's.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import cyclopts
from cyclopts import Parameter

from samestep.launcher.contract import UsageError

Config = TypeVar("Config")


def Option(text: str, unit: str = "", name: str | tuple[str, ...] | None = None, **more: Any) -> Parameter:  # noqa: N802 (reads like the class it returns)
    """Describe one option: `text` without full stop, `unit` of its value, `name` only where aliases exist."""
    return Parameter(help=f"{text} [{unit}]" if unit else text, name=name, **more)


def load(
    config_type: type[Config],
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    prefixes: Sequence[str] = ("SAMESTEP_",),
    program: str = "recipe",
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Make a `config_type` from `argv` (without the program's name), `environ` and the file named by `--config`.

    `defaults` overrides the dataclass's own defaults. The dataclass's `__post_init__` is where values are judged.

    Raises:
        UsageError: an unknown option (names the nearest), a value of the wrong type, or one the dataclass refuses.
        SystemExit: `--help` was asked for and has been printed.
    """
    _inherit_help(config_type)
    tokens = _dashed(argv)
    chain: list[Any] = [cyclopts.config.Dict(_from_environ(config_type, environ, prefixes), source="environment")]
    path = _config_path(tokens, environ, prefixes) if "config" in _names(config_type) else None
    if path is not None:
        chain.append(cyclopts.config.Dict(_from_toml(config_type, path), source=str(path)))
    if defaults:
        chain.append(cyclopts.config.Dict(dict(defaults), source="launcher"))

    def build(config: Any = None) -> Any:
        return config_type() if config is None else config

    build.__annotations__ = {"config": Annotated[config_type | None, Parameter(name="*")]}
    app = cyclopts.App(
        name=program,
        help_format="plaintext",
        config=chain,
        version_flags=[],
        result_action="return_value",
    )
    app.default(build)
    if any(token in ("--help", "-h") for token in tokens):
        app.help_print([])
        raise SystemExit(0)
    try:
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        config: Config = command(*bound.args, **bound.kwargs)
    except cyclopts.CycloptsError as error:
        raise _as_usage_error(error, program, prefixes[0]) from error
    return config


def table(config_type: type[Any], prefix: str = "SAMESTEP_") -> list[tuple[str, str, str, str]]:
    """Rows (flag, environment name, default, help with unit) of every option, in the order of definition."""
    _inherit_help(config_type)
    hints = get_type_hints(config_type, include_extras=True)
    rows = []
    for field in dataclasses.fields(config_type):
        if not field.init:
            continue
        parameter = next((m for m in getattr(hints[field.name], "__metadata__", ()) if isinstance(m, Parameter)), None)
        flags = parameter.name if parameter and parameter.name else (f"--{field.name.replace('_', '-')}",)
        default = field.default if field.default is not dataclasses.MISSING else ""
        shown = "" if default is None or default == () else str(default)
        rows.append((next(iter(flags)), f"{prefix}{field.name.upper()}", shown, (parameter.help or "") if parameter else ""))
    return rows


def _inherit_help(config_type: type[Any]) -> None:
    """Keep the description of an option whose default a subclass changes: `epochs: int = 3`."""
    hints = get_type_hints(config_type, include_extras=True)
    for base in config_type.__mro__[1:]:
        for name, hint in getattr(base, "__annotations__", {}).items():
            if name not in config_type.__dict__.get("__annotations__", {}) or hasattr(hints[name], "__metadata__"):
                continue
            inherited = get_type_hints(base, include_extras=True)[name]
            if hasattr(inherited, "__metadata__"):
                config_type.__annotations__[name] = Annotated[(hints[name], *inherited.__metadata__)]


def _names(config_type: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(config_type) if field.init]


def _dashed(argv: Sequence[str]) -> list[str]:
    """Accept `--global_batch_size` for `--global-batch-size`; values keep their underscores."""
    result: list[str] = []
    for position, token in enumerate(argv):
        if token == "--":
            return result + list(argv[position:])
        flag, equals, value = token.partition("=")
        result.append(flag.replace("_", "-") + equals + value if flag.startswith("--") else token)
    return result


def _from_environ(config_type: type[Any], environ: Mapping[str, str], prefixes: Sequence[str]) -> dict[str, Any]:
    values = {}
    for name in _names(config_type):
        for prefix in prefixes:
            text = environ.get(f"{prefix}{name.upper()}")
            if text:
                values[name.replace("_", "-")] = text
                break
    return values


def _config_path(tokens: Sequence[str], environ: Mapping[str, str], prefixes: Sequence[str]) -> Path | None:
    found = peek(tokens, "config")
    if found is None:
        found = next((environ[f"{p}CONFIG"] for p in prefixes if environ.get(f"{p}CONFIG")), None)
    return Path(found) if found else None


def peek(tokens: Sequence[str], option: str) -> str | None:
    """Value of `--option VALUE` or `--option=VALUE` in tokens that belong to somebody else; the last one counts."""
    value = None
    for position, token in enumerate(tokens):
        flag, equals, rest = token.partition("=")
        if flag.startswith("--") and flag[2:].replace("_", "-") == option:
            if equals:
                value = rest
            elif position + 1 < len(tokens):
                value = tokens[position + 1]
    return value


def _from_toml(config_type: type[Any], path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"--config is expected to be a readable TOML file, but {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config is expected to be valid TOML, but {path}: {error}") from None
    known = {name.replace("_", "-") for name in _names(config_type)}
    values = {key.replace("_", "-"): value for key, value in data.items()}
    for key in values:
        if key not in known:
            raise UsageError(f"{path} has no known option {key!r}", nearest_hint(key, known))
    return values


def nearest_hint(word: str, known: set[str]) -> str:
    """`did you mean …` for the known word nearest to `word`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def _as_usage_error(error: cyclopts.CycloptsError, program: str, prefix: str) -> UsageError:
    text = " ".join(str(error).split())
    if isinstance(error, cyclopts.UnusedCliTokensError):
        text = f"unexpected argument {(error.unused_tokens or [''])[0]!r}"
    text = re.sub(r"\[([a-z0-9-]+)\] from environment", lambda m: prefix + m[1].upper().replace("-", "_"), text)
    message, separator, guess = text.partition(" Did you mean ")
    hint = f"did you mean {guess}" if separator else f"{program} --help lists the options"
    message = message.rstrip(".")
    return UsageError(message[:1].lower() + message[1:], hint)
