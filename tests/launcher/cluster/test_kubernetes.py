"""Manifests are data: tables of what was asked and what the cluster is told. Nothing here needs a cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from samestep.launcher.cluster import pod
from samestep.launcher.cluster.kubernetes import manifests, run_name
from samestep.launcher.cluster.kubernetes_config import KubernetesConfig
from samestep.launcher.cluster.submit import submit
from samestep.launcher.command_line.argv import Kind, Recipe, split_around
from samestep.launcher.contract import ExitCode, UsageError

IMAGE = "registry.example/samestep:0.1.0"
RECIPE = Recipe("scripts/recipes/digits_cnn.py", ("--epochs", "3"))
KINDS = ("indexed-job", "jobset", "trainjob")
TWO = KubernetesConfig(image=IMAGE, nodes=2, nproc_per_node=2)


def one(objects, kind):
    (found,) = [manifest for manifest in objects if manifest["kind"] == kind]
    return found


def job_of(objects):
    """The Job's spec, wherever it is written, and the container in it."""
    (holder,) = [m for m in objects if m["kind"] in ("Job", "JobSet", "TrainingRuntime")]
    spec = holder["spec"]
    if holder["kind"] == "TrainingRuntime":
        spec = spec["template"]["spec"]
    if holder["kind"] != "Job":
        (replicated,) = spec["replicatedJobs"]
        spec = replicated["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    return spec, container


def variables(container):
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}


def verdict(policy, code, conditions=()):
    """What the Job controller does with a pod: the first rule that fits, else it counts (batch/v1 PodFailurePolicy)."""
    for rule in policy["rules"]:
        codes, wanted = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if codes and code in codes["values"]:
            return rule["action"]
        if any(condition["type"] in conditions for condition in wanted):
            return rule["action"]
    return "Count"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("code", "conditions", "expected"),
    [
        (1, (), "Count"),
        (70, (), "Count"),
        (137, (), "Count"),
        (137, ("DisruptionTarget",), "Ignore"),
        (143, ("DisruptionTarget",), "Ignore"),
        (ExitCode.USAGE, (), "FailJob"),
        (ExitCode.USAGE, ("DisruptionTarget",), "FailJob"),
        (ExitCode.NO_PROGRESS, (), "FailJob"),
        (ExitCode.NO_CHECKPOINT, (), "FailJob"),
        (ExitCode.PREEMPTED_SAVED, (), "Ignore"),
        (ExitCode.PREEMPTED_KEPT, ("DisruptionTarget",), "Ignore"),
    ],
)
def test_exit_codes_mean_the_same_to_every_kind(kind, code, conditions, expected):
    spec, container = job_of(manifests(replace(TWO, kind=kind), RECIPE))
    policy = spec["podFailurePolicy"]
    assert verdict(policy, int(code), conditions) == expected
    assert {r["onExitCodes"]["containerName"] for r in policy["rules"] if "onExitCodes" in r} == {container["name"]}


def test_every_exit_code_of_ours_has_a_verdict_on_purpose():
    policy = pod.failure_policy("c")
    decided = {int(code): verdict(policy, int(code)) for code in ExitCode if code}
    counted = {code for code, action in decided.items() if action == "Count"}
    assert counted == {1, 70, 130, 143}  # failed, our bug, stopped by hand: tried again as often as was asked


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_rules_are_what_the_api_takes(kind):
    spec, _ = job_of(manifests(replace(TWO, kind=kind), RECIPE))
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # a pod failure policy is refused without
    for rule in spec["podFailurePolicy"]["rules"]:
        assert len({"onExitCodes", "onPodConditions"} & rule.keys()) == 1
        values = rule.get("onExitCodes", {}).get("values", [1])
        assert values == sorted(set(values))
        assert 0 not in values


def test_restarts_count_every_pod_of_a_failed_run():
    spec, _ = job_of(manifests(replace(TWO, nodes=3, max_restarts=2), RECIPE))
    assert spec["backoffLimit"] == 6
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (3, 3, "Indexed")
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}  # no pod is replaced after the run has ended
    jobset = one(manifests(replace(TWO, kind="jobset", max_restarts=2), RECIPE), "JobSet")["spec"]
    assert jobset["failurePolicy"]["maxRestarts"] == 2
    assert job_of([one(manifests(replace(TWO, kind="jobset"), RECIPE), "JobSet")])[0]["backoffLimit"] == 0


