"""The batch script as text: what it asks of Slurm, and that no value can be more than a value."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from samestep.launcher.cluster.slurm import SlurmConfig, script, seconds_of
from samestep.launcher.command_line.argv import Kind, Recipe
from samestep.launcher.contract import UsageError

RUN, HERE = Path("/shared/runs/x"), Path("/shared/project")


def made(*arguments: str, kind: Kind = Kind.SCRIPT, target: str = "recipe.py", **options) -> str:
    return script(SlurmConfig(**options), Recipe(target, arguments, kind), RUN, HERE, "/venv/bin/python")


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def launched(text: str) -> list[str]:
    """The words that the shell hands to srun."""
    shim = text.replace("srun ", "printf '%s\\0' ", 1).partition("step=$!")[0].rstrip().rstrip("&")
    shown = subprocess.run(
        ["sh", "-c", shim], env={"SLURM_JOB_NUM_NODES": "2"}, capture_output=True, check=True, timeout=30
    ).stdout
    return [word.decode() for word in shown.split(b"\0")[:-1]]


def test_options_become_directives():
    found = directives(made(nodes="2", time="4:00:00", partition="gpu", nproc_per_node="8", gpus_per_node="a100:8"))
    assert found == [
        "--job-name=recipe",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=8",
        "--partition=gpu",
        "--time=4:00:00",
        "--gpus-per-node=a100:8",
        "--chdir=/shared/project",
        "--output=/shared/runs/x/logs/slurm-%j.log",
        "--open-mode=append",
        "--signal=B:USR1@120",
        "--requeue",
    ]


def test_a_range_of_nodes_asks_for_as_many_whole_machines_as_there_are():
    assert directives(made(nodes="1-3"))[1:4] == ["--nodes=1-3", "--ntasks=3", "--exclusive"]


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("5", 300),
        ("2:30", 150),
        ("4:00:00", 14400),
        ("1-2", 93600),
        ("1-2:03", 93780),
        ("1-02:03:04", 93784),
        ("", 0),
        ("infinite", 0),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(limit, seconds):
    assert seconds_of(limit) == seconds


def test_a_start_that_would_end_as_it_begins_is_refused():
    with pytest.raises(UsageError, match="--time 2 is 120 seconds") as raised:
        made(time="2")
    assert "--signal-seconds 30" in str(raised.value)
    assert "--signal=B:USR1@30" in directives(made(time="2", signal_seconds=30))


def test_the_script_is_one_that_a_shell_understands():
    subprocess.run(["sh", "-n"], input=made("--epochs", "3"), text=True, check=True, timeout=30)


@pytest.mark.parametrize(
    "word",
    [
        "two words",
        "a\nb",
        "x\n#SBATCH --uid=0\n",
        "$(touch /tmp/x)",
        "`id`",
        "'; id; '",
        '"',
        "$HOME",
        "\\",
        "",
        "{}",
        "%j",
    ],
)
def test_any_word_reaches_the_recipe_as_it_is(word):
    text = made("--name", word)
    assert launched(text)[-4:] == ["--name", word, "--run-dir", "/shared/runs/x"]


def test_a_word_with_a_directive_comes_after_the_last_line_that_sbatch_reads():
    text = made("x\n#SBATCH --uid=0")
    assert text.index("\nset -u\n") < text.index("--uid")


def test_a_given_run_dir_is_not_given_twice_and_a_module_is_one():
    words = launched(made("--run-dir", "here", kind=Kind.MODULE, target="pack.age"))
    assert words.count("--run-dir") == 1
    assert words[words.index("--module") :][:3] == ["--module", "--", "pack.age"]


@pytest.mark.parametrize("option", ["partition", "account", "qos", "job_name", "time", "mem", "nodes", "constraint"])
@pytest.mark.parametrize("value", ["a\n#SBATCH --uid=0", "a b", "a;b", "$(id)", "a\n", "-x", "a'b", 'a"b', "a#b"])
def test_no_value_can_end_its_line(option, value):
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} is expected to be a plain value"):
        SlurmConfig(**{option: value})


@pytest.mark.parametrize("expression", ["a&b", "a|b", "[r1|r2]", "[knl*4&fat*12]", "(a&b)|c", "[(a&b)*1&c*2]", "a,b|c"])
def test_an_expression_of_features_is_quoted_for_sbatch(expression):
    assert f'--constraint="{expression}"' in directives(made(constraint=expression))
    assert "--constraint=a100,x86-64" in directives(made(constraint="a100,x86-64"))


@pytest.mark.parametrize("path", ["/a\nb", '/a"b', "/a#b", "/a%j", "/a\\b", "/a'b"])
def test_paths_that_sbatch_would_read_otherwise_are_refused(path):
    with pytest.raises(UsageError, match="path for sbatch"):
        script(SlurmConfig(), Recipe("r.py"), Path(path), HERE, "python")


def test_a_path_with_a_space_is_quoted():
    text = script(SlurmConfig(), Recipe("r.py"), Path("/my runs/x"), HERE, "python")
    assert '--output="/my runs/x/logs"/slurm-%j.log' in directives(text)
    assert shlex.quote("/my runs/x") in text


@pytest.mark.parametrize("word", ["--hub-token", "--token=abc", "--db_password", "--api-key", "--wandb-api-key=1"])
def test_secrets_are_refused_on_the_command_line(word):
    with pytest.raises(UsageError, match="secrets are expected in the environment") as caught:
        made(word, "abc")
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (2, False), (75, True), (76, True), (77, False)])
@pytest.mark.parametrize(("state", "restarts"), [("RUNNING", 0), ("RUNNING", 3), ("COMPLETING", 0), ("CANCELLED", 0)])
def test_only_run_again_requeues_and_not_for_ever_nor_what_was_cancelled(tmp_path, code, again, state, restarts):
    scontrol = f"echo $* > {tmp_path}/asked; exit 1"
    tools = {"srun": f"exit {code}", "scancel": "exit 0"}
    tools["scontrol"] = f'[ "$2" = show ] || {{ {scontrol}; }}\necho "JobId=7 JobState={state} Reason=None"'
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    env["SLURM_JOB_NUM_NODES"] = "2"
    ended = subprocess.run(["sh", "-c", made(max_requeues=3)], env=env, capture_output=True, text=True, timeout=30)
    assert ended.returncode == code
    asked = (tmp_path / "asked").read_text().split() if (tmp_path / "asked").exists() else []
    assert asked == (["requeue", "7"] if again and restarts < 3 and state == "RUNNING" else [])


@pytest.mark.parametrize(("code", "leaves"), [(75, 75), (143, 76), (1, 1)])
def test_the_status_of_srun_survives_a_signal_to_the_script(tmp_path, code, leaves):
    """Slurm signals the script while it waits: it tells the launchers, and goes on waiting for their exit code."""
    tools = {
        "srun": f"trap 'exit {code}' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done",
        "scancel": f"echo $* > {tmp_path}/told; kill -TERM $(cat {tmp_path}/pid)",
        "scontrol": '[ "$2" = show ] && echo "JobId=7 JobState=RUNNING Reason=None" || exit 1',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    signal_when_ready = f"( while ! [ -s {tmp_path}/pid ]; do sleep 0.1; done; kill -USR1 $$ ) &\n"
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    ended = subprocess.run(
        ["sh", "-c", signal_when_ready + made()], env=env, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == leaves
    assert (tmp_path / "told").read_text().split() == ["--signal=TERM", "7"]
    assert ("asked to save" in ended.stdout) == (leaves != 1)


def test_dry_run_prints_the_script_and_creates_nothing(samestep):
    (samestep.cwd / "recipe.py").write_text("")
    ended = samestep("submit", "slurm", "recipe.py", "--nodes", "2", "--dry-run", "--epochs", "3")
    assert ended.code == 0, ended.err
    assert ended.out.startswith(b"#!/bin/sh\n#SBATCH --job-name=recipe\n#SBATCH --nodes=2\n")
    assert b"recipe.py --epochs 3" in ended.out
    assert not (ended.cwd / "runs").exists()
