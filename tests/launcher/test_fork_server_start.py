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


@pytest.mark.processes
def test_a_rank_whose_number_reached_nobody_does_not_begin(tmp_path):
    """The launcher no longer listens when the server forks: it has started the rank in another way."""
    script = tmp_path / "rank.py"
    script.write_text("print('began', flush=True)\n")
    done = subprocess.run([sys.executable, "-c", ALONE, script], capture_output=True, text=True, timeout=60, check=True)
    assert "said: " in done.stdout
    assert "began" not in done.stdout
