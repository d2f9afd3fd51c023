"""The plan is a pure function: tables of what was asked and what every rank gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from samestep.launcher import who_started
from samestep.launcher.command_line.argv import Kind, Recipe
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import RunDir
from samestep.launcher.plan import Facts, Meeting, plan, render

RUN_DIR = RunDir(Path("/runs/x"))
MEETING = Meeting("127.0.0.1", 20001, store_port=40001, store_fd=5)
FACTS = Facts(world_size=2, run_id="id", python="python")


def commands(config=None, recipe=None, meeting=MEETING, facts=FACTS):
    return plan(config or LaunchConfig(), recipe or Recipe("r.py"), RUN_DIR, meeting, facts)


@pytest.mark.parametrize(
    ("recipe", "argv"),
    [
        (Recipe("r.py", ("--epochs", "3")), ("python", "r.py", "--epochs", "3")),
        (Recipe("pkg.mod", ("-m", "x"), Kind.MODULE), ("python", "-m", "pkg.mod", "-m", "x")),
        (Recipe("sh", ("-c", "true"), Kind.COMMAND), ("sh", "-c", "true")),
        (Recipe("r.py", ("${local_rank}", "$HOME")), ("python", "r.py", "0", "$HOME")),
    ],
)
def test_command_line_is_the_recipes_own(recipe, argv):
    assert commands(recipe=recipe)[0].argv == argv


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_workers_read_back_their_place(world_size):
    for rank, command in enumerate(commands(facts=replace(FACTS, world_size=world_size))):
        seen = who_started.worker(command.env)
        assert (seen.rank, seen.local_rank, seen.world_size, seen.local_world_size) == (
            rank,
            rank,
            world_size,
            world_size,
        )
        assert (seen.node_rank, seen.nnodes, seen.master_port, seen.distributed) == (0, 1, 20001, True)
        assert command.log == Path(f"/runs/x/logs/rank-{rank}.log")


def test_only_rank_zero_gets_the_store_and_nobody_inherits_one():
    zero, one = commands()
    assert (zero.env["SAMESTEP_STORE_FD"], zero.pass_fds) == ("5", (5,))
    assert ("SAMESTEP_STORE_FD" in one.env, one.pass_fds) == (False, ())
    assert "SAMESTEP_STORE_FD" not in one.environment({"SAMESTEP_STORE_FD": "9", "HOME": "/"})
    none, _ = commands(meeting=replace(MEETING, store_port=0))
    assert "SAMESTEP_STORE_PORT" not in none.environment({"SAMESTEP_STORE_PORT": "9"})


def test_stray_rank_variables_of_the_launcher_reach_nobody():
    base = {"RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "7", "MASTER_PORT": "1", "GROUP_RANK": "3", "KEPT": "yes"}
    seen = commands()[1].environment(base)
    assert (seen["RANK"], seen["WORLD_SIZE"], seen["LOCAL_RANK"], seen["GROUP_RANK"]) == ("1", "2", "1", "0")
    assert (seen["MASTER_PORT"], seen["KEPT"]) == ("20001", "yes")


def test_each_generation_is_told_apart():
    later = commands(facts=replace(FACTS, generation=2, max_restarts=3))[0]
    assert later.env["SAMESTEP_GENERATION"] == later.env["TORCHELASTIC_RESTART_COUNT"] == "2"
    assert later.env["TORCHELASTIC_MAX_RESTARTS"] == "3"
    assert later.elastic_error != commands()[0].elastic_error


@pytest.mark.parametrize(("environ", "gpus"), [({}, ["0", "1"]), ({"CUDA_VISIBLE_DEVICES": "4,6"}, ["4", "6"])])
def test_virtual_local_rank_gives_each_rank_one_gpu(environ, gpus):
    planned = commands(LaunchConfig(virtual_local_rank=True), facts=replace(FACTS, environ=environ))
    assert [command.env["CUDA_VISIBLE_DEVICES"] for command in planned] == gpus
    assert [command.env["LOCAL_RANK"] for command in planned] == ["0", "0"]
    assert [command.env["RANK"] for command in planned] == ["0", "1"]


def test_same_question_same_plan():
    assert commands() == commands()
    assert render(commands()) == render(commands())
