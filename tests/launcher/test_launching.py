"""Ranks as processes: what they are given, what of their words goes where, and how their ends become one."""

from __future__ import annotations

import json
import shlex
import stat
import time

import psutil
import pytest

from samestep.launcher.contract import ExitCode

from .conftest import WORKERS, Launcher, gone, wait_until

ACTOR = WORKERS / "actor.py"
SHOW = WORKERS / "show_environment.py"


def shown(samestep: Launcher, rank: int) -> dict:
    return json.loads((samestep.cwd / f"environment-{rank}.json").read_text())


def test_every_rank_gets_what_torchrun_gives(samestep):
    stray = {"RANK": "7", "WORLD_SIZE": "9", "SAMESTEP_STORE_FD": "99", "LOCAL_RANK": "3"}
    words = [
        "--nproc-per-node",
        "2",
        "--role",
        "trainer",
        "--rdzv-id",
        "job",
        SHOW,
        "--nproc-per-node",
        "${local_rank}",
    ]
    assert samestep("run", *words, env=stray).code == 0
    for rank in (0, 1):
        seen = shown(samestep, rank)
        environ = seen["environ"]
        expected = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "ROLE_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "ROLE_WORLD_SIZE": "2",
            "GROUP_WORLD_SIZE": "1",
            "ROLE_NAME": "trainer",
            "MASTER_ADDR": "127.0.0.1",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_RUN_ID": "job",
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "SAMESTEP_LAUNCHED": "1",
            "SAMESTEP_GENERATION": "0",
            "SAMESTEP_RUN_DIR": str(samestep.cwd / "runs" / "show_environment"),
        }
        assert expected.items() <= environ.items()
        assert environ["TORCHELASTIC_ERROR_FILE"].startswith(environ["SAMESTEP_RUN_DIR"])
        assert seen["argv"] == ["--nproc-per-node", str(rank)]
        assert seen["session"]
    assert shown(samestep, 0)["environ"]["MASTER_PORT"] == shown(samestep, 1)["environ"]["MASTER_PORT"]


def test_rank_zero_alone_holds_the_store_socket(samestep):
    assert samestep("run", "--nproc-per-node", "2", SHOW).code == 0
    zero, one = shown(samestep, 0), shown(samestep, 1)
    assert str(zero["store_port"]) == zero["environ"]["SAMESTEP_STORE_PORT"] == one["environ"]["SAMESTEP_STORE_PORT"]
    assert "SAMESTEP_STORE_FD" not in one["environ"]
    assert one["stdin_is_null"]


