"""Environments of real starts, recorded, and what they say; nothing here starts anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samestep.launcher import who_started
from samestep.launcher.contract import UsageError

RECORDED = json.loads(Path(__file__).with_name("environments.json").read_text())
TORCH = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}

# (rank, local rank, local world size, node rank, nodes) of each process, in the order of the ranks
PLACES = {
    "torchrun --nproc-per-node 2": [(0, 0, 2, 0, 1), (1, 1, 2, 0, 1)],
    "accelerate launch --multi_gpu --num_processes 2": [(0, 0, 2, 0, 1), (1, 1, 2, 0, 1)],
    "mpirun -n 2 (Open MPI 4.1)": [(0, 0, 2, 0, 1), (1, 1, 2, 0, 1)],
    "mpirun -n 2 (MPICH 4.0)": [(0, 0, 2, 0, 1), (1, 1, 2, 0, 1)],
    "mpirun -n 2, torchrun --nproc-per-node 2 in each (Open MPI 4.1)": [
        *[(0, 0, 2, 0, 2), (1, 1, 2, 0, 2), (2, 0, 2, 1, 2), (3, 1, 2, 1, 2)],
    ],
    "srun -N2 -n2": [(0, 0, 1, 0, 2), (1, 0, 1, 1, 2)],
    "srun -N2 -n3": [(0, 0, 2, 0, 2), (1, 1, 2, 0, 2), (2, 0, 1, 1, 2)],
    "srun -N2 -n4 --ntasks-per-node=2": [(0, 0, 2, 0, 2), (1, 1, 2, 0, 2), (2, 0, 2, 1, 2), (3, 1, 2, 1, 2)],
    "srun --mpi=pmi2 -N2 -n2": [(0, 0, 1, 0, 2), (1, 0, 1, 1, 2)],
    "srun -N2 -n2, torchrun --nnodes 2 in each": [(0, 0, 1, 0, 2), (1, 0, 1, 1, 2)],
    "salloc -N2 -n4, mpirun -n 2 (Open MPI 4.1)": [(0, 0, 2, 0, 1), (1, 1, 2, 0, 1)],
    "salloc -N2, mpirun -launcher fork -n 2 (MPICH 4.0)": [(0, 0, 1, 0, 2), (1, 0, 1, 1, 2)],
}
ALONE = ["srun -n1", "salloc -N2 -n2, its shell", "sbatch -N2 -n2, the script itself"]


def test_every_recorded_start_has_its_claim():
    assert sorted([*PLACES, *ALONE]) == sorted(RECORDED)


@pytest.mark.parametrize("start", PLACES)
def test_the_place_of_every_rank_is_read_from_a_real_start(start):
    seen = [who_started.worker(environ) for environ in RECORDED[start]]
    assert sorted((e.rank, e.local_rank, e.local_world_size, e.node_rank, e.nnodes) for e in seen) == PLACES[start]
    assert {(e.world_size, e.distributed) for e in seen} == {(len(seen), True)}
    assert len({(e.job, e.started_by, e.master_addr) for e in seen}) == 1
    # torchrun and accelerate say where to meet, the others say which start this is
    assert all(bool(e.master_addr) != bool(e.job) for e in seen)


@pytest.mark.parametrize("start", ALONE)
def test_a_shell_of_an_allocation_and_a_single_task_are_one_process(start):
    for environ in RECORDED[start]:
        assert not who_started.worker(environ).distributed


def test_a_given_address_is_used_by_tasks():
    env = who_started.worker(OPENMPI | {"MASTER_ADDR": "h", "MASTER_PORT": "7"})
    assert (env.master_addr, env.master_port, env.rank) == ("h", 7, 1)


def test_ranks_set_by_hand_may_repeat_what_the_task_says():
    env = who_started.worker(STEP | {"RANK": "1", "WORLD_SIZE": "2"})
    assert (env.rank, env.world_size, env.job) == (1, 2, "slurm-7-0")


def test_a_requeued_job_is_another_start():
    jobs = {who_started.worker(STEP | {"SLURM_RESTART_COUNT": n}).job for n in ("1", "2")}
    assert jobs == {"slurm-7-0-1", "slurm-7-0-2"}


def test_a_pod_of_an_indexed_job_is_a_rank_where_the_manifest_says_the_rest():
    pod = {"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "job-0.svc", "MASTER_PORT": "29500"}
    env = who_started.worker(pod)
    assert (env.rank, env.world_size, env.local_rank, env.node_rank, env.nnodes) == (1, 3, 0, 1, 3)
    assert not who_started.worker({"JOB_COMPLETION_INDEX": "1"}).distributed


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (TORCH | OPENMPI | {"OMPI_COMM_WORLD_RANK": "0"}, ["RANK is 1", "OMPI_COMM_WORLD_RANK is 0"]),
        (TORCH | STEP | {"SLURM_STEP_NUM_TASKS": "4"}, ["WORLD_SIZE is 2", "SLURM_STEP_NUM_TASKS is 4"]),
        (OPENMPI | {"PMI_RANK": "0", "PMI_SIZE": "2"}, ["OMPI_COMM_WORLD_RANK is 1", "PMI_RANK is 0"]),
        (OPENMPI | {"OMPI_COMM_WORLD_RANK": "2"}, ["OMPI_COMM_WORLD_RANK is 2", "OMPI_COMM_WORLD_SIZE is 2"]),
        (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ["LOCAL_RANK is 1", "LOCAL_SIZE is 1"]),
        (TORCH | {"GROUP_RANK": "3", "GROUP_WORLD_SIZE": "2"}, ["GROUP_RANK is 3", "GROUP_WORLD_SIZE is 2"]),
        (STEP | {"SLURM_PROCID": "x"}, ["SLURM_PROCID", "integer", "'x'"]),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "two"}, ["SLURM_STEP_TASKS_PER_NODE", "'two'"]),
        ({"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2"}, ["JOB_COMPLETION_INDEX and MASTER_ADDR"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_contradictions_name_both_variables(environ, words):
    with pytest.raises(UsageError) as caught:
        who_started.worker(environ)
    assert all(word in caught.value.message for word in words), caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"JOB_COMPLETION_INDEX": "2"}, (2, 0)),
        ({"JOB_COMPLETION_INDEX": "2", "PET_NODE_RANK": "2"}, (2, 0)),
        ({"JOB_COMPLETION_INDEX": "2", "PET_NODE_RANK": "auto"}, (2, 0)),
        (RECORDED["srun -N2 -n2"][1], (1, 2)),
        (RECORDED["srun -N2 -n3"][1], None),  # several tasks a node: these are ranks, not launchers
        (RECORDED["sbatch -N2 -n2, the script itself"][0], None),
    ],
)
def test_a_launcher_reads_the_rank_of_its_node(environ, expected):
    found = who_started.node_rank(environ)
    assert (found and found[:2]) == expected


def test_two_different_node_ranks_are_an_error():
    with pytest.raises(UsageError, match="JOB_COMPLETION_INDEX is 1 and PET_NODE_RANK is 0"):
        who_started.node_rank({"JOB_COMPLETION_INDEX": "1", "PET_NODE_RANK": "0"})


def test_what_was_detected_is_one_line():
    line = who_started.describe(who_started.worker(RECORDED["srun -N2 -n3"][0]))
    assert line == "samestep: 3 ranks on 2 machines, as told by Slurm (SLURM_PROCID)\n"
    assert who_started.describe(who_started.worker({})) == ""
