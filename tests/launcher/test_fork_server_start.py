"""What the server of forked ranks does before it is asked for any."""

import getpass
import os
import sys
import tempfile

import pytest

from samestep.launcher.supervise.fork_server import ForkServer


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
