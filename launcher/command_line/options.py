"""From a dataclass to a configuration: flags, environment, TOML file and defaults, in that order.

An option is one dataclass field annotated with `Option(help, unit)`. Everything else (flag, environment name, TOML
key, `--help`, README table) is derived from that field by cyclopts or by `table`. Both sides use this file: the
launcher for its own flags, a worker for the recipe's.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import cyclopts
from cyclopts import Parameter

from samestep.launcher.command_line import provenance, stdout, toml_file
from samestep.launcher.contract import NOT_OPTIONS, UsageError

HELP = ("--help", "-h")
PRINT_CONFIG = "--print-config"
_NARROWEST = 40
_OWN = cyclopts.Group("Options of this recipe alone", sort_key=0)
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
    operands: str = "",
    defaults: Mapping[str, Any] | None = None,
    folder: Path = Path(),
) -> Config:
    """Make a `config_type` from `argv` (without the program's name), `environ` and the file named by `--config`.

    `operands` is what the usage line of `--help` names after the options; `defaults` overrides the dataclass's own;
    a relative `--config` is looked for in `folder`.
    The dataclass's `__post_init__` is where values are judged.

    Raises:
        UsageError: an unknown option (names the nearest), a value of the wrong type, or one the dataclass refuses.
        SystemExit: `--help` or `--print-config` was asked for and has been printed to stdout.
    """
    tokens = _dashed(argv)
    given = _from_environ(config_type, environ, prefixes)
    layers: list[tuple[str, dict[str, Any]]] = [("environment", given)]
    path = _config_path(tokens, environ, prefixes) if "config" in _names(config_type) else None
    if path is not None:
        layers.append((str(path), _from_toml(config_type, folder / path)))
    if defaults:
        layers.append(("launcher", dict(defaults)))
    chain = [cyclopts.config.Dict(values, source=source) for source, values in layers]
    tokens, word = question(tokens)
    _refuse_misread(config_type, tokens, chain)
    app = _app(config_type, program, operands, chain)
    if word in HELP:
        with stdout.until_the_reader_leaves():
            app.help_print([], console=_wide_enough())
        raise SystemExit(0)
    try:
        _, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        raise _as_usage_error(error, program, prefixes[0]) from error
    config = config_type(**bound.arguments)
    if word == PRINT_CONFIG:
        origin = provenance.sources(spellings(config_type), tokens, layers)
        values = {name: getattr(config, name.replace("-", "_")) for name in origin}
        with stdout.until_the_reader_leaves():
            print(provenance.render(values, origin, f"options of {program}", readable="config" in values))
        raise SystemExit(0)
    return config


def _wide_enough() -> Any:
    """A console of at least 40 columns: with COLUMNS=0, which some terminals say, rich would wrap for ever."""
    from rich.console import Console

    console = Console()
    return console if console.width >= _NARROWEST else Console(width=_NARROWEST)


def question(tokens: Sequence[str]) -> tuple[list[str], str]:
    """The tokens without --help, -h and --print-config, and which of these was among them, if any."""
    end = tokens.index("--") if "--" in tokens else len(tokens)
    found = [word for word in map(_dash, tokens[:end]) if word in (*HELP, PRINT_CONFIG)]
    asked = next((word for word in HELP if word in found), found[0] if found else "")
    return [token for i, token in enumerate(tokens) if i >= end or _dash(token) not in found], asked


def _app(config_type: type[Any], program: str, operands: str, chain: Sequence[Any]) -> cyclopts.App:
    app = cyclopts.App(
        name=program,
        default_parameter=Parameter(allow_repeating=True),  # the last one counts, as in argparse; lists collect
        usage=f"Usage: {program} [OPTIONS] {operands}".rstrip(),
        help_format="plaintext",
        config=chain,
        help_flags=[],
        help_epilogue="--help shows this page; --print-config shows every value and where it came from.",
        version_flags=[],
        result_action="return_value",
    )
    app.default(command(config_type))
    return app


def spellings(config_type: type[Any]) -> dict[str, list[str]]:
    """Every flag that sets an option, by the option's name with dashes; `--no-x` of a switch is one of them."""
    hints, found = _hints(config_type), {}
    for name in _names(config_type):
        dashed = name.replace("_", "-")
        parameter = next((m for m in getattr(hints[name], "__metadata__", ()) if isinstance(m, Parameter)), None)
        given = (parameter.name if parameter else None) or (f"--{dashed}",)
        found[dashed] = [*given, *([f"--no-{dashed}"] if bool in (get_args(hints[name]) or (hints[name],)) else [])]
    return found


def table(config_type: type[Any], prefix: str = "SAMESTEP_") -> list[tuple[str, str, str, str]]:
    """Rows (flag, environment name, default, help with unit) of every option, in the order of definition."""
    hints = _hints(config_type)
    rows = []
    for field in dataclasses.fields(config_type):
        if not field.init:
            continue
        parameter = next((m for m in getattr(hints[field.name], "__metadata__", ()) if isinstance(m, Parameter)), None)
        flags = parameter.name if parameter and parameter.name else (f"--{field.name.replace('_', '-')}",)
        default = field.default if field.default is not dataclasses.MISSING else ""
        shown = "" if default is None or default == () else str(default)
        rows.append(
            (next(iter(flags)), f"{prefix}{field.name.upper()}", shown, (parameter.help or "") if parameter else "")
        )
    return rows


def command(config_type: type[Any], *operands: inspect.Parameter) -> Callable[..., Any]:
    """A function with one keyword a field, after `operands`, which is what cyclopts reads."""
    hints, own = _hints(config_type), _own_names(config_type)
    parameters = list(operands)
    for field in dataclasses.fields(config_type):
        if not field.init:
            continue
        default: Any = inspect.Parameter.empty
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        kind = inspect.Parameter.KEYWORD_ONLY
        hint = Annotated[(hints[field.name], Parameter(group=_OWN))] if field.name in own else hints[field.name]
        parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=hint))

    def call(**values: Any) -> Any:
        return config_type(**values)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__doc__ = None
    return call


