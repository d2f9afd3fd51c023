"""Words that end up in a manifest, judged before the cluster sees them: names, sizes, images, variables.

The rules are Kubernetes' own: object names and labels are DNS labels (RFC 1123, and RFC 1035 where the object is also a
Service or a JobSet: those begin with a letter), sizes are its `resource.Quantity`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from samestep.launcher.contract import UsageError
from samestep.launcher.secret_names import is_secret

MAX_LABEL = 63  # RFC 1035, section 2.3.4
_POD_SUFFIX = "-abcde"  # the five random characters that a pod's name ends with
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_ONCE = "leave one of them out"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
_IMAGE = re.compile(
    r"(?:[\w.-]+(?::\d+)?/)*[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?::(?P<tag>\w[\w.-]{0,127}))?(?P<digest>@sha256:[0-9a-f]{64})?",
    re.ASCII,
)


def label_of(text: str) -> str:
    """The DNS label nearest to a recipe's name: `digits_cnn` -> `digits-cnn`; empty if nothing is left of it."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-").lstrip("0123456789-")


def check_label(setting: str, text: str, longest: str = "") -> str:
    """`text` if it is a DNS label that begins with a letter, and `longest`, made of it by the cluster, is short enough.

    Raises:
        UsageError: it is not.
    """
    if not _LABEL.fullmatch(text):
        raise UsageError(
            f"{setting} is expected to be lower case letters, digits and dashes, from a letter on, but is {text!r}",
            f"{setting} {label_of(text) or 'my-run'}",
        )
    name = (longest or text) + (_POD_SUFFIX if longest else "")
    if len(name) > MAX_LABEL:
        raise UsageError(
            f"{setting} is expected to leave pod names at most {MAX_LABEL} characters, but {name} has {len(name)}",
            f"{setting} {text[: len(text) - (len(name) - MAX_LABEL)].rstrip('-') or 'run'}",
        )
    return text


def check_object(setting: str, text: str) -> str:
    """`text` if it can name an object that is there already: a DNS subdomain.

    Raises:
        UsageError: it can't.
    """
    if len(text) <= 253 and _SUBDOMAIN.fullmatch(text):
        return text
    raise UsageError(
        f"{setting} is expected to name an object of the cluster (lower case letters, digits, dashes, dots), "
        f"but is {text!r}",
        "kubectl get pvc,storageclass,secret lists those that are there",
    )


def check_quantity(setting: str, text: str) -> str:
    """`text` if it is an amount such as 500m, 4, 16Gi.

    Raises:
        UsageError: it is not, or it is nothing.
    """
    found = _QUANTITY.fullmatch(text)
    if found and float(re.match(r"[\d.]+", text)[0]) > 0:  # type: ignore[index]  # a quantity begins with its number
        return text
    raise UsageError(
        f"{setting} is expected to be an amount such as 4, 500m or 16Gi, but is {text!r}",
        f"{setting} {'4' if setting == '--cpus' else '16Gi'}",
    )


def check_image(setting: str, text: str) -> str:
    """`text` if it names one image and will name the same one at the next start.

    Raises:
        UsageError: it is no image reference, or a tag that moves.
    """
    found = _IMAGE.fullmatch(text)
    if found is None:
        raise UsageError(
            f"{setting} is expected to be an image such as registry.example/samestep:0.1.0, but is {text!r}",
            "the name by which docker pull finds it, with its tag or digest",
        )
    if not found["digest"] and found["tag"] in (None, "latest"):
        raise UsageError(
            f"{setting} is expected to name a tag other than latest, or a digest, but is {text!r}: "
            "a replaced pod could get another image, and with it other bits",
            f"{setting} {text.removesuffix(':latest')}:0.1.0",
        )
    return text


def variables(setting: str, text: str) -> dict[str, str]:
    """`NAME=VALUE,NAME=VALUE` as a mapping; a comma in a value is written twice.

    Raises:
        UsageError: a part has another form, a name comes twice, or a value looks like a secret.
    """
    found: dict[str, str] = {}
    for part in re.split(r"(?<!,),(?!,)", text) if text else ():
        name, equals, value = part.replace(",,", ",").partition("=")
        if not equals or not _VARIABLE.fullmatch(name):
            raise UsageError(
                f"{setting} is expected to be NAME=VALUE,NAME=VALUE, but has {part!r}",
                "a comma that belongs to a value is written twice",
            )
        if name in found:
            raise UsageError(f"{setting} is expected to name each variable once, but has {name} twice", _ONCE)
        if is_secret(name):
            raise UsageError(
                f"{setting} is expected to hold no secret, but has {name}: manifests are stored and shown",
                f"put it into a Secret and name that: --secret-env {name}=SECRET:KEY",
            )
        found[name] = value
    return found


def secret_references(setting: str, text: str) -> Mapping[str, tuple[str, str]]:
    """`NAME=SECRET:KEY,…` as a mapping from variable to (Secret, key in it).

    Raises:
        UsageError: a part has another form, or a name comes twice.
    """
    found: dict[str, tuple[str, str]] = {}
    for part in text.split(",") if text else ():
        name, _, reference = part.partition("=")
        secret, _, key = reference.partition(":")
        if not (_VARIABLE.fullmatch(name) and _SUBDOMAIN.fullmatch(secret) and _KEY.fullmatch(key)):
            raise UsageError(
                f"{setting} is expected to be NAME=SECRET:KEY,NAME=SECRET:KEY, but has {part!r}",
                "kubectl describe secret SECRET shows its keys",
            )
        if name in found:
            raise UsageError(f"{setting} is expected to name each variable once, but has {name} twice", _ONCE)
        found[name] = (secret, key)
    return found
