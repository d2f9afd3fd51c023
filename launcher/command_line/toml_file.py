"""What a TOML file of options says, by option: the launcher looks for the run directory there, a worker for all."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from samestep.launcher.contract import UsageError

_MAKE = "--print-config prints such a file, of all options"


def read(path: Path) -> dict[str, Any]:
    """Values by name with dashes; the file may begin with a byte order mark, as some editors write it.

    Raises:
        UsageError: it can't be read, is no TOML, sets an option twice, or names another file of options.
    """
    try:
        data = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(
            f"--config is expected to be a readable TOML file, but {path}: {error.strerror}", _MAKE
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config is expected to be valid TOML, but {path}: {error}", _MAKE) from None
    spelt: dict[str, str] = {}
    for key in data:
        name = key.replace("_", "-")
        if name in spelt:
            raise UsageError(
                f"{path} is expected to set each option once, but has {spelt[name]} and {key}",
                "they are two spellings of one option: drop one of them",
            )
        spelt[name] = key
    if "config" in spelt:
        raise UsageError(
            f"{path} is expected to hold options only, but has config, which names another file: that is not read",
            "copy the options of that file into this one",
        )
    return {name: data[key] for name, key in spelt.items()}