def test_users_own_variables_win_over_defaults(samestep):
    mine = {"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "eth7", "PYTHONFAULTHANDLER": "0"}
    assert samestep("run", "--nproc-per-node", "2", SHOW, env=mine).code == 0
    assert mine.items() <= shown(samestep, 1)["environ"].items()


def test_one_rank_keeps_its_threads(samestep):
    assert samestep("run", SHOW).code == 0
    assert "OMP_NUM_THREADS" not in shown(samestep, 0)["environ"]


def test_given_port_reaches_the_ranks(samestep):
    assert samestep("run", "--main_process_port", "23456", SHOW).code == 0
    assert shown(samestep, 0)["environ"]["MASTER_PORT"] == "23456"


def test_accelerate_names_torchrun_environment_and_underscores_start_the_same_ranks(samestep):
    for words, environ in (
        (["--num_processes", "2", "--num_machines=1", "--multi_gpu"], {}),
        (["--nproc_per_node=2", "--standalone", "--rdzv_backend", "c10d", "--rdzv-endpoint=localhost:0"], {}),
        ([], {"PET_NPROC_PER_NODE": "2", "PET_STANDALONE": "1"}),
    ):
        assert samestep("run", *words, SHOW, env=environ).code == 0
        assert shown(samestep, 1)["environ"]["WORLD_SIZE"] == "2"
        (samestep.cwd / "environment-1.json").unlink()


def test_run_directory_is_private_and_keeps_every_ranks_words(samestep):
    ended = samestep.act("0=say:zero speaks,complain:zero complains", "1=say:one speaks,complain:one complains")
    assert ended.code == 0
    run_dir = samestep.cwd / "runs" / "actor"
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    for rank, name in enumerate(("zero", "one")):
        lines = (run_dir / "logs" / f"rank-{rank}.log").read_text().splitlines()
        assert lines[0].startswith(f"--- rank {rank}, generation 0, pid ")
        assert set(lines[1:]) == {f"{name} speaks", f"{name} complains"}


def test_console_is_rank_zero_and_the_errors_of_others(samestep):
    ended = samestep.act("0=say:zero speaks,complain:zero complains", "1=say:one speaks,complain:one complains")
    assert ended.stdout == "zero speaks\n"
    assert sorted(ended.stderr.splitlines()) == ["[rank 1] one complains", "zero complains"]


def test_broken_bytes_and_missing_newlines_pass_unharmed(samestep):
    code = r"import os; os.write(1, b'\xff\xfe'); os.write(2, b'half')"
    ended = samestep("run", "--no-python", "--nproc-per-node", "2", "python3", "-c", code)
    assert ended.code == 0
    assert ended.out == b"\xff\xfe"
    assert sorted((b"half", b"[rank 1] half")) == sorted(
        line
        for line in ended.err.replace(b"half[", b"half\n[").replace(b"halfhalf", b"half\nhalf").split(b"\n")
        if line
    )


@pytest.mark.parametrize(
    ("options", "stdout", "stderr"),
    [
        (["--tee", "3"], ["[rank 0] o0", "[rank 1] o1"], ["[rank 0] e0", "[rank 1] e1"]),
        (["-t", "1:1"], ["[rank 1] o1", "o0"], ["[rank 1] e1", "e0"]),
        (["--redirects", "3"], [], []),
        (["-r", "0:2"], ["o0"], ["[rank 1] e1"]),
        (["--local-ranks-filter", "1"], ["[rank 1] o1"], ["[rank 1] e1"]),
        (["--quiet"], [], ["[rank 1] e1", "e0"]),
    ],
)
def test_console_can_be_chosen(options, stdout, stderr, samestep):
    ended = samestep.act("0=say:o0,complain:e0", "1=say:o1,complain:e1", options=tuple(options))
    assert sorted(ended.stdout.splitlines()) == stdout
    assert sorted(ended.stderr.splitlines()) == stderr
    assert "o1" in (samestep.cwd / "runs/actor/logs/rank-1.log").read_text()


def test_logs_and_run_directory_go_where_they_are_told(samestep):
    (samestep.cwd / "c.toml").write_text("run_dir = 'from-file'\n")
    recipe = _as_recipe(samestep, SHOW)
    for words, environ, place in (
        (["--run-dir", "from-flag", "--config", "c.toml"], {"SAMESTEP_RUN_DIR": "from-variable"}, "from-flag"),
        (["--config", "c.toml"], {"SAMESTEP_RUN_DIR": "from-variable"}, "from-variable"),
        (["--config", "c.toml"], {}, "from-file"),
        ([], {"SAMESTEP_CONFIG": "c.toml"}, "from-file"),
    ):
        assert samestep("run", "--no-warm", "--log-dir", "logs", recipe, *words, env=environ).code == 0
        assert shown(samestep, 0)["environ"]["SAMESTEP_RUN_DIR"] == str(samestep.cwd / place)
        assert (samestep.cwd / place / "errors").is_dir()
    assert (samestep.cwd / "logs" / "rank-0.log").read_text().count("--- rank 0, generation 0") == 4


def _as_recipe(samestep, worker):
    """A worker that is taken for a recipe, since its text says that it trains."""
    recipe = samestep.cwd / worker.name
    recipe.write_text(worker.read_text() + "\n\ndef never():\n    from samestep.train import train\n")
    return recipe


def test_flags_of_a_program_that_is_no_recipe_are_its_own(samestep):
    (samestep.cwd / "c.toml").write_text("run_dir = 'from-file'\n")
    ended = samestep("run", SHOW, "--run-dir", "its-own", "--config", "c.toml")
    assert ended.code == 0
    assert shown(samestep, 0)["environ"]["SAMESTEP_RUN_DIR"] == str(samestep.cwd / "runs" / SHOW.stem)
    assert not (samestep.cwd / "its-own").exists()
    assert not (samestep.cwd / "from-file").exists()


def test_programs_and_modules_are_started_too(samestep):
    ended = samestep("run", "--nproc-per-node", "2", "--no-python", "sh", "-c", "echo shell $RANK of $WORLD_SIZE >&2")
    assert (ended.code, ended.stdout) == (0, "")
    assert sorted(ended.stderr.splitlines()) == ["[rank 1] shell 1 of 2", "shell 0 of 2"]
    (samestep.cwd / "mine.py").write_text("print(__name__, __spec__.name)\n")
    assert samestep("run", "-m", "mine").stdout == "__main__ mine\n"


def test_program_that_cannot_start_is_a_usage_error(samestep):
    script = samestep.cwd / "script"
    script.write_bytes(b"\x7fELF no program")
    script.chmod(0o755)
    ended = samestep("run", "--nproc-per-node", "2", "--no-python", "./script")
    assert ended.code == 2
    assert "./script is expected to start" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_dry_run_prints_the_plan_and_creates_nothing(samestep):
    ended = samestep("run", "--dry-run", "--nproc-per-node", "3", "--master-port", "23457", SHOW, "--name", "a b")
    assert (ended.code, ended.stderr) == (0, "")
    assert list(samestep.cwd.iterdir()) == []
    lines = ended.stdout.splitlines()
    assert len(lines) == 3
    for rank, line in enumerate(lines):
        assert line.startswith("env ")
        assert f" RANK={rank} " in line
        assert " MASTER_PORT=23457 " in line
        assert shlex.split(line)[-3:] == [str(SHOW), "--name", "a b"]


def test_success_says_nothing_of_its_own(samestep):
    ended = samestep.act("*=say:only this")
    assert (ended.code, ended.stdout, ended.stderr) == (0, "only this\n", "")


def test_json_ends_the_output_with_one_line(samestep):
    good = samestep.act("0=say:before", options=("--json",))
    expected = {"exit_code": 0, "run_dir": "runs/actor", "generations": 1, "failure": None, "metrics": {}}
    assert json.loads(good.stdout) == expected | dict.fromkeys(("digest", "steps", "restarts", "goodput"))
    assert good.stderr == "before\n", "what ranks say does not mix with the answer"
    bad = json.loads(samestep.act("1=raise", "0=wait", options=("--json",)).stdout)
    assert (bad["exit_code"], bad["failure"]["rank"], bad["failure"]["cause"]) == (1, 1, "ValueError: boom")


@pytest.mark.alone
def test_first_failure_ends_all_ranks_at_once_even_those_that_ignore_it(samestep):
    ended = samestep.act(
        "0=ignore-term,spawn,detach,wait", "1=ignore-term,wait", "2=await-waiting:0,await-waiting:1,raise", ranks=3
    )
    assert ended.code == 1
    assert ended.seconds < 1.5
    assert "rank 2 failed: ValueError: boom" in ended.stderr
    assert "2 other ranks stopped as a consequence" in ended.stderr
    assert all(gone(pid) for pid in ended.pids("*.pid"))
    assert len(ended.pids("rank-*.pid") + ended.pids("child-*.pid") + ended.pids("detached-*.pid")) == 5


def test_failed_ranks_children_do_not_outlive_it(samestep):
    ended = samestep.act("0=wait", "1=spawn,detach,signal:9")
    assert ended.code == 1
    assert all(gone(pid) for pid in ended.pids("*.pid"))


def test_services_that_detach_themselves_from_a_successful_rank_stay(samestep):
    ended = samestep.act("0=spawn,detach", "1=exit:0")
    child, detached = ended.pids("child-0.pid")[0], ended.pids("detached-0.pid")[0]
    stays = psutil.Process(detached)
    try:
        assert ended.code == 0
        assert gone(child)
        assert stays.is_running()
    finally:
        stays.kill()


@pytest.mark.parametrize(
    ("parts", "lines"),
    [
        (["0=await-death:1,victim", "1=raise:odd"], ["rank 1 failed: ValueError: odd", "1 other rank stopped"]),
        (["0=victim", "1=await-death:0,raise:odd"], ["rank 1 failed: ValueError: odd"]),
        (["0=wait", "1=signal:11"], ["rank 1 failed: killed by SIGSEGV (signal 11)", "Python stack"]),
        (["0=wait", "1=signal:9"], ["rank 1 failed: killed by SIGKILL (signal 9)", "memory was not short (it held"]),
        (["0=wait", "1=complain:oh no,exit:3"], ["rank 1 failed: exit code 3, last words: oh no"]),
        (
            ["0=await-death:1,victim", "1=exit:0"],
            ["rank 1 failed: it left with 0 before the run was done", "early exit"],
        ),
        (
            ["0=record-victim:RuntimeError,exit:1", "1=await-death:0,record:KeyError,exit:1"],
            ["rank 1 failed: KeyError: recorded", "at recipe.py:12 in loss, step 41, phase forward", "a hint from"],
        ),
    ],
)
def test_culprit_is_named_among_victims(parts, lines, samestep):
    ended = samestep.act(*parts)
    assert ended.code == 1
    block = ended.stderr[ended.stderr.index("samestep: rank") :]
    for line in lines:
        assert line in block
    assert block.count("failed:") == 1
    assert "exit code 1: user code or a worker failed for good" in block
    assert "log: runs/actor/logs/rank-1.log" in block
    assert ended.stderr.endswith(block)


def test_failure_is_noted_among_the_events_of_a_recipe(samestep):
    events = samestep.cwd / "runs" / "actor" / "events.jsonl"
    samestep.act("1=raise", "0=wait")
    assert not events.exists()  # a script without events is none of ours
    events.write_text('{"event": "run_started"}\n')
    begin = time.time()
    samestep.act("1=record:KeyError,exit:1", "0=wait")
    last = json.loads(events.read_text().splitlines()[-1])
    assert (last["event"], last["rank"], last["step"], last["phase"]) == ("worker_failed", 1, 40, "forward")
    assert begin < last["seen"] <= last["time"]


def test_old_error_records_accuse_nobody(samestep):
    assert "KeyError" in samestep.act("1=record:KeyError,exit:1", "0=wait").stderr
    later = samestep.act("0=raise:new", "1=wait")
    assert "rank 0 failed: ValueError: new" in later.stderr
    assert "KeyError" not in later.stderr


@pytest.mark.parametrize(
    "code", [ExitCode.USAGE, ExitCode.PREEMPTED_SAVED, ExitCode.PREEMPTED_KEPT, ExitCode.NO_PROGRESS]
)
def test_documented_codes_pass_through_and_are_never_restarted(code, samestep):
    options = ("--no-warm", "--nproc-per-node", "2", "--max-restarts", "3")
    ended = samestep("run", *options, _as_recipe(samestep, ACTOR), f"*=exit:{int(code)}")
    assert ended.code == code
    assert "; restart " not in ended.stderr


@pytest.mark.parametrize("code", [2, 70, 75, 76, 77, 78])
def test_a_program_that_is_no_recipe_may_leave_with_our_codes_and_is_described(code, samestep):
    ended = samestep.act("0=wait", f"1=complain:its own words,exit:{code}", options=("--json",))
    assert ended.code == 1
    assert f"samestep: rank 1 failed: exit code {code}, last words: its own words\n" in ended.stderr
    assert "log: runs/actor/logs/rank-1.log" in ended.stderr
    assert "exit code 1: user code or a worker failed for good" in ended.stderr
    assert "bug of samestep" not in ended.stderr
    assert "preempted" not in ended.stderr
    assert json.loads(ended.stdout)["failure"]["exit_code"] == code


def test_a_program_that_is_no_recipe_and_leaves_with_our_code_is_started_again_as_asked(samestep):
    ended = samestep.act("0=later:exit:0,exit:75", options=("--max-restarts", "1"), ranks=1)
    assert ended.code == 0
    assert "rank 0 failed: exit code 75; restart 1 of 1" in ended.stderr


def test_usage_error_of_a_recipe_is_said_once_by_rank_zero(samestep):
    recipe = _as_recipe(samestep, ACTOR)
    parts = ("0=complain:error: bad flag,record-usage:UsageError,exit:2", "1=record-usage:UsageError,exit:2")
    ended = samestep("run", "--no-warm", "--nproc-per-node", "2", recipe, *parts)
    assert (ended.code, ended.stderr) == (2, "error: bad flag\n")


def test_code_2_of_a_recipe_that_told_no_usage_error_is_described(samestep):
    ended = samestep("run", "--no-warm", _as_recipe(samestep, ACTOR), "0=complain:usage: its own parser,exit:2")
    assert ended.code == 2
    assert "rank 0 failed: exit code 2, last words: usage: its own parser" in ended.stderr
    assert "log: runs/actor/logs/rank-0.log" in ended.stderr


def test_other_codes_become_failure(samestep):
    assert samestep.act("0=exit:3").code == 1


def test_restart_begins_a_new_generation_on_fresh_ports(samestep):
    ended = samestep.act("1=later:exit:0,raise", "0=later:exit:0,wait", options=("--max-restarts", "2", "--json"))
    assert ended.code == 0
    assert "samestep: rank 1 failed: ValueError: boom; restart 1 of 2" in ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["generations"] == 2
    log = (samestep.cwd / "runs/actor/logs/rank-1.log").read_text()
    assert log.index("generation 0") < log.index("ValueError: boom") < log.index("generation 1")


def test_restarts_are_counted_and_the_last_failure_is_told(samestep):
    ended = samestep.act("1=raise", "0=wait", options=("--max-restarts", "2"))
    assert ended.code == 1
    assert ended.stderr.count("; restart ") == 2
    assert ended.stderr.count("exit code 1: user code") == 1
    assert len(ended.pids("rank-0.generation-*.pid")) == 3


def test_records_of_an_earlier_generation_accuse_nobody(samestep):
    parts = ("1=first:record:KeyError,first:exit:1,later:await-death:0,exit:1", "0=first:wait,raise:new")
    ended = samestep.act(*parts, options=("--max-restarts", "1"))
    assert "rank 1 failed: KeyError: recorded; restart 1 of 1" in ended.stderr
    assert "samestep: rank 0 failed: ValueError: new\n" in ended.stderr


def test_launcher_never_polls(samestep):
    process = samestep.start_acting("*=wait")
    launcher = psutil.Process(process.pid)
    before = launcher.num_ctx_switches().voluntary, launcher.cpu_times()
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(process.pid).wait(0.5)
    after = launcher.num_ctx_switches().voluntary, launcher.cpu_times()
    assert after[0] - before[0] <= 2
    process.terminate()
    wait_until(lambda: process.poll() is not None, "the launcher has ended")


@pytest.mark.parametrize(("text", "kind"), [("def broken(:\n", "SyntaxError"), ("  x = 1\n", "IndentationError")])
def test_text_that_is_no_python_is_named_with_its_line(text, kind, samestep):
    (samestep.cwd / "bad.py").write_text("x = 0\n" + text)
    (samestep.cwd / "imports.py").write_text("import bad\n")
    for recipe in ("bad.py", "imports.py"):
        ended = samestep("run", recipe)
        assert ended.code == 1
        failed = next(line for line in ended.stderr.splitlines() if " failed: " in line)
        assert failed.startswith(f"samestep: rank 0 failed: {kind}: ")
        assert failed.endswith("bad.py:2")


def test_a_crash_of_a_program_that_is_no_recipe_names_no_recipes_option(samestep):
    ended = samestep.act("0=signal:11", ranks=1)
    assert "killed by SIGSEGV" in ended.stderr
    assert "--num-workers" not in ended.stderr
    assert "run it alone" in ended.stderr


def test_a_recipe_on_one_rank_is_warned_of_nothing(samestep):
    recipe = WORKERS.parents[1] / "scripts" / "recipes" / "seed_linear.py"
    ended = samestep("run", recipe, "--epochs", "1", "--device", "cpu")
    assert ended.code == 0
    assert "Warning" not in ended.stderr
