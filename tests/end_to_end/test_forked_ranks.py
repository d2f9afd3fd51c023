"""A rank that is forked can't be told from a program of its own: same words, same status, same errors."""

import py_compile
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(60)]
SAMESTEP = [sys.executable, "-m", "samestep.launcher", "run", "--max-restarts", "0"]
LOOKS_LIKE_OURS = "if False:\n    import samestep.train\n"
SHOW = """
import os, sys, threading, atexit
from pathlib import Path
atexit.register(lambda: print("handler"))
threading.Thread(target=lambda: (threading.main_thread().join(), print("thread"))).start()
main = sys.modules["__main__"]
print(sys.argv, __name__, main.__name__, getattr(main, "__file__", None), __spec__ and __spec__.name, __package__)
print(sys.path[0], sys.path.count(sys.path[0]), sys.flags.safe_path, main.__dict__ is globals())
print(sorted((n, v) for n, v in os.environ.items() if not n.endswith(("PORT", "RUN_ID", "_FILE", "FENCE", "FD"))))
print(os.getsid(0) == os.getpid() == os.getpgid(0), sys.stdin.read())
print(sorted(map(int, os.listdir("/proc/self/fd")))[:3], file=sys.stderr)
"""
SCRIPTS = {
    "facts": SHOW,
    "status": "import sys; sys.exit(7)",
    "words": "import sys; sys.exit('these are my last words')",
    "error": "def deep():\n    raise ValueError('boom')\ndeep()",
    "cause": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError(1) from e",
    "syntax": "def broken(:",
    "signal": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "early": "import os; os._exit(0)",
    "random": "import random, numpy; print(random.random() == random.random(), numpy.random.rand() < 1)",
}


def told(words, folder):
    run = subprocess.run([*SAMESTEP, *words], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    texts = [path.read_text().splitlines()[1:] for path in sorted(Path(folder).glob("runs/*/logs/rank-*.log"))]
    for path in Path(folder).glob("runs/*/logs/rank-*.log"):
        path.unlink()
    return (
        run.returncode,
        sorted(run.stdout.splitlines()),
        [sorted(text) for text in texts],
        run.stderr.count("failed:"),
    )


@pytest.mark.parametrize(
    "name",
    [name if name == "facts" else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS],
)
def test_a_script_notices_nothing(name, tmp_path):
    (tmp_path / f"{name}.py").write_text(f"{LOOKS_LIKE_OURS}{SCRIPTS[name]}\n")
    assert told([f"{name}.py", "a", "--b"], tmp_path) == told(["--no-warm", f"{name}.py", "a", "--b"], tmp_path)


@pytest.mark.slow
def test_a_module_notices_nothing(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(f"{LOOKS_LIKE_OURS}{SHOW}\n")
    assert told(["-m", "package", "a"], tmp_path) == told(["--no-warm", "-m", "package", "a"], tmp_path)


def test_a_file_beside_the_recipe_that_hides_a_module_is_found_by_it(tmp_path):
    (tmp_path / "mine.py").write_text(f"{LOOKS_LIKE_OURS}import colorsys, timeit\nprint(colorsys.MINE, timeit.MINE)\n")
    for name in ("colorsys", "timeit"):
        (tmp_path / f"{name}.py").write_text("MINE = 'mine'\n")
    code, out, _, _ = told(["mine.py"], tmp_path)
    assert (code, out) == (0, ["mine mine"])


@pytest.mark.parametrize("name", ["mine.pyc", "mine.pyz"])
def test_what_is_compiled_or_an_archive_is_run_by_python_itself_where_run_dir_says(name, tmp_path):
    source = tmp_path / "mine.py"
    source.write_text("import sys\nif len(sys.argv) > 9:\n    import samestep.train\nprint(sys.argv[1:])\n")
    if name.endswith("c"):
        py_compile.compile(str(source), str(tmp_path / name))
    else:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(source, "__main__.py")
    code, out, _, _ = told([name, "--run-dir", "here"], tmp_path)
    assert (code, out) == (0, ["['--run-dir', 'here']"])
    assert (tmp_path / "here" / "logs" / "rank-0.log").exists()
    assert not (tmp_path / "runs").exists()
