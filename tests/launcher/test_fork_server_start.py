"""What the server of forked ranks does before it is asked for any."""

import getpass
import os
import signal
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
