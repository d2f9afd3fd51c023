"""`samestep submit kubernetes`: print the manifests, or hand them to kubectl."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from samestep.launcher.cluster import kubectl, pod
from samestep.launcher.cluster.kubernetes import manifests, run_name
from samestep.launcher.cluster.kubernetes_config import KubernetesConfig
from samestep.launcher.command_line.argv import Kind, Recipe, split_around
from samestep.launcher.command_line.options import load
from samestep.launcher.contract import ExitCode, UsageError


def submit_kubernetes(argv: Sequence[str], environ: Mapping[str, str], say: Callable[[str], None]) -> int:
    """Make the run's objects, or with `--dry-run` show them.

    Raises:
        UsageError: no recipe, or what the cluster would refuse.
    """
    own, words = split_around(argv, KubernetesConfig, "samestep submit kubernetes")
    config = load(
        KubernetesConfig, own, {}, program="samestep submit kubernetes", operands="recipe.py [RECIPE OPTIONS]"
    )
    if not words:
        raise UsageError(
            "a recipe is expected, by its path in the image, but there is none",
            "samestep submit kubernetes --image registry.example/samestep:0.1.0 recipe.py",
        )
    kind = Kind.MODULE if config.module else Kind.COMMAND if config.no_python else Kind.SCRIPT
    recipe = Recipe(words[0], tuple(words[1:]), kind)
    name, objects = run_name(config, recipe), manifests(config, recipe)
    if config.dry_run:
        _tell_token(config, name)
        say(_shown(config, objects))
        return ExitCode.DONE
    try:
        say(kubectl.submit(kubectl.find(environ), config, name, objects, environ).rstrip())
    except kubectl.KubectlError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.FAILED
    where = f" --namespace {config.namespace}" if config.namespace else ""
    chosen = f"app.kubernetes.io/instance={name}"
    print(f"samestep: kubectl logs{where} --follow --prefix --selector {chosen}", file=sys.stderr)
    return ExitCode.DONE


def _shown(config: KubernetesConfig, objects: Sequence[Mapping[str, Any]]) -> str:
    if config.json:
        return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2)
    import yaml

    return str(yaml.safe_dump_all(objects, sort_keys=False, width=120)).rstrip()


def _tell_token(config: KubernetesConfig, name: str) -> None:
    """A token in a dry run would end up in a file: it says how to make one instead."""
    if config.nodes > 1 and not config.token_secret:
        secret, where = pod.token_secret(config, name), f" --namespace {config.namespace}" if config.namespace else ""
        print(
            f"samestep: submitting makes the Secret {secret} too; by hand: openssl rand -hex 32 | kubectl create "
            f"secret generic{where} {secret} --from-file={pod.TOKEN_KEY}=/dev/stdin",
            file=sys.stderr,
        )
