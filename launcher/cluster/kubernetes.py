"""Pure: a recipe and what was asked -> Kubernetes objects, as data.

Three ways to start the same pods:

* Indexed Job (batch/v1): Kubernetes' own. A pod that fails is replaced alone.
* JobSet (jobset.x-k8s.io/v1alpha2, github.com/kubernetes-sigs/jobset): a failure that counts starts all pods anew.
* TrainJob (trainer.kubeflow.org/v1alpha1, github.com/kubeflow/trainer): makes a JobSet of a TrainingRuntime, which we
  write too, since a TrainJob alone can neither hold a pod failure policy nor a volume.

In all three the exit codes mean the same: 2, 77 and 78 end the run, 75 and 76 start a pod again and count nothing, all
others count.
"""

from __future__ import annotations

import posixpath

from samestep.launcher.cluster import pod
from samestep.launcher.cluster.kubernetes_config import KubernetesConfig
from samestep.launcher.cluster.kubernetes_names import check_label, label_of
from samestep.launcher.cluster.pod import Manifest, Place
from samestep.launcher.command_line.argv import Kind, Recipe
from samestep.launcher.command_line.options import peek
from samestep.launcher.contract import UsageError
from samestep.launcher.secret_names import refuse_secrets

_TRAINER = "trainer.kubeflow.org"
_JOB_IN_SET = "node"  # the name that Kubeflow's Trainer looks for, of the job and of its container
_READERS = "manifests are stored and shown"
_INSTEAD = "let the recipe read an environment variable: --secret-env NAME=SECRET:KEY"


def run_name(config: KubernetesConfig, recipe: Recipe) -> str:
    """Name of the run's objects: `--name`, or made of the recipe's.

    Raises:
        UsageError: no name can be made of it, or the pods' names would be too long.
    """
    dotted = recipe.target.rsplit(".", 1)[-1] if recipe.kind is Kind.MODULE else recipe.target
    name = config.name or label_of(posixpath.basename(dotted).removesuffix(".py"))
    last = f"-{config.nodes - 1}"
    return check_label("--name", name, name + (last if config.kind == "indexed-job" else f"-{_JOB_IN_SET}-0{last}"))


def manifests(config: KubernetesConfig, recipe: Recipe) -> list[Manifest]:
    """Every object of the run but the Secret, in the order in which they are to be made.

    Raises:
        UsageError: the name does not fit, the recipe keeps its run where no volume is, or an option holds a secret.
    """
    name = run_name(config, recipe)
    refuse_secrets(recipe.arguments, _READERS, _INSTEAD)
    _check_run_dir(recipe)
    found: list[Manifest] = []
    if not config.claim:
        found.append(_claim(config, name))
    if config.nodes > 1:
        found.append(_only_among_themselves(config, name))
    if config.kind == "indexed-job":
        if config.nodes > 1:
            found.append(_service(config, name))
        found.append(_indexed_job(config, recipe, name))
    elif config.kind == "jobset":
        place = Place(name, _JOB_IN_SET, f"{name}-{_JOB_IN_SET}-0-0.{name}")
        found.append(_object(config, "jobset.x-k8s.io/v1alpha2", "JobSet", name, _job_set(config, recipe, place)))
    else:
        found += _train_job(config, recipe, name)
    return found


def _check_run_dir(recipe: Recipe) -> None:
    flag = peek(recipe.arguments, "run-dir")
    if flag is not None and not posixpath.normpath(flag).startswith(f"{pod.RUNS}/"):
        raise UsageError(
            f"--run-dir is expected to be on the volume, below {pod.RUNS}, but is {flag}",
            f"leave it out for {pod.RUNS}/NAME",
        )


def _object(config: KubernetesConfig, version: str, kind: str, name: str, spec: Manifest) -> Manifest:
    metadata: Manifest = {"name": name, "labels": pod.labels(name)}
    if config.namespace:
        metadata["namespace"] = config.namespace
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}


def _named(manifest: Manifest, name: str) -> Manifest:
    return manifest | {"metadata": manifest["metadata"] | {"name": name}}