def _own_names(config_type: type[Any]) -> set[str]:
    """Options that a subclass added to those of the class that it is derived from."""
    names = [
        set(inspect.get_annotations(cls)) for cls in reversed(config_type.__mro__) if dataclasses.is_dataclass(cls)
    ]
    return set().union(*names) - names[0]


def _hints(config_type: type[Any]) -> dict[str, Any]:
    """Resolved types; an option whose default a subclass changes (`epochs: int = 3`) keeps its description."""
    hints: dict[str, Any] = {}
    for cls in reversed(config_type.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        own = get_type_hints(cls, include_extras=True)
        for name in inspect.get_annotations(cls):
            described = getattr(hints.get(name), "__metadata__", ())
            plain = described and not hasattr(own[name], "__metadata__")
            hints[name] = Annotated[(own[name], *described)] if plain else own[name]
    return hints


def _refuse_misread(config_type: type[Any], tokens: Sequence[str], chain: Sequence[Any]) -> None:
    """What cyclopts reads as something else without a word: 1.5 as 2, and an empty path as the working directory."""
    for name, hint in get_type_hints(config_type).items():  # without what Annotated adds
        kinds, flag = get_args(hint) or (hint,), name.replace("_", "-")
        sources = [("the command line", peek(tokens, flag)), *((part.source, part.config.get(flag)) for part in chain)]
        source, value = next(((source, value) for source, value in sources if value is not None), ("", None))
        whole = int in kinds and float not in kinds
        if whole and re.fullmatch(r"[+-]?\d*\.\d*[1-9]\d*", str(value)):
            raise UsageError(
                f"--{flag} is expected to be a whole number, but is {value} in {source}", "leave the fraction out"
            )
        if Path in kinds and source and not (isinstance(value, str) and value):
            raise UsageError(
                f"--{flag} is expected to be a path, but is {value!r} in {source}", "name one, or leave it out"
            )


def _names(config_type: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(config_type) if field.init]


def _dashed(argv: Sequence[str]) -> list[str]:
    """Accept `--global_batch_size` for `--global-batch-size`; values keep their underscores."""
    result: list[str] = []
    for position, token in enumerate(argv):
        if token == "--":
            return result + list(argv[position:])
        result.append(_dash(token))
    return result


def _dash(token: str) -> str:
    flag, equals, value = token.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else token


def _from_environ(config_type: type[Any], environ: Mapping[str, str], prefixes: Sequence[str]) -> dict[str, Any]:
    values = {}
    for name in _names(config_type):
        for prefix in prefixes:
            variable = f"{prefix}{name.upper()}"
            text = environ.get(variable)
            if text and variable not in NOT_OPTIONS:
                values[name.replace("_", "-")] = text
                break
    return values


def misspelt(config_type: type[Any], environ: Mapping[str, str], prefix: str = "SAMESTEP_") -> list[str]:
    """A sentence for each variable that sets nothing, but is nearly called like one that sets an option."""
    known = {prefix + name.upper() for name in _names(config_type)}
    strange = (name for name in environ.keys() - NOT_OPTIONS - known if name.startswith(prefix))
    hints = {name: nearest_hint(name, known, 0.9) for name in sorted(strange)}
    return [f"{name} in the environment sets nothing: {hint}" for name, hint in hints.items() if hint]


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
    known = {name.replace("_", "-") for name in _names(config_type)}
    values = toml_file.read(path)
    for key in values:
        if key not in known:
            raise UsageError(f"{path} has no known option {key!r}", nearest_hint(key, known))
    return values


def nearest_hint(word: str, known: set[str], alike: float = 0.6) -> str:
    """`did you mean …` for the known word nearest to `word`, or an empty string; `alike` is at most 1."""
    import difflib

    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=alike)
    return f"did you mean {close[0]}?" if close else ""


def _as_usage_error(error: cyclopts.CycloptsError, program: str, prefix: str) -> UsageError:
    text = " ".join(str(error).split())
    if isinstance(error, cyclopts.UnusedCliTokensError):
        text = f"unexpected argument {(error.unused_tokens or [''])[0]!r}"
    text = re.sub(r"\[([a-z0-9-]+)\] from environment", lambda m: prefix + m[1].upper().replace("-", "_"), text)
    message, separator, guess = text.partition(" Did you mean ")
    hint = f"did you mean {guess}" if separator else f"{program} --help lists the options"
    flag = re.search(r"--[a-z0-9-]+", message)
    if flag and isinstance(error, cyclopts.UnknownOptionError) and not program.startswith("samestep "):
        from samestep.launcher.command_line import wrong_side

        hint = wrong_side.before(flag[0]) or hint
    message = message.rstrip(".")
    return UsageError(message[:1].lower() + message[1:], hint)
