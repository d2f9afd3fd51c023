"""Hand manifests to a cluster through `kubectl`, which knows addresses and credentials; its words hold no secret."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from samestep.launcher.cluster import pod
from samestep.launcher.cluster.kubernetes_config import KubernetesConfig
from samestep.launcher.cluster.pod import Manifest
from samestep.launcher.contract import UsageError

_SECONDS = 60.0


class KubectlError(Exception):
    """The cluster, or the way to it, refused; the text is kubectl's."""


def find(environ: Mapping[str, str]) -> str:
    """Path of kubectl.

    Raises:
        UsageError: there is none.
    """
    found = shutil.which("kubectl", path=environ.get("PATH"))
    if found is None:
        raise UsageError(
            "kubectl is expected to be on the PATH, but is not found",
            "--dry-run prints the manifests; where kubectl is: … --dry-run | kubectl apply -f -",
        )
    return found


def submit(
    kubectl: str, config: KubernetesConfig, name: str, manifests: Sequence[Manifest], environ: Mapping[str, str]
) -> str:
    """Make what is missing of the run's objects, and return what kubectl says of each.

    Raises:
        KubectlError: the cluster can't be reached, or refuses.
    """
    words = [kubectl, *(["--context", config.context] if config.context else [])]
    words += ["--namespace", config.namespace] if config.namespace else []
    wanted = list(manifests)
    if config.nodes > 1 and not config.token_secret:
        secret = pod.token_secret(config, name)
        # never replaced: the pods that run already know each other by the one that is there
        if not _ask([*words, "get", "secret", secret, "--ignore-not-found", "--output", "name"], environ).strip():
            wanted.insert(0, token_manifest(config, name, secrets.token_hex(32)))
    together = {"apiVersion": "v1", "kind": "List", "items": wanted}
    return _ask([*words, "apply", "--filename", "-"], environ, json.dumps(together))


def token_manifest(config: KubernetesConfig, name: str, token: str) -> Manifest:
    """The Secret of a run; it goes to kubectl's standard input and nowhere else."""
    metadata = {"name": pod.token_secret(config, name), "labels": pod.labels(name)}
    if config.namespace:
        metadata["namespace"] = config.namespace
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata,
        "type": "Opaque",
        "immutable": True,
        "stringData": {pod.TOKEN_KEY: token},
    }


def _ask(words: Sequence[str], environ: Mapping[str, str], stdin: str = "") -> str:
    try:
        done = subprocess.run(
            words, input=stdin, env=dict(environ), capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        hint = "kubectl cluster-info tells whether the cluster can be reached"
        raise KubectlError(f"kubectl did not answer within {_SECONDS:g} s\nhint: {hint}") from None
    if done.returncode:
        raise KubectlError((done.stderr.strip() or f"kubectl ended with {done.returncode}")[-2000:])
    return done.stdout
