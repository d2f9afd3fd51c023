"""Counting ranks on machines that we do not have, and the words before the recipe."""

from __future__ import annotations

import pytest

from samestep.launcher.command_line.argv import Kind, Recipe, split
from samestep.launcher.contract import UsageError
from samestep.launcher.host import HostFacts, _visible, count_ranks

CPU, GPU = HostFacts(cpus=6, gpus=0, memory_bytes=1), HostFacts(cpus=6, gpus=4, memory_bytes=1)


@pytest.mark.parametrize(
    ("text", "host", "on_cpu", "count"),
    [
        ("3", CPU, False, 3),
        ("99", CPU, False, 99),
        ("auto", CPU, False, 6),
        ("cpu", CPU, False, 6),
        ("auto", GPU, False, 4),
        ("auto", GPU, True, 6),
        ("gpu", GPU, False, 4),
        ("cpu", GPU, False, 6),
        ("4", GPU, False, 4),
        ("5", GPU, True, 5),
    ],
)
def test_ranks_are_counted_by_what_the_host_has(text, host, on_cpu, count):
    assert count_ranks(text, host, on_cpu=on_cpu) == count


@pytest.mark.parametrize(("text", "host"), [("gpu", CPU), ("5", GPU)])
def test_more_than_there_is_is_refused(text, host):
    with pytest.raises(UsageError, match="GPU"):
        count_ranks(text, host, on_cpu=False)


@pytest.mark.parametrize(
    ("chosen", "count"),
    [(None, 4), ("", 0), ("-1", 0), ("0", 1), ("1,3", 2), ("0,9,1", 1), ("GPU-ab,GPU-cd", 2), ("0, 1", 2)],
)
def test_visible_gpus_are_counted_as_cuda_does(chosen, count):
    assert _visible(4, {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}) == count


@pytest.mark.parametrize(
    ("argv", "own", "words"),
    [
        (["r.py", "--nproc-per-node", "x"], [], ["r.py", "--nproc-per-node", "x"]),
        (["--nproc_per_node", "2", "r.py"], ["--nproc-per-node=2"], ["r.py"]),
        (["--nproc-per-node=2", "--nproc-per-node=3", "r.py"], ["--nproc-per-node=3"], ["r.py"]),
        (["--num-processes=2", "--nproc-per-node=2", "r.py"], ["--nproc-per-node=2"], ["r.py"]),
        (["-m", "a.b", "-m"], ["-m"], ["a.b", "-m"]),
        (["-t3", "-r", "1", "r.py"], ["-t=3", "-r=1"], ["r.py"]),
        (["--standalone", "--", "-odd.py", "--"], ["--standalone"], ["-odd.py", "--"]),
        (["--rdzv-conf", "-x", "r.py"], ["--rdzv-conf=-x"], ["r.py"]),
    ],
)
def test_words_end_where_the_recipe_begins(argv, own, words):
    assert split(argv) == (own, words)


@pytest.mark.parametrize(
    ("target", "kind", "place"),
    [
        ("a/b.py", Kind.SCRIPT, "runs/b"),
        ("pkg.mod", Kind.MODULE, "runs/mod"),
        ("/bin/sh", Kind.COMMAND, "runs/sh"),
        ("./job.sh", Kind.COMMAND, "runs/job"),
    ],
)
def test_run_directory_is_named_after_the_recipe(target, kind, place):
    assert str(Recipe(target, (), kind).run_dir({})) == place


def test_run_directory_of_an_outer_run_is_not_inherited():
    recipe = Recipe("r.py")
    assert str(recipe.run_dir({"SAMESTEP_RUN_DIR": "mine"})) == "mine"
    assert str(recipe.run_dir({"SAMESTEP_RUN_DIR": "outer", "SAMESTEP_LAUNCHED": "1"})) == "runs/r"