@pytest.mark.parametrize(
    ("kind", "address"),
    [("indexed-job", "digits-cnn-0.digits-cnn"), ("jobset", "digits-cnn-node-0-0.digits-cnn")],
)
def test_pods_learn_their_place_from_torchruns_variables(kind, address):
    objects = manifests(replace(TWO, kind=kind), RECIPE)
    spec, container = job_of(objects)
    seen = variables(container)
    assert (seen["PET_NNODES"], seen["PET_NPROC_PER_NODE"], seen["PET_MASTER_ADDR"]) == ("2", "2", address)
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert seen["PET_NODE_RANK"] == {"fieldRef": {"fieldPath": index}}
    assert seen["SAMESTEP_RUN_DIR"] == "/runs/digits-cnn"
    if kind == "indexed-job":
        service = one(objects, "Service")
        assert service["spec"]["clusterIP"] == "None"
        assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"] == address.partition(".")[2]
        assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()


def test_trainer_sets_the_ranks_itself_and_is_told_how_many():
    objects = manifests(replace(TWO, kind="trainjob", gpus=4, nproc_per_node=None), RECIPE)
    _, container = job_of(objects)
    reserved = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
    assert variables(container).keys() & reserved == set()  # its webhook refuses them
    job, runtime = one(objects, "TrainJob"), one(objects, "TrainingRuntime")
    assert (job["spec"]["trainer"]["numNodes"], job["spec"]["trainer"]["numProcPerNode"]) == (2, 4)
    assert job["spec"]["trainer"]["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "4"}
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert (replicated["name"], container["name"], replicated["replicas"]) == ("node", "node", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_pods_fit_the_restricted_pod_security_standard(kind):
    spec, container = job_of(manifests(replace(TWO, kind=kind), RECIPE))
    whole = spec["template"]["spec"]
    assert whole["securityContext"]["runAsNonRoot"] is True
    assert whole["securityContext"]["runAsUser"] > 0
    assert whole["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert whole["automountServiceAccountToken"] is False
    assert {"hostNetwork", "hostPID", "hostIPC"} & whole.keys() == set()


def test_volumes_are_the_run_directory_and_shared_memory():
    objects = manifests(replace(TWO, shared_memory="1Gi", storage="5Gi", storage_class="nfs"), RECIPE)
    spec, container = job_of(objects)
    claim = one(objects, "PersistentVolumeClaim")
    assert claim["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "5Gi"}},
        "storageClassName": "nfs",
    }
    assert spec["template"]["spec"]["volumes"] == [
        {"name": "runs", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
    ]
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {
        "runs": "/runs",
        "shared-memory": "/dev/shm",  # noqa: S108
    }
    mine = manifests(replace(TWO, claim="team-runs"), RECIPE)
    assert "PersistentVolumeClaim" not in {manifest["kind"] for manifest in mine}
    assert job_of(mine)[0]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "team-runs"}


def test_a_pod_is_given_longer_than_its_ranks():
    spec, container = job_of(manifests(replace(TWO, grace_seconds=90), RECIPE))
    assert container["command"][:4] == ["samestep", "run", "--grace-seconds", "90"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > 90


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (RECIPE, ["scripts/recipes/digits_cnn.py", "--epochs", "3"]),
        (Recipe("pkg.recipe", (), Kind.MODULE), ["--module", "pkg.recipe"]),
        (Recipe("sh", ("-c", "echo $(HOME) ${X}"), Kind.COMMAND), ["--no-python", "sh", "-c", "echo $$(HOME) ${X}"]),
    ],
)
def test_command_is_the_recipes_own_word_by_word(recipe, words):
    assert job_of(manifests(TWO, recipe))[1]["command"][4:] == words


def test_one_pod_needs_neither_service_nor_token():
    objects = manifests(KubernetesConfig(image=IMAGE), RECIPE)
    assert [manifest["kind"] for manifest in objects] == ["PersistentVolumeClaim", "Job"]
    assert objects[0]["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert variables(job_of(objects)[1]) == {"SAMESTEP_RUN_DIR": "/runs/digits-cnn", "PET_NPROC_PER_NODE": "1"}


def test_only_pods_of_the_run_reach_its_pods():
    policy = one(manifests(TWO, RECIPE), "NetworkPolicy")["spec"]
    (rule,) = policy["ingress"]
    assert rule == {"from": [{"podSelector": policy["podSelector"]}]}
    assert policy["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "digits-cnn"


@pytest.mark.parametrize("kind", KINDS)
def test_secrets_are_named_and_never_written(kind):
    config = replace(TWO, kind=kind, env="A=1,B=x,,y", secret_env="WANDB_API_KEY=wandb:key")
    seen = variables(job_of(manifests(config, RECIPE))[1])
    assert (seen["A"], seen["B"]) == ("1", "x,y")
    assert seen["WANDB_API_KEY"] == {"secretKeyRef": {"name": "wandb", "key": "key"}}
    assert seen["SAMESTEP_TOKEN"] == {"secretKeyRef": {"name": "digits-cnn-token", "key": "token"}}
    chosen = variables(job_of(manifests(replace(config, token_secret="shared"), RECIPE))[1])
    assert chosen["SAMESTEP_TOKEN"] == {"secretKeyRef": {"name": "shared", "key": "token"}}


@pytest.mark.parametrize("kind", KINDS)
def test_objects_are_made_before_what_needs_them(kind):
    objects = manifests(replace(TWO, kind=kind, namespace="team"), RECIPE)
    assert objects[-1]["kind"] in ("Job", "JobSet", "TrainJob")
    assert {manifest["metadata"]["namespace"] for manifest in objects} == {"team"}
    assert {manifest["metadata"]["labels"]["app.kubernetes.io/instance"] for manifest in objects} == {"digits-cnn"}


@pytest.mark.parametrize(
    ("target", "kind", "name"),
    [
        ("recipe.py", Kind.SCRIPT, "recipe"),
        ("a/b/My Recipe_2.py", Kind.SCRIPT, "my-recipe-2"),
        ("2024_run.py", Kind.SCRIPT, "run"),
        ("pkg.sub.train_it", Kind.MODULE, "train-it"),
    ],
)
def test_names_are_made_of_the_recipe(target, kind, name):
    assert run_name(TWO, Recipe(target, (), kind)) == name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"image": ""}, "--image is expected to name a container image"),
    "image without tag": ({"image": "samestep"}, "a tag other than latest"),
    "moving tag": ({"image": "registry.example:5000/samestep:latest"}, "a tag other than latest"),
    "image as an option": ({"image": "-x:1"}, "--image is expected to be an image"),
    "image with a line": ({"image": "a:1\nb:2"}, "--image is expected to be an image"),
    "no nodes": ({"nodes": 0}, "--nodes is expected to be at least 1, but is 0"),
    "no ranks": ({"nproc_per_node": 0}, "--nproc-per-node is expected to be at least 1"),
    "root": ({"user": 0}, "--user is expected to be at least 1, but is 0"),
    "negative GPUs": ({"gpus": -1}, "--gpus is expected to be at least 0"),
    "no grace": ({"grace_seconds": 0}, "--grace-seconds is expected to be at least 1 second"),
    "low port": ({"master_port": 80}, "--master-port is expected to be between 1024"),
    "upper case": ({"name": "My_Run"}, "--name is expected to be lower case letters"),
    "digit first": ({"name": "1run"}, "--name is expected to be lower case letters"),
    "injected line": ({"name": "a\nb"}, "--name is expected to be lower case letters"),
    "namespace": ({"namespace": "a.b"}, "--namespace is expected to be lower case letters"),
    "memory in words": ({"memory": "much"}, "--memory is expected to be an amount"),
    "no memory": ({"memory": "0Gi"}, "--memory is expected to be an amount"),
    "storage": ({"storage": "20 GB"}, "--storage is expected to be an amount"),
    "claim": ({"claim": "a b"}, "--claim is expected to name an object"),
    "option as context": ({"context": "--kubeconfig=x"}, "--context is expected to be a name"),
    "variable": ({"env": "A"}, "--env is expected to be NAME=VALUE"),
    "variable twice": ({"env": "A=1,A=2"}, "--env is expected to name each variable once"),
    "literal secret": ({"env": "WANDB_API_KEY=hunter2"}, "--env is expected to hold no secret"),
    "secret without key": ({"secret_env": "A=b"}, "--secret-env is expected to be NAME=SECRET:KEY"),
    "both": ({"env": "A=1", "secret_env": "A=b:c"}, "expected to be about different variables, but both set A"),
    "module and program": ({"module": True, "no_python": True}, "one at a time"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_cluster_would_refuse_is_refused_here(case):
    values, expected = REFUSED[case]
    with pytest.raises(UsageError) as refused:
        KubernetesConfig(**{"image": IMAGE, **values})
    assert expected in refused.value.message
    assert refused.value.hint
    assert "hunter2" not in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 2 + (case == "injected line")


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_make_pod_names_too_long_are_refused(kind):
    longest = {"indexed-job": 63 - len("-1-abcde"), "jobset": 63 - len("-node-0-1-abcde")}.get(kind, 48)
    assert run_name(replace(TWO, kind=kind, name="a" * longest), RECIPE) == "a" * longest
    with pytest.raises(UsageError, match=f"--name is expected .* has 64\nhint: --name {'a' * longest}$"):
        run_name(replace(TWO, kind=kind, name="a" * (longest + 1)), RECIPE)


def test_a_recipe_that_names_nothing_is_asked_for_a_name():
    with pytest.raises(UsageError, match="--name is expected to be lower case"):
        run_name(TWO, Recipe("___.py"))


@pytest.mark.parametrize(("path", "good"), [("/runs/x", True), ("/runs/../etc", False), ("runs/x", False)])
def test_a_run_directory_outside_the_volume_is_refused(path, good):
    recipe = Recipe("r.py", ("--run-dir", path))
    if good:
        assert manifests(TWO, recipe)
    else:
        with pytest.raises(UsageError, match="on the volume, below /runs"):
            manifests(TWO, recipe)


@pytest.mark.parametrize(
    ("argv", "own", "words"),
    [
        (["--nodes", "2", "r.py", "--epochs", "3"], ["--nodes=2"], ["r.py", "--epochs", "3"]),
        (["r.py", "--nodes", "2", "--gpus=1", "--epochs", "3"], ["--nodes=2", "--gpus=1"], ["r.py", "--epochs", "3"]),
        (["--nodes", "1", "r.py", "--nodes", "2"], ["--nodes=2"], ["r.py"]),
        (["r.py", "--dry-run", "--", "--nodes", "2"], ["--dry-run"], ["r.py", "--nodes", "2"]),
        (["r.py", "--epochs", "3", "--nodes", "2"], [], ["r.py", "--epochs", "3", "--nodes", "2"]),
        (["r.py", "word", "--nodes", "2"], [], ["r.py", "word", "--nodes", "2"]),
        (["--nodes", "2"], ["--nodes=2"], []),
    ],
)
def test_options_stand_before_the_recipe_or_right_after_it(argv, own, words):
    assert split_around(argv, KubernetesConfig) == (own, words)


def test_yaml_and_json_say_the_same(capsys):
    yaml = pytest.importorskip("yaml")
    said: list[str] = []
    words = ["kubernetes", "r.py", "--nodes", "2", "--image", IMAGE, "--dry-run"]
    assert submit(words, {}, said.append) == submit([*words, "--json"], {}, said.append) == 0
    as_yaml, as_json = list(yaml.safe_load_all(said[0])), json.loads(said[1])["items"]
    assert as_yaml == as_json == manifests(KubernetesConfig(image=IMAGE, nodes=2), Recipe("r.py"))
    assert "&id" not in said[0]
    assert "kubectl create secret generic r-token --from-file=token=/dev/stdin" in capsys.readouterr().err
