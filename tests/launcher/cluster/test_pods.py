"""A manifest's command and environment, run in namespaces as pods: no privileges, own network, first process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samestep.launcher.cluster import pod
from samestep.launcher.cluster.kubernetes import manifests
from samestep.launcher.cluster.kubernetes_config import KubernetesConfig
from samestep.launcher.command_line.argv import Recipe
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import UsageError

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(300)]

DIGITS = Path(__file__).resolve().parents[3] / "scripts" / "recipes" / "digits_cnn.py"
ARGUMENTS = ("--epochs", "1", "--shards", "4")
IMAGE = "registry.example/samestep:0.1.0"


def in_pod(kind: str, nodes: int, arguments: tuple[str, ...] = ARGUMENTS) -> tuple[dict[str, Any], dict[str, Any]]:
    """The Job's spec and the container, as the cluster would start it; Kubeflow's Trainer adds what its plugin adds."""
    config = KubernetesConfig(image=IMAGE, kind=kind, nodes=nodes, nproc_per_node=2, name="digits")  # type: ignore[arg-type]
    objects = manifests(config, Recipe(str(DIGITS), arguments))
    (holder,) = [m for m in objects if m["kind"] in ("Job", "JobSet", "TrainingRuntime")]
    spec = holder["spec"]["template"]["spec"] if holder["kind"] == "TrainingRuntime" else holder["spec"]
    job = spec if holder["kind"] == "Job" else spec["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    if kind == "trainjob":
        trainer = objects[-1]["spec"]["trainer"]
        container |= {"command": trainer["command"]}
        # kubeflow/trainer, pkg/runtime/framework/plugins/torch/torch.go, EnforceMLPolicy
        container["env"] += [
            {"name": "PET_NNODES", "value": str(trainer["numNodes"])},
            {"name": "PET_NPROC_PER_NODE", "value": str(trainer["numProcPerNode"])},
            {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": pod._INDEX}}},
            {"name": "PET_MASTER_ADDR", "value": "digits-node-0-0.digits"},
            {"name": "PET_MASTER_PORT", "value": "29500"},
        ]
    return job, container


def hostnames(kind: str, nodes: int) -> dict[str, list[str]]:
    """Host name of each pod, and the name that the headless service gives it."""
    names = [f"digits-{index}" if kind == "indexed-job" else f"digits-node-0-{index}" for index in range(nodes)]
    return {name: [f"{name}.digits"] for name in names}


def digest(run_dir: Path) -> str:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    (finished,) = [event for event in map(json.loads, lines) if event["event"] == "run_finished"]
    return str(finished["digest"])


def test_one_pod_trains_as_first_process_without_privileges(pods, digits_digest):
    _, container = in_pod("indexed-job", 1)
    with pods.network(hostnames("indexed-job", 1)) as network:
        started = network.start(0, container["command"], pods.environment(container, 0))
        code, output = started.end()
    assert code == 0, output
    assert digest(pods.volume / "digits") == digits_digest
    assert {path.owner() for path in pods.volume.rglob("*")} == {pods.volume.owner()}


def test_a_pod_that_is_deleted_leaves_nothing_and_goes_on_in_another(pods, digits_digest):
    _, container = in_pod("indexed-job", 1, (*ARGUMENTS, "--checkpoint-every", "2"))
    with pods.network(hostnames("indexed-job", 1)) as network:
        env = pods.environment(container, 0)
        first = network.start(0, container["command"], env)
        until = time.monotonic() + 60
        while not list(pods.volume.glob("digits/checkpoints/step-*")):
            assert first.process.poll() is None, first.end()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
        first.sigterm()
        code, output = first.end()
        assert code in (0, 75), output  # 0: the run was faster than the signal
        second = network.start(0, container["command"], env)
        code, output = second.end()
    assert code == 0, output
    assert digest(pods.volume / "digits") == digits_digest


def starts_several_nodes() -> bool:
    try:
        LaunchConfig(nnodes="2", node_rank=1, master_addr="a", master_port=29500)
    except UsageError:
        return False
    return True


@pytest.mark.parametrize("program", ["samestep", "torchrun"])
@pytest.mark.parametrize("kind", ["indexed-job", "jobset", "trainjob"])
def test_two_pods_find_each_other_by_what_the_manifest_says(kind, program, pods, digits_digest):
    _, container = in_pod(kind, 2)
    command = container["command"]
    if program == "torchrun":  # it reads the same variables: what a pod is told does not depend on us
        command = ["torchrun", *command[command.index(str(DIGITS)) :]]
    elif not starts_several_nodes():
        pytest.skip("samestep run starts the ranks of one machine only")
    with pods.network(hostnames(kind, 2)) as network:
        both = [network.start(i, command, pods.environment(container, i)) for i in range(2)]
        ends = [one.end(200) for one in both]
    assert [code for code, _ in ends] == [0, 0], "\n".join(output for _, output in ends)
    assert digest(pods.volume / "digits") == digits_digest
    lines = (pods.volume / "digits" / "events.jsonl").read_text().splitlines()
    ranks = next(event for event in map(json.loads, lines) if event["event"] == "run_started")["ranks"]
    assert [rank["host"] for rank in ranks] == [name for name in hostnames(kind, 2) for _ in range(2)]


def verdict(policy: dict[str, Any], code: int) -> str:
    """What the Job controller does with a failed pod: the first rule that fits, else it counts."""
    fitting = [rule for rule in policy["rules"] if code in rule.get("onExitCodes", {}).get("values", ())]
    return str(fitting[0]["action"]) if fitting else "Count"


def control(start: Callable[[int], Any], running: dict[int, Any], job: dict[str, Any], seconds: float) -> list[str]:
    """What the Job controller does until the job has ended: replaces pods that failed. Says what it did with each."""
    done: list[str] = []
    until = time.monotonic() + seconds
    while running:
        assert time.monotonic() < until, done
        for index, one in list(running.items()):
            if one.process.poll() is None:
                continue
            code, output = one.end()
            print(f"pod {index} ended with {code}\n{output}")
            del running[index]
            if code == 0 and str(index) in [rule["succeededIndexes"] for rule in job["successPolicy"]["rules"]]:
                return done
            if code:
                done.append(verdict(job["podFailurePolicy"], code))
                if done[-1] == "FailJob":
                    return done
                running[index] = start(index)
        time.sleep(0.05)
    return done


@pytest.mark.parametrize("victim", [0, 1])
def test_a_pod_that_is_lost_is_replaced_and_costs_no_bit(victim, pods, digits_digest):
    if not starts_several_nodes():
        pytest.skip("samestep run starts the ranks of one machine only")
    job, container = in_pod("indexed-job", 2, (*ARGUMENTS, "--checkpoint-every", "2"))
    with pods.network(hostnames("indexed-job", 2)) as network:
        start = lambda index: network.start(index, container["command"], pods.environment(container, index))  # noqa: E731
        running = {index: start(index) for index in range(2)}
        until = time.monotonic() + 90
        while not list(pods.volume.glob("digits/checkpoints/step-*")):
            assert all(one.process.poll() is None for one in running.values())
            assert time.monotonic() < until
            time.sleep(0.02)
        running[victim].first_process().kill()
        done = control(start, running, job, 200)
    assert "Count" in done
    assert len(done) <= job["backoffLimit"]
    assert digest(pods.volume / "digits") == digits_digest


@pytest.mark.parametrize("program", ["samestep", "torchrun"])
def test_nodes_of_compose_find_each_other(program, pods, digits_digest):
    services = pytest.importorskip("yaml").safe_load((DIGITS.parents[2] / "docker" / "compose.yaml").read_text())[
        "services"
    ]
    if program == "samestep" and not starts_several_nodes():
        pytest.skip("samestep run starts the ranks of one machine only")
    with pods.network({node["hostname"]: [] for node in services.values()}) as network:
        both = []
        for index, node in enumerate(services.values()):
            assert node["command"][-1] == "scripts/recipes/digits_cnn.py"
            command = ["torchrun"] if program == "torchrun" else node["command"][:-1]
            environ = node["environment"] | {"SAMESTEP_TOKEN": "0123456789abcdef" * 4}
            both.append(network.start(index, [*command, str(DIGITS), *ARGUMENTS], environ))
        ends = [one.end(200) for one in both]
    assert [code for code, _ in ends] == [0, 0], "\n".join(output for _, output in ends)
    assert digest(pods.volume / "runs" / "digits_cnn") == digits_digest
