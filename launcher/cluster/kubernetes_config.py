"""KubernetesConfig: what the person at the keyboard asked of `samestep submit kubernetes`. It judges itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from samestep.launcher.cluster import kubernetes_names as names
from samestep.launcher.command_line.options import Option
from samestep.launcher.config import refused
from samestep.launcher.contract import UsageError

Kind = Literal["indexed-job", "jobset", "trainjob"]
_AT_LEAST_ONE = {
    "nodes": "leave it out for one pod",
    "nproc_per_node": "leave it out for one a GPU, and one without GPUs",
    "user": "leave it out for 1000; root is refused",
}


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig:
    """Options of `samestep submit kubernetes`; before the recipe, or right after it."""

    image: Annotated[
        str, Option("container image that holds samestep and the recipe, with a tag or a digest", "image")
    ] = ""
    kind: Annotated[
        Kind, Option("who starts the pods: Kubernetes' own Indexed Job, a JobSet, or a Kubeflow TrainJob")
    ] = "indexed-job"
    name: Annotated[str, Option("name of the run in the cluster; default: the recipe's", "name")] = ""
    namespace: Annotated[str, Option("namespace; default: the one that kubectl is set to", "name")] = ""
    nodes: Annotated[int, Option("pods of the run", "pods", name=("--nodes", "--nnodes"))] = 1
    nproc_per_node: Annotated[
        int | None, Option("ranks of a pod; default: one a GPU, and one without GPUs", "ranks")
    ] = None
    gpus: Annotated[int, Option("NVIDIA GPUs of a pod", "GPUs")] = 0
    cpus: Annotated[str, Option("CPUs of a pod, such as 8 or 500m", "CPUs")] = ""
    memory: Annotated[str, Option("memory of a pod, such as 32Gi", "bytes")] = ""
    shared_memory: Annotated[
        str, Option("shared memory of a pod, which data loading workers and NCCL use; counts as memory", "bytes")
    ] = "2Gi"
    claim: Annotated[
        str, Option("PersistentVolumeClaim that is there already, for the run directory; default: a new one", "name")
    ] = ""
    storage: Annotated[str, Option("size of the new claim", "bytes")] = "20Gi"
    storage_class: Annotated[str, Option("storage class of the new claim; several pods need ReadWriteMany")] = ""
    max_restarts: Annotated[int, Option("times that a run which failed is started again by the cluster", "times")] = 3
    grace_seconds: Annotated[
        int, Option("time to save between the cluster's SIGTERM and the end of a pod", "seconds")
    ] = 60
    user: Annotated[int, Option("user and group of the processes, never root")] = 1000
    env: Annotated[str, Option("variables of the ranks: NAME=VALUE,NAME=VALUE; no secrets")] = ""
    secret_env: Annotated[str, Option("variables that come from Secrets: NAME=SECRET:KEY,NAME=SECRET:KEY")] = ""
    token_secret: Annotated[
        str, Option("Secret with the key `token` by which the pods know each other; default: made at submission")
    ] = ""
    master_port: Annotated[int, Option("port of the first pod on which the ranks meet")] = 29500
    module: Annotated[bool, Option("the recipe is a module, as in python -m", name=("--module", "-m"), negative="")] = (
        False
    )
    no_python: Annotated[bool, Option("the recipe is a program of its own, not a Python file", negative="")] = False
    context: Annotated[str, Option("kubectl's context; default: the current one", "name")] = ""
    dry_run: Annotated[bool, Option("print the manifests, change nothing", negative="")] = False
    json: Annotated[bool, Option("print manifests as JSON instead of YAML", negative="")] = False

    def __post_init__(self) -> None:
        """Refuse what the cluster would refuse, or take in another sense.

        Raises:
            UsageError: with setting, expectation, value and a hint.
        """
        if not self.image:
            raise UsageError(
                "--image is expected to name a container image, but is missing",
                "samestep submit kubernetes --image registry.example/samestep:0.1.0 recipe.py",
            )
        names.check_image("--image", self.image)
        for field, hint in _AT_LEAST_ONE.items():
            value = getattr(self, field)
            if value is not None and value < 1:
                raise refused(f"--{field.replace('_', '-')}", "at least 1", value, hint)
        if self.gpus < 0:
            raise refused("--gpus", "at least 0", self.gpus, "leave it out for pods without GPUs")
        if self.max_restarts < 0:
            raise refused("--max-restarts", "at least 0", self.max_restarts, "0 means that the first failure is final")
        if self.module and self.no_python:
            raise UsageError(
                "--module and --no-python are expected one at a time, but both are set", "drop one of them"
            )
        if self.context.startswith("-"):
            raise refused("--context", "a name", repr(self.context), "kubectl config get-contexts lists them")
        if self.grace_seconds < 1:
            raise refused("--grace-seconds", "at least 1 second", self.grace_seconds, "leave it out for 60 seconds")
        if not 1024 <= self.master_port <= 65535:
            raise refused("--master-port", "between 1024 and 65535", self.master_port, "leave it out for 29500")
        self._check_words()

    def _check_words(self) -> None:
        for setting, text in (("--namespace", self.namespace), ("--name", self.name)):
            if text:
                names.check_label(setting, text)
        for setting, text in (
            ("--claim", self.claim),
            ("--storage-class", self.storage_class),
            ("--token-secret", self.token_secret),
        ):
            if text:
                names.check_object(setting, text)
        for setting, text in (("--cpus", self.cpus), ("--memory", self.memory)):
            if text:
                names.check_quantity(setting, text)
        names.check_quantity("--storage", self.storage)
        names.check_quantity("--shared-memory", self.shared_memory)
        twice = names.variables("--env", self.env).keys() & names.secret_references("--secret-env", self.secret_env)
        if twice:
            raise UsageError(
                f"--env and --secret-env are expected to be about different variables, but both set {sorted(twice)[0]}",
                "leave it out of one of them",
            )

    @property
    def ranks(self) -> int:
        """Ranks of a pod."""
        return self.nproc_per_node or max(1, self.gpus)
