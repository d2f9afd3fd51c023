"""P3, P6: killed at any file operation of a save, a run goes on from a valid checkpoint and ends in the same bits."""

import hashlib
import shutil
import signal
import subprocess

import pytest

from samestep.launcher import manifest
from samestep.launcher.contract import RunDir
from samestep.launcher.lock import Owner

pytestmark = [pytest.mark.processes, pytest.mark.slow]
OPERATIONS = (
    "openat,mkdir,mkdirat,write,pwrite64,writev,ftruncate,fsync,fdatasync,"
    "rename,renameat,renameat2,unlink,unlinkat,rmdir"
)
FLAGS = ("--max-steps", "12", "--checkpoint-every", "4", "--keep-checkpoints", "1", "--global-batch-size", "512")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.timeout(1500)
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace injects the kill from outside")
def test_killed_at_every_file_operation_of_a_save_it_ends_in_the_same_bits(start, tmp_path, start_command):
    reference = start("python", 1, "seed_linear.py", *FLAGS, run_dir="reference")
    files = ("model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json")
    killed = 0
    for operation in range(1, 200):
        run_dir = tmp_path / f"killed-{operation}"
        run_dir.mkdir()
        RunDir(run_dir).lock.write_bytes(Owner(generation=6).encode())  # else the number of the first start is random
        saves = run_dir / "checkpoints"
        folders = [saves, saves / "step-00000008", saves / "step-00000008.tmp-0-7", saves / "step-00000004"]
        paths = [*folders, *(folder / name for folder in folders[1:] for name in files)]
        argv = [
            "strace",
            "-f",
            "--seccomp-bpf",
            "-qq",
            "-o",
            "/dev/null",
            *(word for path in paths for word in ("-P", str(path))),
        ]
        argv += ["-e", f"inject={OPERATIONS}:signal=SIGKILL:when={operation}"]
        done = subprocess.run(
            [*argv, *start_command("python", 1, "seed_linear.py", *FLAGS, "--run-dir", str(run_dir))],
            cwd=tmp_path, capture_output=True, timeout=120,
        )  # fmt: skip
        if done.returncode == 0:
            break
        assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), done.stderr[-2000:]
        killed += 1
        newest, damaged = manifest.newest_valid(saves)
        assert not damaged, f"operation {operation} left {damaged}"
        assert newest is not None or operation < 30, f"operation {operation} lost every checkpoint"
        resumed = start("python", 1, "seed_linear.py", *FLAGS, run_dir=run_dir.name)
        assert resumed.digest == reference.digest, f"operation {operation}"
        assert resumed.losses == reference.losses, f"operation {operation}"
        assert sha256(resumed.newest / "optimizer.safetensors") == sha256(reference.newest / "optimizer.safetensors")
        assert not list(saves.glob("*.tmp-*"))
        shutil.rmtree(run_dir)
    else:
        pytest.fail("the save never came to an end")
    print(f"killed at {killed} file operations, {killed} runs ended in the reference digest")
    assert killed >= 15
