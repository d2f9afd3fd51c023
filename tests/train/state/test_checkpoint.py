"""Checkpoints: complete and verified, or not there. Every damage is found."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samestep.launcher import manifest
from samestep.launcher.contract import ExitCode, RunDir, UsageError
from samestep.launcher.digest import path_digest
from samestep.launcher.lock import RunLock, SupersededError
from samestep.train.state import checkpoint
from samestep.train.state.checkpoint import Snapshot, commit, find, load, remove_unfinished, set_aside

FILES = ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def snapshot(step: int, **more: Any) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    weights = {"a.weight": torch.randn(40, 40, generator=generator), "n": torch.tensor(step)}
    tensors = {"state.exp_avg": torch.randn(40, 40, generator=generator)}
    trees = dict.fromkeys(("model", "aliases", "trees", "tree_aliases"))
    state = {"counters": {"step": step, "epoch": 0, "cursor": step}, **trees}
    return Snapshot(step, weights, tensors, state, {"seed": 0, "shards": 2} | more)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def names(run_dir: RunDir) -> list[str]:
    return sorted(path.name for path in run_dir.checkpoints.iterdir())


def test_a_committed_snapshot_is_loaded_as_it_was(run_dir: RunDir) -> None:
    kept = snapshot(7)
    folder = commit(kept, run_dir, generation=0, keep=2)
    assert folder == run_dir.checkpoint(7)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert manifest.verify(folder) == ""
    found = load(folder)
    assert found.step == 7
    for left, right in ((found.weights, kept.weights), (found.tensors, kept.tensors)):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert found.state == kept.state
    assert found.facts["shards"] == 2
    assert manifest.read(folder)["digest"] == path_digest(folder)


def test_another_state_of_the_same_step_is_set_aside_and_the_same_one_stays_as_it_is(run_dir: RunDir) -> None:
    folder = commit(snapshot(7), run_dir, generation=0, keep=2)
    inode = folder.stat().st_ino
    assert commit(snapshot(7, later="facts"), run_dir, generation=1, keep=2) == folder
    assert (folder.stat().st_ino, names(run_dir)) == (inode, ["step-00000007"])
    before, other = path_digest(folder), snapshot(7)
    other.weights["n"] += 1
    commit(other, run_dir, generation=1, keep=2)
    assert torch.equal(load(folder).weights["n"], other.weights["n"])
    assert path_digest(run_dir.checkpoints / "step-00000007.superseded") == before
    (folder / "state.json").write_text("{}")
    commit(other, run_dir, generation=1, keep=2)
    assert manifest.verify(folder) == ""
    assert names(run_dir) == ["step-00000007", "step-00000007.corrupt", "step-00000007.superseded"]


def test_views_of_one_storage_can_be_saved(run_dir: RunDir) -> None:
    base = torch.arange(12.0)
    weights = {"whole": base, "part": base[:4], "turned": base.view(3, 4).t(), "wide": base[:1].expand(5)}
    folder = commit(Snapshot(1, weights, {}, {}, {}), run_dir, 0, 2)
    found = load(folder).weights
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_retention_keeps_the_newest(run_dir: RunDir) -> None:
    for step in (1, 2, 10, 100_000_000):
        commit(snapshot(step), run_dir, generation=0, keep=2)
    assert names(run_dir) == ["step-00000010", "step-100000000"]
    assert [path.name for path in manifest.committed(run_dir.checkpoints)] == ["step-100000000", "step-00000010"]


def test_older_ones_go_only_after_the_new_one_is_published(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(snapshot(1), run_dir, 0, keep=1)
    order: list[str] = []
    rename, rmtree = Path.rename, shutil.rmtree

    def publish(path: Path, to: Path) -> Path:
        order.append(f"publish {to.name}")
        return rename(path, to)

    def remove(path: Path, **options: Any) -> None:
        if path.exists():
            order.append(f"remove {path.name}")
        rmtree(path, **options)

    monkeypatch.setattr(Path, "rename", publish)
    monkeypatch.setattr(shutil, "rmtree", remove)
    commit(snapshot(2), run_dir, 0, keep=1)
    assert order == ["publish step-00000002", "remove step-00000001"]


@pytest.mark.parametrize("failing", ["write_tensors", "sync", "file_digest"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_full_disk_leaves_the_old_ones_and_nothing_half_written(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, failing: str, call: int
) -> None:
    commit(snapshot(1), run_dir, 0, keep=1)
    calls = 0
    real: Callable[..., Any] = getattr(checkpoint, failing)

    def full(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (call if failing != "file_digest" else 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(checkpoint, failing, full)
    with pytest.raises(OSError, match="No space left"):
        commit(snapshot(2), run_dir, 0, keep=1)
    monkeypatch.undo()
    assert names(run_dir) == ["step-00000001"]
    assert manifest.verify(run_dir.checkpoint(1)) == ""
    commit(snapshot(2), run_dir, 0, keep=1)
    assert names(run_dir) == ["step-00000002"]


def test_what_a_dead_process_began_is_removed_and_never_taken(run_dir: RunDir) -> None:
    commit(snapshot(1), run_dir, 0, keep=2)
    shutil.copytree(run_dir.checkpoint(1), run_dir.checkpoints / "step-00000002.tmp-0")
    assert find(run_dir, "auto") == (run_dir.checkpoint(1), [])
    remove_unfinished(run_dir)
    assert names(run_dir) == ["step-00000001"]


def test_an_unfinished_folder_of_the_same_name_is_no_obstacle(run_dir: RunDir) -> None:
    (run_dir.checkpoints / "step-00000001.tmp-0").mkdir(parents=True)
    (run_dir.checkpoints / "step-00000001.tmp-0" / "rest").write_text("x")
    folder = commit(snapshot(1), run_dir, 0, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == FILES


# Damage.


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 10 and 20."""
    path = tmp_path_factory.mktemp("good")
    for step in (10, 20):
        commit(snapshot(step), RunDir(path), 0, keep=2)
    return path


