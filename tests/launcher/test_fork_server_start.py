"""What the server of forked ranks does before it is asked for any."""

import getpass
import os
import signal
import subprocess
import sys
import tempfile

import psutil
import pytest

from samestep.launcher.command_line.argv import Recipe
from samestep.launcher.plan import Command
from samestep.launcher.supervise.fork_server import ForkServer, NoForkError


@pytest.mark.processes
def test_the_fork_server_tries_no_folder_for_temporary_files(tmp_path, monkeypatch):
    """A try is a file, which would stay if it were killed in that moment; making one changes the folder's time."""
    (tmp_path / f"torchinductor_{getpass.getuser()}").mkdir()  # torch's own, made at an import
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, (read, write) = tmp_path.stat().st_mtime_ns, os.pipe()
    server = ForkServer(sys.executable, os.environ | {"TMPDIR": str(tmp_path)}, read)
    try:
        server._socket.settimeout(60)
        assert server.greet()
    finally:
        server.close()
        os.close(read)
        os.close(write)
    assert tmp_path.stat().st_mtime_ns == before


@pytest.mark.processes
def test_a_server_that_does_not_answer_in_time_forks_nobody_later(tmp_path):
    """Its late answer would be taken for that to the next request, and the rank it names is started already."""
    script = tmp_path / "rank.py"
    script.write_text(f"open({str(tmp_path / 'began')!r}, 'a').write('x')\n")
    read, write = os.pipe()
    server = ForkServer(sys.executable, os.environ, read)
    try:
        server._socket.settimeout(60)
        assert server.greet()
        server._socket.settimeout(0.2)
        os.kill(server.pid, signal.SIGSTOP)
        recipe = Recipe(str(script))
        command = Command(0, 0, (), {}, (), tmp_path / "log", tmp_path / "error", recipe=recipe)
        with pytest.raises(NoForkError, match="does not answer"):
            server.fork(command, os.environ)
        assert not server.is_ready
        assert not psutil.pid_exists(server.pid), "it could go on, and fork then"
    finally:
        server.close()
        os.close(read)
        os.close(write)
    assert not (tmp_path / "began").exists()


ALONE = """
import os, signal, sys
from samestep.launcher.liveness import adopt_orphans
from samestep.launcher.supervise.fork_server import ForkServer

adopt_orphans()
(read, write), (output, out) = os.pipe(), os.pipe()
server = ForkServer(sys.executable, os.environ, read)
server._socket.settimeout(60)
assert server.greet()
server._socket.settimeout(0.2)
os.kill(server.pid, signal.SIGSTOP)
request = {"target": sys.argv[1], "arguments": [], "is_module": False, "env": dict(os.environ), "fds": []}
assert server._ask(request | {"stdin": False, "launcher": os.getpid()}, [out, out, read]) == {}
server._socket.close()
os.close(out)
os.kill(server.pid, signal.SIGCONT)
with os.fdopen(output, "rb") as said:
    print("said:", said.read())
server.close()
"""


@pytest.mark.slow
@pytest.mark.processes
def test_a_rank_whose_number_reached_nobody_does_not_begin(tmp_path):
    """The launcher no longer listens when the server forks: it has started the rank in another way."""
    script = tmp_path / "rank.py"
    script.write_text("print('began', flush=True)\n")
    done = subprocess.run([sys.executable, "-c", ALONE, script], capture_output=True, text=True, timeout=60, check=True)
    assert "said: " in done.stdout
    assert "began" not in done.stdout


UNSENT = """
import os
from samestep.launcher.liveness import adopt_orphans
from samestep.train.fork_server import _fork

adopt_orphans()
rank, gate = _fork()
if rank == 0:
    os._exit(0)
os.close(gate)
print("status:", os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]))
"""


@pytest.mark.processes
def test_a_rank_whose_server_is_killed_before_it_may_begin_has_failed():
    """With status 0 the launcher of one rank would take its run for done."""
    done = subprocess.run([sys.executable, "-c", UNSENT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "status: 1\n"


WAITING = """
import os, signal, socket, sys
from pathlib import Path
from samestep.launcher.command_line.argv import Recipe
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import RunDir
from samestep.launcher.plan import Command
from samestep.launcher.supervise.console import Console
from samestep.launcher.supervise.hang_watch import NoWatch
from samestep.launcher.supervise.signals import SignalSocket
from samestep.launcher.supervise.starter import Starter
from samestep.launcher.supervise.supervisor import Supervisor


class Server:
    pid, is_ready = os.getpid(), False

    def __init__(self):
        self.ours, self.theirs = socket.socketpair()

    def fileno(self):
        return self.ours.fileno()

    def close(self):
        self.ours.close()


argv = (sys.executable, "-c", "print('a program')")
command = Command(0, 0, argv, {}, (), Path("log"), Path("error"), recipe=Recipe("recipe.py"))
with SignalSocket() as signals:
    config = LaunchConfig(join_timeout=0.05)
    starter = Starter()
    starter.server = Server()
    supervisor = Supervisor(config, RunDir(Path()), Console(), signals, NoWatch(), starter, 1.0, saves=True)
    if sys.argv[1] == "asked":
        starter.server.theirs.send(b"ready")
        os.kill(os.getpid(), signal.SIGTERM)
    ended = supervisor.run(0, [command], os.environ, started=bool, is_victim=bool)
    supervisor.close()
    starter.__exit__(None, None, None)
print([end.returncode for end in ended.ends], ended.stopped_by)
"""


@pytest.fixture
def waiting(tmp_path):
    """What a supervisor prints that waits for its server."""

    def run(what):
        words = [sys.executable, "-c", WAITING, what]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


def test_asked_to_stop_in_the_moment_in_which_the_server_is_ready_no_rank_is_started(waiting):
    assert waiting("asked")[0] == "[] 15\n"


def test_ranks_are_programs_where_the_server_is_not_ready_in_time(waiting):
    said, complained = waiting("late")
    assert said == "a program\n[0] None\n"
    assert "their server is not ready" in complained
