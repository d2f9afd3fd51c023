"""`mpirun -n 2 python recipe.py`: no flag says where the ranks meet, and the bits are those of one process."""

from __future__ import annotations

import pytest

from tests.cluster.conftest import DIGITS, FLAGS, PYTHON, call, need

pytestmark = pytest.mark.slow
OPENMPI = ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]


@pytest.mark.parametrize(
    ("mpirun", "by"),
    [(OPENMPI, "Open MPI (OMPI_COMM_WORLD_RANK)"), (["mpirun.mpich"], "MPICH or Intel MPI (PMI_RANK)")],
    ids=["openmpi", "mpich"],
)
def test_mpirun_ends_in_the_bits_of_one_process(reference, tmp_path, mpirun, by):
    need(mpirun[0])
    outcome = call([*mpirun, "-n", 2, PYTHON, DIGITS, *FLAGS, "--run-dir", "run"], tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.digest == reference.digest
    assert outcome.losses == reference.losses
    assert (outcome.stdout + outcome.stderr).count(f"2 ranks, as told by {by}") == 1
    assert list(outcome.run_dir.glob("meeting-*")) == []


def test_a_run_of_one_mpi_resumes_under_another_one_with_other_ranks(reference, tmp_path):
    need("mpirun.openmpi", "mpirun.mpich")
    flags = [*FLAGS, "--run-dir", "run"]
    first = call([*OPENMPI, "-n", 2, PYTHON, DIGITS, *flags, "--max-steps", 9], tmp_path)
    assert first.returncode == 0, first.stderr
    second = call(["mpirun.mpich", "-n", 1, PYTHON, DIGITS, *flags], tmp_path)
    assert second.returncode == 0, second.stderr
    assert second.digest == reference.digest
