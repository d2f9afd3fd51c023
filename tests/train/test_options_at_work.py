"""Options that change how a run goes on, each seen to do what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(120)
FAST = ("--reduction", "fast", "--shards", "2")


@pytest.mark.parametrize("hook", ["fp16", "powersgd"])
def test_compressed_gradients_train_and_are_near_the_exact_ones(trained, hook):
    shape = ("--shards", 2, "--width", 64, "--epochs", 4)  # PowerSGD leaves small matrices and the first steps alone
    exact = trained("small", *shape, ranks=2, cwd="exact")
    compressed = trained("small", *shape, "--reduction", "fast", "--comm-hook", hook, ranks=2, cwd="compressed")
    assert compressed.digest != exact.digest
    losses = [float.fromhex(run.events("epoch")[-1]["loss_hex"]) for run in (exact, compressed)]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--comm-hook", "fp16"), "--comm-hook fp16 is expected to go with --reduction fast"),
        ((*FAST, "--comm-hook", "bf16"), "--comm-hook bf16 is expected to run on NCCL"),
    ],
)
def test_a_hook_that_can_not_work_is_a_usage_error(start, flags, said):
    ended = start("small", "--run-dir", "run", *flags, ranks=2)
    assert ended.codes == [2, 2]
    assert said in ended.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hook_that_has_nothing_to_compress_is_said_once(trained, ranks):
    said = trained("small", *FAST, "--comm-hook", "fp16", "--max-steps", 2, ranks=ranks).stderrs
    assert said.count("--comm-hook fp16 compresses nothing on one rank") == (ranks == 1), said


def test_checkpoints_by_time_come_at_the_same_steps_on_every_rank(trained):
    ended = trained("small", "--checkpoint-seconds", "0.000001", "--keep-checkpoints", "99", "--max-steps", 5, ranks=2)
    assert [event["step"] for event in ended.events("checkpoint")] == [1, 2, 3, 4, 5]


def test_an_epoch_says_where_its_time_went_and_who_was_slowest(trained):
    said = trained("small", ranks=2).stdout
    line = next(line for line in said.splitlines() if line.startswith("  time: "))
    assert all(phase in line for phase in ("data", "forward", "backward", "sync", "optimizer", "slowest in"))


def test_the_whole_states_digest_is_the_same_after_a_stop_and_moves_with_the_optimizer(trained):
    def digest(ended, *flags):
        argv = [sys.executable, "-m", "samestep.launcher", "digest", *flags, str(ended.run_dir)]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    whole = trained("small", "--shards", "2", cwd="whole")
    trained("small", "--shards", "2", "--max-steps", 5, ranks=2, cwd="stopped")
    stopped = trained("small", "--shards", "2", cwd="stopped")
    assert digest(whole, "--state") == digest(stopped, "--state") != digest(whole) == digest(stopped)
    longer = trained("small", "--shards", "2", "--max-steps", 13, cwd="longer")
    assert digest(longer, "--state") != digest(whole, "--state")


def test_a_bar_is_drawn_on_a_terminal_and_lines_stay_whole(tmp_path):
    on_a_terminal = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    recipe = Path(__file__).parent / "recipes" / "small.py"
    argv = [sys.executable, "-c", on_a_terminal, sys.executable, str(recipe), "--run-dir", "run", "--log-every", "1"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert "\x1b[" in done.stdout
    assert "Epoch [1/2], Step [1/7], Loss: " in done.stdout
    assert "Finished Training: 14 steps, digest " in done.stdout


@pytest.mark.slow
def test_a_reader_of_words_that_has_gone_ends_no_training(tmp_path):
    recipe = Path(__file__).resolve().parent / "recipes" / "small.py"
    argv = [sys.executable, str(recipe), "--run-dir", "run", "--log-every", "1", "--epochs", "2"]
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("Epoch [1/2], Step [1/")
        process.stdout.close()  # as `| head -1` does
        said = process.stderr.read()
    assert (process.returncode, said) == (0, "")
    assert '"event": "run_finished"' in (tmp_path / "run" / "events.jsonl").read_text()
