"""`samestep watch`, as a program: beside a live run, after its end, on a terminal and into a pipe."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from samestep.launcher.contract import RunDir
from samestep.launcher.lock import RunLock


class Terminal:
    """`samestep watch` on a terminal of our own."""

    def __init__(self, samestep, *words, columns=80, environ=None):
        self.screen, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environ = {"TERM": "xterm"} | (environ or {})
        plain = {name: value for name, value in samestep.environ(environ).items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "samestep.launcher", "watch", *map(str, words)],
            cwd=samestep.cwd,
            env=plain,
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=terminal,
        )
        samestep.started.append(self.process)
        os.close(terminal)
        self.seen = b""

    def read_until(self, text, seconds=60.0):
        end = time.monotonic() + seconds
        while text is None or text not in self.seen:
            ready, _, _ = select.select([self.screen], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            try:
                data = os.read(self.screen, 4096)
            except OSError:
                data = b""
            if not data:
                assert text is None, f"no {text!r} in {self.seen!r}"
                break
            self.seen += data
        return self.seen

    def end(self):
        seen = self.read_until(None)
        os.close(self.screen)
        return self.process.wait(timeout=30), seen


@pytest.fixture
def owned(samestep, made):
    """A run directory that this process owns, as a live launcher does."""
    path = made.run(samestep.cwd / "run", made.events(60, finish=False))
    lock = RunLock(RunDir(path))
    yield path, lock
    lock.release()


def append(path, *events):
    with (path / "events.jsonl").open("a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events))


def test_an_ended_run_is_shown_and_watch_returns(samestep, made):
    made.run(samestep.cwd / "run", made.events(100))
    ended = samestep("watch", "run")
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.stdout.startswith("step 100/100, epoch 2/2, loss 0.02, 3200 samples/s, ")
    assert ended.stdout.endswith(f"done, digest {'ab' * 32}\n")


def test_a_run_that_nobody_runs_is_said_to_be_stopped(samestep, made):
    made.run(samestep.cwd / "run", made.events(60, finish=False))
    assert samestep("watch", "run").stdout.endswith("not running; started again it goes on from step 50\n")


def test_once_shows_a_live_run_and_returns(samestep, owned):
    ended = samestep("watch", "run", "--once")
    assert ended.code == 0
    assert "step 60/100" in ended.stdout
    assert "ETA" in ended.stdout
    assert "not running" not in ended.stdout


def test_a_pipe_gets_lines_without_control_characters(samestep, made, owned):
    path, _ = owned
    process = samestep.start("watch", "run")
    first = process.stdout.readline()
    append(path, made.step(61), {"event": "run_finished", "time": 1010.0, "digest": "cd" * 32, "steps": 61})
    out, err = process.communicate(timeout=60)
    lines = (first + out).decode().splitlines()
    assert (process.returncode, err) == (0, b"")
    assert "step 60/100" in lines[0]
    assert lines[-1].endswith("cd" * 32)
    assert all(line.isprintable() for line in lines)


def test_a_restart_that_cuts_the_events_is_followed(samestep, made, owned):
    path, _ = owned
    terminal = Terminal(samestep, "run", columns=120)
    terminal.read_until(b"step 60/100")
    events = made.events(50, crash_after=50, finish=False)  # back to the checkpoint
    (path / "new").write_text("".join(json.dumps(event) + "\n" for event in [*events, made.step(51)]))
    (path / "new").rename(path / "events.jsonl")
    assert b"1 restart" in terminal.read_until(b"step 51/100")
    append(path, {"event": "run_finished", "time": 1010.0, "digest": "cd" * 32, "steps": 51})
    code, seen = terminal.end()
    assert code == 0
    assert b"cd" * 32 in seen


def test_a_start_with_another_length_is_believed_also_where_the_watch_began_before_it(samestep, made, owned):
    path, _ = owned
    terminal = Terminal(samestep, "run")
    terminal.read_until(b"step 60/100")
    (path / "config.json").write_text(json.dumps({"config": {"epochs": 4}, "total_steps": 400}))
    append(path, *made.events(0, finish=False), made.step(61))
    assert b"epoch 2/4" in terminal.read_until(b"step 61/400")


def test_the_end_of_the_owner_ends_the_watch(samestep, owned):
    _, lock = owned
    terminal = Terminal(samestep, "run")
    terminal.read_until(b"60/100")
    lock.release()
    code, seen = terminal.end()
    assert code == 0
    assert b"not running" in seen


def test_interrupting_it_is_quiet_and_leaves_a_clean_terminal(samestep, owned):
    terminal = Terminal(samestep, "run")
    terminal.read_until(b"60/100")
    terminal.process.send_signal(signal.SIGINT)
    code, seen = terminal.end()
    assert code == 130
    assert b"Traceback" not in seen
    assert seen.endswith(b"\r\x1b[2K\x1b[1A\r\x1b[2K")  # both lines of the display are gone


def test_colours_are_left_out_if_asked(samestep, owned):
    coloured, plain = (
        Terminal(samestep, "run", "--once"),
        Terminal(samestep, "run", "--once", environ={"NO_COLOR": "1"}),
    )
    assert b"\x1b[36m" in coloured.end()[1]
    seen = plain.end()[1]
    assert b"60/100" in seen
    assert b"\x1b[3" not in seen
    assert b"\x1b[9" not in seen


def test_mistakes_are_sentences(samestep):
    (samestep.cwd / "empty").mkdir()
    (samestep.cwd / "unreadable" / "events.jsonl").mkdir(parents=True)
    for words, said in [
        ((), "expected to be followed by one run directory"),
        (("a", "b"), "but got 2 words"),
        (("empty",), "empty is expected to be the directory of a run, but holds no events.jsonl"),
        (("unreadable",), "unreadable is expected to be the directory of a run, but events.jsonl: Is a directory"),
        (("x" * 300,), "File name too long"),
        (("empty", "--onec"), "did you mean --once?"),
    ]:
        ended = samestep("watch", *words)
        assert (ended.code, ended.stdout) == (2, "")
        assert said in ended.stderr
        assert "Traceback" not in ended.stderr