def damage(folder: Path, data: st.DataObject) -> str:
    """Do one thing to a checkpoint folder that changes it; say what."""
    kind = data.draw(
        st.sampled_from(["flip", "truncate", "delete", "swap", "zero", "stale", "older", "append", "empty"])
    )
    path = folder / data.draw(st.sampled_from(FILES))
    raw = bytearray(path.read_bytes())
    if kind == "flip":
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(raw)
    elif kind == "truncate":
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    elif kind == "append":
        path.write_bytes(raw + data.draw(st.binary(min_size=1, max_size=3)))
    elif kind == "empty":
        path.write_bytes(data.draw(st.sampled_from([b"", b"[]", b"{}", b"null", b"7", b'"x"', b"\xff"])))
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":
        other = folder / data.draw(st.sampled_from([name for name in FILES if name != path.name]))
        path.write_bytes(other.read_bytes())
        other.write_bytes(raw)
    elif kind == "zero":
        begin = data.draw(st.integers(0, (len(raw) - 1) // 4096)) * 4096
        page = slice(begin, min(begin + 4096, len(raw)))
        raw[page] = bytes(page.stop - page.start)
        path.write_bytes(raw)
    elif kind == "stale":
        shutil.copy(folder.parent / "step-00000010" / path.name, path)
    else:
        shutil.rmtree(folder)
        shutil.copytree(folder.parent / "step-00000010", folder)
    return f"{kind} {path.name}"


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_any_damage_is_found_named_and_passed_over(good: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        run_dir = RunDir(Path(temporary) / "run")
        shutil.copytree(good, run_dir.path)
        damage(run_dir.checkpoint(20), data)
        assert manifest.verify(run_dir.checkpoint(20))
        newest, damaged = find(run_dir, "auto")
        assert newest == run_dir.checkpoint(10)
        assert [folder for folder, _ in damaged] == [run_dir.checkpoint(20)]
        with pytest.raises(UsageError, match="valid checkpoint"):
            find(run_dir, str(run_dir.checkpoint(20)))
        with pytest.raises(UsageError) as raised:
            path_digest(run_dir.checkpoint(20))
        assert raised.value.exit_code in (ExitCode.NO_CHECKPOINT, ExitCode.USAGE)
        assert path_digest(run_dir.path) == path_digest(run_dir.checkpoint(10))


@pytest.fixture
def two(good: Path, run_dir: RunDir) -> RunDir:
    """A run directory of one's own with checkpoints of steps 10 and 20."""
    shutil.copytree(good, run_dir.path)
    return run_dir


def test_the_newest_valid_one_wins(two: RunDir) -> None:
    assert find(two, "auto") == (two.checkpoint(20), [])


def test_nothing_valid_left_is_exit_78_and_never_a_start_from_zero(two: RunDir) -> None:
    for step in (10, 20):
        (two.checkpoint(step) / "state.json").write_text("{}")
    with pytest.raises(UsageError, match=r"step-00000020: state\.json .*step-00000010: state\.json") as raised:
        find(two, "auto")
    assert int(raised.value.exit_code) == 78
    with pytest.raises(UsageError) as raised:
        path_digest(two.path)
    assert raised.value.exit_code == ExitCode.NO_CHECKPOINT


def test_never_refuses_to_begin_where_something_was(two: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="never") as raised:
        find(two, "never")
    assert raised.value.exit_code == ExitCode.USAGE
    assert raised.value.hint
    assert find(RunDir(tmp_path / "new"), "never") == (None, [])


def test_auto_begins_at_zero_where_nothing_was(tmp_path: Path) -> None:
    assert find(RunDir(tmp_path / "new"), "auto") == (None, [])


def test_a_path_is_taken_wherever_it_lies(two: RunDir, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(two.checkpoint(10), copy)
    assert find(RunDir(tmp_path / "new"), str(copy)) == (copy, [])


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_a_path_without_a_checkpoint_is_refused(two: RunDir, path: str) -> None:
    with pytest.raises(UsageError, match="resume") as raised:
        find(two, path)
    assert raised.value.exit_code == ExitCode.USAGE


def test_a_damaged_one_is_set_aside_and_kept_beside_those_that_were_before(two: RunDir) -> None:
    for number in ("", "-2", "-3"):
        folder = two.checkpoint(20)
        folder.mkdir(exist_ok=True)
        (folder / "state.json").write_text(number)
        aside = set_aside(folder)
        assert aside.name == f"step-00000020.corrupt{number}"
    for number in ("", "-2", "-3"):
        assert (two.checkpoints / f"step-00000020.corrupt{number}" / "state.json").read_text() == number
        assert manifest.committed(two.checkpoints) == [two.checkpoint(10)]


def test_a_manifest_of_another_format_is_named(two: RunDir) -> None:
    folder = two.checkpoint(20)
    content = manifest.read(folder)
    (folder / "MANIFEST.json").write_bytes(manifest.encode(content | {"format": 99}))
    assert "format 99" in manifest.verify(folder)


def test_a_manifest_is_canonical_json(two: RunDir) -> None:
    raw = (two.checkpoint(20) / "MANIFEST.json").read_bytes()
    pretty = json.dumps(json.loads(raw), sort_keys=True, indent=2).encode()
    (two.checkpoint(20) / "MANIFEST.json").write_bytes(pretty)
    assert "changed" in manifest.verify(two.checkpoint(20))


def test_a_checkpoint_is_private(run_dir: RunDir) -> None:
    folder = commit(snapshot(1), run_dir, 0, keep=1)
    assert folder.stat().st_mode & 0o077 == 0


def test_a_replaced_start_publishes_nothing_and_removes_nothing(run_dir: RunDir) -> None:
    run_dir.path.mkdir()
    held = RunLock(run_dir)
    commit(snapshot(1), run_dir, 0, keep=1, fence=held.generation)
    earlier, _ = held.generation, held.next_generation()
    with pytest.raises(SupersededError):
        commit(snapshot(2), run_dir, 0, keep=1, fence=earlier)
    held.release()
    assert names(run_dir) == ["step-00000001"]


def test_a_replaced_start_that_writes_the_same_step_is_not_in_the_newest_ones_way(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir.path.mkdir()
    held = RunLock(run_dir)
    earlier, write = held.generation, checkpoint._write

    def meanwhile(*what: Any) -> None:
        monkeypatch.setattr(checkpoint, "_write", write)
        with pytest.raises(SupersededError):
            commit(snapshot(1), run_dir, 0, keep=1, fence=earlier)
        write(*what)

    monkeypatch.setattr(checkpoint, "_write", meanwhile)
    commit(snapshot(1), run_dir, 0, keep=1, fence=held.next_generation())
    held.release()
    assert names(run_dir) == ["step-00000001"]


def test_a_folder_that_is_removed_while_it_is_looked_at_holds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    assert manifest.committed(tmp_path / "gone") == []
