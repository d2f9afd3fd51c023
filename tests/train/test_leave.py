"""The end of a worker: its own exit status whatever threads still do, and a record that names the culprit."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from samestep.launcher.contract import ErrorRecord, RunDir, UsageError, WorkerEnv
from samestep.launcher.lock import SupersededError
from samestep.train import leave

# Collectives that nobody waits for, results dropped while the interpreter goes down.
BUSY = """
import os, sys, datetime
import torch, torch.distributed as dist
from samestep.train import leave
torch.set_num_threads(1)
rank, port = int(os.environ["RANK"]), int(os.environ["SAMESTEP_STORE_PORT"])
fd = int(os.environ["SAMESTEP_STORE_FD"]) if rank == 0 else None
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, datetime.timedelta(seconds=30), False, False, fd)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(10, 10))
model(torch.ones(1, 10)).sum().backward()
if "hard" in sys.argv:
    leave.end_hard(model)
works = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(400)]
print("said", flush=False)
sys.exit(7)
"""


@pytest.fixture(params=range(5))
def attempt(request: pytest.FixtureRequest) -> int:
    """A test that takes it runs five times."""
    return int(request.param)


@pytest.mark.compiler
@pytest.mark.timeout(60)
@pytest.mark.usefixtures("attempt")
def test_exit_status_and_output_survive_unfinished_collectives(start: Any, tmp_path: Path) -> None:
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    ended = start(script, "hard", ranks=2, seconds=20, to_the_end=True)
    assert ended.codes == [7, 7], ended.stderrs
    assert ended.stdout == "said\n"


@pytest.mark.timeout(60)
def test_exit_handlers_run_before_the_hard_end(start: Any, tmp_path: Path) -> None:
    script = tmp_path / "handlers.py"
    script.write_text(
        textwrap.dedent("""
        import atexit, sys
        from samestep.train import leave
        atexit.register(lambda: print("first registered"))
        leave.end_hard(object())
        leave.end_hard(object())
        atexit.register(lambda: print("last registered"))
        raise SystemExit(5)
        """)
    )
    ended = start(script, to_the_end=True)
    assert ended.codes == [5]
    assert ended.stdout == "last registered\nfirst registered\n"


@pytest.mark.timeout(60)
def test_an_exception_still_ends_with_status_1_and_its_traceback(start: Any, tmp_path: Path) -> None:
    script = tmp_path / "raises.py"
    script.write_text("from samestep.train import leave\nleave.end_hard()\nraise KeyError('mine')\n")
    ended = start(script, to_the_end=True)
    assert ended.codes == [1]
    assert "KeyError: 'mine'" in ended.stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:4242"), True),
        (RuntimeError("Read error [127.0.0.1]:1: Connection reset by peer"), True),
        (RuntimeError("writev: Broken pipe"), True),
        (dist.DistNetworkError("The client socket has failed"), True),
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (dist.DistStoreError("wait timeout"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
        (KeyError("x"), False),
        (MemoryError(), False),
        (UsageError("a mistake"), False),
        (ConnectionResetError(104, "Connection reset by peer"), False),  # of the user's own download
        (BrokenPipeError(32, "Broken pipe"), False),
    ],
    ids=lambda value: f"{type(value).__name__}: {value}"[:40] if isinstance(value, BaseException) else str(value),
)
def test_only_a_broken_connection_between_ranks_is_a_consequence(error: BaseException, expected: bool) -> None:
    assert leave.is_consequence(error) == expected
    assert leave.error_record(error, 0, 0, 0, "step").consequence == expected


def raised_by(function: Any) -> BaseException:
    try:
        function()
    except Exception as error:  # noqa: BLE001 (whatever it raises)
        return error
    raise AssertionError("nothing was raised")


def users_mistake() -> None:
    json.loads("{")


def users_torch_mistake() -> None:
    import torch

    torch.nn.Linear(3, 2)(torch.ones(2, 5))


@pytest.mark.parametrize("function", [users_mistake, users_torch_mistake])
def test_the_frame_is_the_users_not_a_librarys(function: Any) -> None:
    record = leave.error_record(raised_by(function), 3, 1, 17, "forward")
    line = function.__code__.co_firstlineno
    file, _, rest = record.frame.rpartition(":")
    assert Path(file).name == Path(__file__).name
    assert line < int(rest.split()[0]) < line + 5
    assert rest.endswith(f"in {function.__name__}")
    assert (record.rank, record.generation, record.step, record.phase) == (3, 1, 17, "forward")
    assert (record.exit_code, record.consequence) == (1, False)
    assert "Traceback" in record.traceback


def test_a_users_folder_whose_name_begins_like_ours_is_the_users() -> None:
    beside = Path(leave.__file__).parent.with_name("train_of_the_user.py")
    code = compile("def mine():\n    raise KeyError(1)", str(beside), "exec")
    namespace: dict[str, Any] = {}
    exec(code, namespace)  # noqa: S102 (our own text)
    assert f"{beside}:2" in leave.error_record(raised_by(namespace["mine"]), 0, 0, 0, "build").frame


def test_a_usage_error_keeps_its_hint_and_code() -> None:
    record = leave.error_record(UsageError("what", "how"), 0, 0, 0, "build")
    assert (record.message, record.hint, record.exit_code, record.consequence) == ("what", "how", 2, False)


def test_a_record_is_read_back_as_it_was(tmp_path: Path) -> None:
    record = leave.error_record(raised_by(users_mistake), 2, 0, 5, "data")
    run_dir = RunDir(tmp_path / "run")
    leave.write_record(record, run_dir)
    leave.write_record(record, run_dir)
    assert [path.name for path in run_dir.errors.iterdir()] == ["rank-2.json"]
    assert ErrorRecord.from_json(run_dir.error(2).read_text()) == record


def test_a_record_that_can_not_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    leave.write_record(leave.error_record(KeyError("x"), 0, 0, 0, "build"), RunDir(tmp_path / "file"))
    assert capsys.readouterr().err.startswith("warning: no error record")


def test_a_record_that_does_not_fit_leaves_no_file(
    tmp_path: Path, limit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    limit(10)
    leave.write_record(leave.error_record(ValueError(), 1, 0, 0, "build"), RunDir(tmp_path))
    assert list(RunDir(tmp_path).errors.iterdir()) == []
    assert "File too large" in capsys.readouterr().err


@pytest.mark.parametrize(("phase", "told"), [("closing", [True, False]), ("build", [True, True])])
def test_what_all_ranks_come_to_at_the_end_is_told_once_also_where_no_record_fits(
    tmp_path: Path, limit: Any, phase: str, told: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    limit(10)
    records = [leave.error_record(UsageError("what"), rank, 0, 9, phase) for rank in (0, 1)]
    ranks = [WorkerEnv(rank=rank, world_size=2, local_rank=rank) for rank in (0, 1)]
    seen = [leave.is_to_tell(record, env, RunDir(tmp_path)) for record, env in zip(records, ranks, strict=True)]
    assert seen == told
    assert capsys.readouterr().err.count("File too large") == 2


def test_a_rank_learns_that_rank_zero_says_the_same(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    record = leave.error_record(UsageError("what"), 1, 4, 0, "build")
    assert not leave.said_by_rank_zero(record, run_dir, deadline_s=0.05)
    for message, generation, expected in (("other", 4, False), ("what", 3, False), ("what", 4, True)):
        leave.write_record(leave.error_record(UsageError(message), 0, generation, 0, "build"), run_dir)
        assert leave.said_by_rank_zero(record, run_dir, deadline_s=0.05) == expected


def test_a_rank_without_descriptors_does_not_blame_the_run_directory(tmp_path: Path) -> None:
    code = (
        "import os, resource\n"
        "from pathlib import Path\n"
        "from samestep.launcher.contract import RunDir\n"
        "from samestep.train import start\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))\n"
        "while True:\n"
        "    try:\n"
        "        os.dup(0)\n"
        "    except OSError:\n"
        "        break\n"
        "try:\n"
        "    start.make(RunDir(Path('run')))\n"
        "except OSError as error:\n"
        "    print(error.errno)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == str(errno.EMFILE)


def test_a_start_that_a_newer_one_has_replaced_does_not_start_again_in_its_folder() -> None:
    assert leave.error_record(SupersededError("replaced"), 0, 0, 5, "checkpoint").final
    assert not leave.error_record(UsageError("what", "how"), 0, 0, 5, "checkpoint").final
