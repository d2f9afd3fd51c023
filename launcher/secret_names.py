"""Which options and variables hold a secret, judged by their names: whole words, so that a tokenizer is none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from samestep.launcher.contract import UsageError

HIDDEN = "(hidden)"
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")  # of snake_case, kebab-case, CONSTANTS and camelCase
_ANYWHERE = re.compile(r".*(password|passwd|passphrase|secrets?|credentials?)|(api|access|private)key")
_KEYS = frozenset({"api", "access", "private", "account", "encryption", "signing", "ssh"})
_LAST = re.compile(r"(hf|gh|api|auth|access|bearer|session)?token")
_LAST_OF_SEVERAL = frozenset({"pat", "pwd"})  # a personal access token; PWD alone is the working directory
_OF_TEXT = frozenset(
    "pad padding bos eos eot eod unk unknown mask sep cls class classification special blank image audio video "
    "start begin end stop first last next new extra per max min num".split()
)  # tokens of a text
_PLACES = frozenset({"file", "path", "dir"})  # where a secret lies is none


def is_secret(name: str) -> bool:
    """Whether an option (`--hf-token`) or a variable (`HF_TOKEN`, `hfToken`) holds a secret, as its name tells."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in _PLACES:
        return False
    before, last = words[-2] if len(words) > 1 else "", words[-1]
    keys = any(kind in _KEYS and key == "key" for kind, key in pairwise(words))
    token = bool(_LAST.fullmatch(last)) and before not in _OF_TEXT
    return keys or token or any(map(_ANYWHERE.fullmatch, words)) or bool(before and last in _LAST_OF_SEVERAL)


def refuse_secrets(arguments: Sequence[str], readers: str, hint: str) -> None:
    """See that no option of a recipe is given a secret.

    Raises:
        UsageError: one is; `readers` says who could read it.
    """
    for word in arguments:
        option = word.partition("=")[0]
        if option.startswith("-") and is_secret(option):
            raise UsageError(
                f"secrets are expected in the environment, where nobody else sees them, but {option} is an argument: "
                f"{readers}",
                hint,
            )


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same options, with what a secret one is set to replaced: for files and pages that are passed on."""
    return {name: _shown(name, value) for name, value in values.items()}


def _shown(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return without_secrets(value)
    return HIDDEN if isinstance(value, str) and value and is_secret(name) else value
