"""P6: of 1 000 random damages to a committed checkpoint, each one is found."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

from samestep.launcher import manifest
from samestep.launcher.contract import MANIFEST, RunDir
from samestep.train.state.checkpoint import Snapshot, commit

pytestmark = pytest.mark.timeout(300)


def snapshot(step):
    generator = torch.Generator().manual_seed(step)
    tensors = {f"layer.{number}": torch.randn(40, 30, generator=generator) for number in range(3)}
    return Snapshot(
        step, tensors, {f"m.{name}": t * 2 for name, t in tensors.items()}, {"counters": [step]}, {"seed": 1}
    )


def flip(draw, folder, path, older):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(draw, folder, path, older):
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def append(draw, folder, path, older):
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 100)))


def zero(draw, folder, path, older):
    content = bytearray(path.read_bytes())
    begin = draw.randrange(len(content))
    content[begin : begin + 512] = bytes(len(content[begin : begin + 512]))
    path.write_bytes(content)


def delete(draw, folder, path, older):
    path.unlink()


def swap(draw, folder, path, older):
    other = draw.choice([p for p in folder.iterdir() if p != path])
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def stale(draw, folder, path, older):
    path.write_bytes((older / path.name).read_bytes())


def older_under_newer_name(draw, folder, path, older):
    shutil.rmtree(folder)
    shutil.copytree(older, folder)


def test_a_thousand_random_damages_are_found(tmp_path):
    run_dir = RunDir(tmp_path)
    older, newer = (commit(snapshot(step), run_dir, 0, keep=5) for step in (3, 7))
    pristine = tmp_path / "pristine"
    shutil.copytree(newer, pristine)
    draw, found, kinds = (
        random.Random(0),
        0,
        (flip, truncate, append, zero, delete, swap, stale, older_under_newer_name),
    )
    tried = 0
    while tried < 1000:
        shutil.rmtree(newer)
        shutil.copytree(pristine, newer)
        path = draw.choice(sorted(newer.iterdir()))
        kind = draw.choice(kinds)
        before = path.read_bytes()
        kind(draw, newer, path, older)
        if path.exists() and path.read_bytes() == before and kind is not older_under_newer_name:
            continue  # a page that was zero already, a stale file that is equal: nothing was damaged
        tried += 1
        problem = manifest.verify(newer)
        found += bool(problem)
        assert problem, f"{kind.__name__} of {path.name} was not found"
        assert manifest.newest_valid(run_dir.checkpoints)[0] == older
    assert found == tried == 1000
    shutil.rmtree(newer)
    shutil.copytree(pristine, newer)
    assert manifest.verify(newer) == ""
    assert (newer / MANIFEST).exists()