def _claim(config: KubernetesConfig, name: str) -> Manifest:
    spec: Manifest = {
        "accessModes": ["ReadWriteMany" if config.nodes > 1 else "ReadWriteOnce"],
        "resources": {"requests": {"storage": config.storage}},
    }
    if config.storage_class:
        spec["storageClassName"] = config.storage_class
    return _named(_object(config, "v1", "PersistentVolumeClaim", name, spec), pod.claim_name(config, name))


def _only_among_themselves(config: KubernetesConfig, name: str) -> Manifest:
    """Nobody but the pods of the run may reach them: torch's own store and gloo ask no one for a password."""
    spec = {
        "podSelector": {"matchLabels": pod.labels(name)},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": pod.labels(name)}}]}],
    }
    return _object(config, "networking.k8s.io/v1", "NetworkPolicy", name, spec)


def _service(config: KubernetesConfig, name: str) -> Manifest:
    """Gives each pod of an Indexed Job the host name JOB-INDEX.NAME, also before it is ready."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": pod.labels(name),
        "ports": [{"name": "meeting", "port": config.master_port}],
    }
    return _object(config, "v1", "Service", name, spec)


def _indexed_job(config: KubernetesConfig, recipe: Recipe, name: str) -> Manifest:
    template = pod.template(config, recipe, Place(name, "samestep", f"{name}-0.{name}"))
    if config.nodes > 1:
        template["spec"]["subdomain"] = name
    # when one pod fails the others end with it, and each of them counts
    spec = _job(config, "samestep", template, backoff_limit=config.max_restarts * config.nodes)
    return _object(config, "batch/v1", "Job", name, spec)


def _job(config: KubernetesConfig, container: str, template: Manifest, backoff_limit: int) -> Manifest:
    return {
        "completionMode": "Indexed",
        "completions": config.nodes,
        "parallelism": config.nodes,
        "backoffLimit": backoff_limit,
        "podFailurePolicy": pod.failure_policy(container),
        "podReplacementPolicy": "Failed",  # never two pods of one index: they would write to one run directory
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]},  # the first pod decides for all: its run is the run
        "template": template,
    }


def _job_set(config: KubernetesConfig, recipe: Recipe, place: Place) -> Manifest:
    """A fatal exit code fails the Job by its own policy, which is final for the set; any other failure restarts it."""
    template = pod.template(config, recipe, place)
    job: Manifest = {
        "name": _JOB_IN_SET,
        "replicas": 1,
        "template": {"spec": _job(config, place.container, template, backoff_limit=0)},
    }
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": config.max_restarts,
            "restartStrategy": "BlockingRecreate",  # all old pods are gone before the first new one starts
            "rules": [{"name": "fatal", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        },
        "replicatedJobs": [job],
    }


def _train_job(config: KubernetesConfig, recipe: Recipe, name: str) -> list[Manifest]:
    """The runtime says what a pod is, the TrainJob how many; the Trainer sets PET_* and replaces image and command."""
    job_set = _job_set(config, recipe, Place(name, _JOB_IN_SET, "", sets_ranks=False))
    job_set["replicatedJobs"][0]["template"]["metadata"] = {"labels": {f"{_TRAINER}/trainjob-ancestor-step": "trainer"}}
    runtime = _object(
        config,
        f"{_TRAINER}/v1alpha1",
        "TrainingRuntime",
        name,
        {"mlPolicy": {"numNodes": config.nodes, "torch": {}}, "template": {"spec": job_set}},
    )
    runtime["metadata"]["labels"][f"{_TRAINER}/framework"] = "torch"
    trainer: Manifest = {
        "image": config.image,
        "command": pod.command(config, recipe),
        "numNodes": config.nodes,
        "numProcPerNode": config.ranks,
    }
    if amounts := pod.resources(config):
        trainer["resourcesPerNode"] = amounts
    spec = {
        "runtimeRef": {"apiGroup": _TRAINER, "kind": "TrainingRuntime", "name": name},
        "trainer": trainer,
    }
    return [runtime, _object(config, f"{_TRAINER}/v1alpha1", "TrainJob", name, spec)]
