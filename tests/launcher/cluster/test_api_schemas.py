"""Manifests, judged by the schemas of those who receive them: the API of Kubernetes, and Kubeflow's own models.

`kubernetes-validate` holds the API's schemas and is strict: an unknown field is an error. Kubeflow's models (which
include JobSet's) drop unknown fields, so a manifest has to come back from them as it went in.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from samestep.launcher.cluster.kubectl import token_manifest
from samestep.launcher.cluster.kubernetes import manifests
from samestep.launcher.cluster.kubernetes_config import KubernetesConfig
from samestep.launcher.command_line.argv import Recipe

pytestmark = pytest.mark.slow  # for the packages that it needs: ./scripts/test --slow installs them

WHOLE = KubernetesConfig(
    image="registry.example/samestep:0.1.0",
    nodes=2,
    gpus=4,
    cpus="500m",
    memory="32Gi",
    storage_class="nfs",
    namespace="team",
    env="A=1",
    secret_env="WANDB_API_KEY=wandb:key",
)
CONFIGS = {
    f"{size} {kind}": replace(config, kind=kind)
    for size, config in {"whole": WHOLE, "least": KubernetesConfig(image=WHOLE.image)}.items()
    for kind in ("indexed-job", "jobset", "trainjob")
}
RECIPE = Recipe("recipe.py", ("--epochs", "3"))
OWN_API = {"batch/v1", "v1", "networking.k8s.io/v1"}


def of(case, *kinds):
    return [m for m in manifests(CONFIGS[case], RECIPE) if not kinds or m["kind"] in kinds]


def complain(manifest):
    """What the API's schema says against a manifest, in the oldest and the newest version that is known."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="scripts/install recipes,dev,cluster")
    found = []
    for version in ("1.31", kubernetes_validate.latest_version()):
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version}: {error.message}")
    return found


@pytest.mark.parametrize("case", CONFIGS)
def test_objects_of_kubernetes_itself_fit_its_schemas(case):
    own = [manifest for manifest in of(case) if manifest["apiVersion"] in OWN_API]
    own += [token_manifest(CONFIGS[case], "recipe", "0" * 64)] if CONFIGS[case].nodes > 1 else []
    assert [complain(manifest) for manifest in own] == [[]] * len(own)


@pytest.mark.parametrize("case", [case for case in CONFIGS if "indexed" not in case])
def test_jobs_inside_of_other_objects_fit_the_schema_of_a_job(case):
    (holder,) = of(case, "JobSet", "TrainingRuntime")
    spec = holder["spec"]["template"]["spec"] if holder["kind"] == "TrainingRuntime" else holder["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "node"},
        "spec": replicated["template"]["spec"],
    }
    assert complain(job) == []


@pytest.mark.parametrize("case", [case for case in CONFIGS if "indexed" not in case])
def test_objects_of_jobset_and_kubeflow_fit_their_models(case):
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="scripts/install recipes,dev,cluster")
    classes = {
        "JobSet": models.JobsetV1alpha2JobSet,
        "TrainJob": models.TrainerV1alpha1TrainJob,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    }
    for manifest in of(case, *classes):
        read = classes[manifest["kind"]].from_dict(copy.deepcopy(manifest))
        assert read.to_dict() == manifest


def test_a_judge_that_takes_anything_would_be_noticed():
    (job,) = of("whole indexed-job", "Job")
    misspelt = copy.deepcopy(job)
    misspelt["spec"]["podFailurePolicies"] = misspelt["spec"].pop("podFailurePolicy")
    assert complain(misspelt) != []
    wrong = copy.deepcopy(job)
    wrong["spec"]["completions"] = "two"
    assert complain(wrong) != []
