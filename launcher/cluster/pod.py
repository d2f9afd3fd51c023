"""Pure: what one pod of a run is, whichever Kubernetes object starts it.

The pod fits the "restricted" Pod Security Standard (kubernetes.io/docs/concepts/security/pod-security-standards). How
several pods find each other is told in torchrun's own variables, `PET_*`, so `samestep run` needs no other options in a
pod than on a machine; Kubeflow's Trainer sets the same ones by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from samestep.launcher.cluster import kubernetes_names as names
from samestep.launcher.cluster.kubernetes_config import KubernetesConfig
from samestep.launcher.command_line.argv import Kind, Recipe
from samestep.launcher.contract import ENV_RUN_DIR, ExitCode

Manifest = dict[str, Any]

RUNS = "/runs"  # where the volume with the run directory is mounted
ENV_TOKEN = "SAMESTEP_TOKEN"
TOKEN_KEY = "token"
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_END_SECONDS = 15  # after the ranks have saved: last events, logs, and the launcher's own end

FATAL = (ExitCode.USAGE, ExitCode.NO_PROGRESS, ExitCode.NO_CHECKPOINT)  # run again, they end the same way
RETRIED = (ExitCode.PREEMPTED_SAVED, ExitCode.PREEMPTED_KEPT)  # nobody's fault: run again, and count nothing


@dataclass(frozen=True, slots=True)
class Place:
    """Names that follow from which object starts the pods."""

    name: str  # of the run
    container: str
    address: str  # of the first pod, "" where there is one pod or somebody else tells
    sets_ranks: bool = True  # False: the controller sets PET_* itself and refuses others who do


def failure_policy(container: str) -> Manifest:
    """What the exit codes of `samestep run` mean to a Job: fatal ones end it, preemption counts for nothing.

    Any other code counts towards backoffLimit, as does 70, a bug of ours. Rules are tried in order; a pod that the
    cluster took away (drained, preempted, lost with its node) has the condition DisruptionTarget, whatever its code.
    """
    return {
        "rules": [
            {"action": "FailJob", "onExitCodes": _codes(container, FATAL)},
            {"action": "Ignore", "onExitCodes": _codes(container, RETRIED)},
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        ]
    }


def _codes(container: str, codes: tuple[ExitCode, ...]) -> Manifest:
    return {"containerName": container, "operator": "In", "values": sorted(map(int, codes))}


def template(config: KubernetesConfig, recipe: Recipe, place: Place) -> Manifest:
    """The pod template of a Job."""
    return {
        "metadata": {"labels": labels(place.name)},
        "spec": {
            "restartPolicy": "Never",  # what pod failure policies ask for: a new pod, not the same one again
            "terminationGracePeriodSeconds": config.grace_seconds + _END_SECONDS,
            "automountServiceAccountToken": False,  # a rank has no business with the cluster
            "enableServiceLinks": False,  # nor with variables that services of the namespace would add
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": config.user,
                "runAsGroup": config.user,
                "fsGroup": config.user,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(config, recipe, place)],
            "volumes": [
                {"name": "runs", "persistentVolumeClaim": {"claimName": claim_name(config, place.name)}},
                {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": config.shared_memory}},
            ],
        },
    }


def labels(name: str) -> dict[str, str]:
    """Labels of everything that belongs to one run."""
    return {
        "app.kubernetes.io/name": "samestep",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/managed-by": "samestep",
    }


def claim_name(config: KubernetesConfig, name: str) -> str:
    """The claim that holds the run directory."""
    return config.claim or f"{name}-runs"


def token_secret(config: KubernetesConfig, name: str) -> str:
    """The Secret that holds the token of the run."""
    return config.token_secret or f"{name}-token"


def command(config: KubernetesConfig, recipe: Recipe) -> list[str]:
    """What runs in the container; how many ranks and pods there are comes from the environment."""
    form = {Kind.SCRIPT: [], Kind.MODULE: ["--module"], Kind.COMMAND: ["--no-python"]}[recipe.kind]
    options = ["--grace-seconds", str(config.grace_seconds), *form]
    words = ["samestep", "run", *options, recipe.target, *recipe.arguments]
    return [_literal(word) for word in words]


def _literal(text: str) -> str:
    """Kubernetes replaces $(NAME) in commands and values; a doubled $ keeps it from doing so."""
    return text.replace("$(", "$$(")


def _container(config: KubernetesConfig, recipe: Recipe, place: Place) -> Manifest:
    container: Manifest = {
        "name": place.container,
        "image": config.image,
        "imagePullPolicy": "IfNotPresent",
        "command": command(config, recipe),
        "env": environment(config, place),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "terminationMessagePolicy": "FallbackToLogsOnError",  # `kubectl describe pod` ends with our last lines
        "volumeMounts": [
            {"name": "runs", "mountPath": RUNS},
            {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108 (where POSIX shared memory lives)
        ],
    }
    if config.nodes > 1:
        container["ports"] = [{"name": "meeting", "containerPort": config.master_port, "protocol": "TCP"}]
    if amounts := resources(config):
        container["resources"] = amounts
    return container


def resources(config: KubernetesConfig) -> Manifest:
    """Requests and limits; equal ones for GPUs, which can't be shared, and memory, so that no neighbour evicts us."""
    asked = {"cpu": config.cpus, "memory": config.memory, "nvidia.com/gpu": str(config.gpus or "")}
    requests = {name: amount for name, amount in asked.items() if amount}
    limits = {name: amount for name, amount in requests.items() if name != "cpu"}  # a CPU limit only slows down
    return {"requests": requests, **({"limits": limits} if limits else {})} if requests else {}


def environment(config: KubernetesConfig, place: Place) -> list[Manifest]:
    """Variables of the container, in a fixed order; the token is named, never written."""
    plain: dict[str, str] = {ENV_RUN_DIR: f"{RUNS}/{place.name}"}
    found: list[Manifest] = []
    if place.sets_ranks:
        plain["PET_NPROC_PER_NODE"] = str(config.ranks)
    if config.nodes > 1:
        plain["GLOO_SOCKET_IFNAME"] = "eth0"  # a pod's one interface
    if place.sets_ranks and config.nodes > 1:
        plain |= {
            "PET_NNODES": str(config.nodes),
            "PET_MASTER_ADDR": place.address,
            "PET_MASTER_PORT": str(config.master_port),
        }
        found.append({"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}})
    plain |= names.variables("--env", config.env)
    secrets: dict[str, tuple[str, str]] = dict(names.secret_references("--secret-env", config.secret_env))
    if config.nodes > 1:
        secrets.setdefault(ENV_TOKEN, (token_secret(config, place.name), TOKEN_KEY))
    return [
        *({"name": name, "value": _literal(value)} for name, value in plain.items()),
        *found,
        *_from_secrets(secrets),
    ]


def _from_secrets(secrets: Mapping[str, tuple[str, str]]) -> list[Manifest]:
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
        for name, (secret, key) in secrets.items()
    ]
