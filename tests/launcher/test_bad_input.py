"""A mistake on the command line costs under a second, two lines and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest

CASES = {
    "no recipe": (["--nproc-per-node", "2"], "a recipe is expected"),
    "missing file": (["nosuch.py"], "does not exist"),
    "missing file with a neighbour": (["recip.py"], "did you mean recipe.py?"),
    "directory": (["folder"], "is a directory"),
    "missing module": (["-m", "nosuch.module"], "nosuch.module is expected to be importable"),
    "missing module of a package": (["-m", "email.nosuch"], "email.nosuch is expected to be importable"),
    "package without __main__": (["-m", "email"], "but is a package without __main__.py"),
    "missing command": (["--no-python", "nosuch-command"], "nosuch-command is expected to be a program"),
    "unknown flag": (["--nproc-per-nod", "2", "recipe.py"], "did you mean --nproc-per-node?"),
    "unknown flag with underscores": (["--nproc_per_nodes=2", "recipe.py"], "did you mean --nproc-per-node?"),
    "flag without value": (["--nproc-per-node"], "followed by a value"),
    "no ranks": (["--nproc-per-node", "0", "recipe.py"], "at least 1, or auto, gpu or cpu, but is '0'"),
    "negative ranks": (["--nproc-per-node", "-1", "recipe.py"], "but is '-1'"),
    "ranks in words": (["--nproc-per-node", "two", "recipe.py"], "but is 'two'"),
    "ranks by accelerate's name": (["--num_processes", "0", "recipe.py"], "but is '0'"),
    "contradiction": (["--num-processes", "3", "--nproc_per_node", "2", "recipe.py"], "expected to agree"),
    "contradicting ports": (["--main_process_port=1", "--master-port=2", "recipe.py"], "expected to agree"),
    "no node rank": (["--nnodes", "2", "recipe.py"], "--node-rank is expected to be given"),
    "no machine rank": (["--num_machines", "2", "recipe.py"], "--node-rank is expected to be given"),
    "elastic nodes": (["--nnodes", "4:1", "recipe.py"], "--nnodes is expected to be a number of machines or MIN:MAX"),
    "a node too many": (["--nnodes", "2", "--node-rank", "2", "recipe.py"], "--node-rank is expected to be at least 0"),
    "an endpoint": (["--nnodes", "2", "--rdzv-endpoint", "h:x", "recipe.py"], "--rdzv-endpoint is expected to be HOST"),
    "a timeout": (
        ["--nnodes", "2", "--node-rank", "0", "--rdzv-conf", "join_timeout=0", "recipe.py"],
        "join_timeout in --rdzv-conf is expected to be above 0",
    ),
    "node rank": (["--node-rank", "1", "recipe.py"], "--node-rank is expected to be 0"),
    "numa binding": (["--numa-binding", "node", "recipe.py"], "--numa-binding is expected to be left out"),
    "module and program": (["-m", "--no-python", "recipe.py"], "one at a time"),
    "negative restarts": (["--max-restarts", "-1", "recipe.py"], "--max-restarts is expected to be at least 0"),
    "restarts in words": (["--max-restarts", "some", "recipe.py"], "--max-restarts"),
    "port out of range": (["--master-port", "70000", "recipe.py"], "between 0 and 65535"),
    "tee": (["--tee", "7", "recipe.py"], "--tee is expected"),
    "redirects": (["-r", "0:9", "recipe.py"], "--redirects is expected"),
    "filter": (["--local-ranks-filter", "a", "recipe.py"], "--local-ranks-filter is expected"),
    "run dir below a file": (["trains.py", "--run-dir", "recipe.py/x"], "recipe.py is not a directory"),
    "run dir is a file": (["trains.py", "--run_dir=recipe.py"], "is not a directory"),
    "run dir is a symlink to nothing": (["trains.py", "--run-dir", "gone"], "nowhere, which does not exist"),
    "run dir is below a symlink to nothing": (["trains.py", "--run-dir", "gone/x"], "gone is a symlink to "),
    "run dir is a symlink to itself": (["trains.py", "--run-dir", "loop"], "is a symlink that leads back to itself"),
    "log dir is a symlink to nothing": (["--log-dir", "gone", "recipe.py"], "nowhere, which does not exist"),
    "run dir is empty": (["trains.py", "--run-dir", ""], "--run-dir is expected to be a folder, but is empty"),
    "run dir is a number in a file": (["trains.py", "--config", "five.toml"], "run_dir in five.toml is expected to be"),
    "log dir below a file": (["--log-dir", "recipe.py/logs", "recipe.py"], "the folder for logs recipe.py/logs is"),
    "a filter of ranks that are not there": (["--local-ranks-filter", "9", "recipe.py"], "to name ranks below 1"),
    "streams of ranks that are not there": (["--redirects", "7:1", "recipe.py"], "--redirects is expected to name"),
    "more ranks to keep than there are": (["--min-ranks", "9", "recipe.py"], "at most the number of ranks, 1, but is"),
    "a form of waiting": (["--rdzv-conf", "foo", "recipe.py"], "--rdzv-conf is expected to be KEY=VALUE"),
}


def _stage(cwd: Path) -> set[str]:
    (cwd / "recipe.py").write_text("print('must not run')\n")
    (cwd / "trains.py").write_text("from samestep.train import train\nprint('must not run')\n")
    (cwd / "five.toml").write_text("run_dir = 5\n")
    (cwd / "folder").mkdir()
    (cwd / "gone").symlink_to("nowhere")
    (cwd / "loop").symlink_to("loop")
    return {item.name for item in cwd.iterdir()}


@pytest.mark.alone
@pytest.mark.parametrize("case", CASES)
def test_is_named_in_one_line_with_a_hint(case, samestep):
    before = _stage(samestep.cwd)
    words, expected = CASES[case]
    ended = samestep("run", *words)
    assert ended.code == 2
    assert ended.stdout == ""
    assert expected in ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == 2, ended.stderr
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert {item.name for item in samestep.cwd.iterdir()} == before
    # the better of two, so that a busy machine does not count as slowness of ours
    assert ended.seconds < 1.0 or samestep("run", *words).seconds < 1.0


def test_environment_is_judged_like_a_flag(samestep):
    _stage(samestep.cwd)
    ended = samestep("run", "recipe.py", env={"PET_NPROC_PER_NODE": "none"})
    assert (ended.code, "'none'" in ended.stderr) == (2, True)


def test_a_log_that_can_not_be_opened_is_named(samestep):
    _stage(samestep.cwd)
    (samestep.cwd / "logs" / "rank-0.log").mkdir(parents=True)
    ended = samestep("run", "--log-dir", "logs", "recipe.py")
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: the log logs/rank-0.log is expected to be writable, but: Is a directory\n")


def test_taken_port_is_named_with_its_holder(samestep):
    _stage(samestep.cwd)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = samestep("run", "--master-port", port, "recipe.py")
    assert ended.code == 2
    assert f"{port} is taken by pid {os.getpid()} ({psutil.Process().name()})" in ended.stderr
    assert not (samestep.cwd / "runs").exists()


def test_more_ranks_than_gpus_is_refused_where_there_are_gpus(samestep, tmp_path):
    _stage(samestep.cwd)
    tools = tmp_path / "folder"
    tool = tools / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA'\n")
    tool.chmod(0o755)
    path = {"PATH": f"{tools}:{os.environ['PATH']}"}
    ended = samestep("run", "--nproc-per-node", "2", "recipe.py", env=path)
    assert ended.code == 2
    assert "at most 1 (GPUs on this host), but is 2" in ended.stderr
    assert samestep("run", "--nproc-per-node", "2", "--dry-run", "trains.py", "--device", "cpu", env=path).code == 0
    assert samestep("run", "--nproc-per-node", "2", "--cpu", "recipe.py", env=path).code == 0


@pytest.mark.parametrize("words", [[], ["run"]])
def test_no_words_print_a_short_usage(words, samestep):
    ended = samestep(*words)
    assert (ended.code, ended.stdout) == (2, "")
    assert "usage: samestep run" in ended.stderr
    assert len(ended.stderr.splitlines()) <= 4


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("run --epochs 3 trains.py", "--epochs belongs after the recipe: samestep run recipe.py --epochs ..."),
        (
            "verify --global_batch_size=3 trains.py",
            "belongs after the recipe: samestep verify recipe.py --global-batch",
        ),
        ("submit slurm --epochs 2 trains.py", "after the recipe: samestep submit slurm recipe.py --epochs ..."),
        ("verify trains.py --shards 2", "put --shards before the recipe"),
        ("verify trains.py --run-dir x", "put --keep before the recipe"),
        ("verify trains.py --resume never", "leave it out"),
        ("verify trains.py --help", "samestep verify --help; samestep run trains.py --help shows the recipe's options"),
        ("chaos trains.py --print-config", "samestep chaos --print-config; samestep run trains.py"),
        ("chaos --xyzzy trains.py", "samestep chaos --help lists the options"),
        ("watch --xyzzy runs/x", "samestep watch --help lists the options"),
        ("report --xyzzy runs/x", "samestep report --help lists the options"),
        ("plan --xyzzy runs/x", "samestep plan --help lists the options"),
        ("verify 0123456789", "samestep verify [options] recipe.py [recipe options]"),
        ("submit slurm 0123456789", "samestep submit slurm [options] recipe.py [recipe options]"),
    ],
)
def test_hints_name_the_command_at_hand_and_the_side_of_the_recipe(words, hint, samestep):
    _stage(samestep.cwd)
    ended = samestep(*words.split())
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].startswith("hint: ")
    assert hint in ended.stderr


def test_a_launchers_option_after_the_recipe_is_told_where_it_belongs(samestep):
    recipe = Path(__file__).parents[2] / "scripts" / "recipes" / "seed_linear.py"
    ended = samestep("run", "--no-warm", recipe, "--nproc-per-node", "2")
    assert ended.code == 2
    assert (
        "hint: --nproc-per-node belongs before the recipe: samestep run --nproc-per-node ... recipe.py" in ended.stderr
    )


def test_chaos_of_a_program_that_does_not_train_is_a_usage_error(samestep):
    (samestep.cwd / "plain.py").write_text("")
    ended = samestep("chaos", "plain.py")
    assert ended.code == 2
    assert "plain.py is expected to be a recipe that trains, but ended with 0 without training" in ended.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rum"], "did you mean run?"),
        (["recipe.py"], "samestep run recipe.py"),
        (["digest"], "digest is expected to be followed by one path"),
        (["digest", "nosuch"], "nosuch can't be read"),
        (["digest", "--stat", "nosuch"], "unknown option --stat"),
        (["digest", "x" * 300], "can't be read: File name too long"),
    ],
)
def test_unknown_words_are_explained(words, expected, samestep):
    ended = samestep(*words)
    assert (ended.code, ended.stdout) == (2, "")
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("ranks", ["4097", "99999999999999999999", "9" * 5000])
def test_more_ranks_than_any_machine_has_are_refused(ranks, samestep):
    _stage(samestep.cwd)
    ended = samestep("run", "--nproc-per-node", ranks, "recipe.py")
    assert (ended.code, ended.stdout) == (2, "")
    assert "--nproc-per-node is expected to be at most 4096 on one machine" in ended.stderr
